"""Budgets hold over whole generations: what is measured over hundreds of steps is what the closed forms were asked for."""

import pytest

from macbench.errors import ConfigError
from macbench.methods.h2o import H2O
from macbench.methods.kivi import KIVI
from macbench.methods.multipole import Multipole
from macbench.methods.oracle_topk import OracleTopK
from macbench.methods.pyramidkv import PyramidKV
from macbench.methods.quest import Quest
from macbench.methods.rocketkv import RocketKV
from macbench.methods.snapkv import SnapKV
from macbench.methods.streaming_llm import StreamingLLM
from macbench.methods.tidaldecode import TidalDecode
from macbench.methods.tova import TOVA
from tests.methods.driver import LLAMA, Batch, Shape, Text

METHODS = [
    (StreamingLLM(), 0.25),
    (Quest(dense_layers=()), 0.5),
    (TidalDecode(reselect=3), 0.9),
    (OracleTopK(count="ideal"), 0.25),
    (RocketKV(window=8, max_new=32), 0.25),
    (RocketKV(window=8), 0.25),
    (Multipole(), 0.6),
    (SnapKV(window=8), 0.35),
    (PyramidKV(), 0.35),
    (PyramidKV(mode="faithful", gqa="sum"), 0.35),
    (H2O(), 0.25),
    (TOVA(), 0.25),
    (KIVI(), 0.4),
]


@pytest.mark.parametrize(("prompt", "new"), [(640, 260), (120, 600)])
@pytest.mark.parametrize(("method", "rho"), METHODS, ids=lambda x: type(x).__name__ if not isinstance(x, float) else "")
def test_a_fit_holds_over_a_long_generation(method, rho, prompt, new):
    """A prompt and a third as much again, and a short prompt with a text five times as long, which evicting prompts cannot make cheap."""
    layers = 5 if isinstance(method, TidalDecode) else 2
    text = Text.random(prompt, new, layers=layers, group=2, kv_heads=1, dim=32)
    tokens, generated = round(prompt + (new + 1) / 2), (new + 1) / 2
    shape = Shape(layers, 2, 1, 32, 0.25, max_tokens=prompt + new)
    if isinstance(method, SnapKV | Multipole | KIVI) and prompt < new:
        if isinstance(method, SnapKV):
            with pytest.raises(ConfigError, match=r"must be at least 0\.[78]\d\d for \w+kv at 420 tokens, its floor: a window"):
                method.fit(rho, tokens, shape, generated)
        return
    batch = Batch(method.fit(rho, tokens, shape, generated), [text], max_tokens=prompt + new)
    for _ in range(new):
        batch.step()
    counts = batch.counts()
    measured = sum(counts[f"bytes_{c}"].sum() for c in ("kv", "meta", "state")) / counts["bytes_full"].sum()  # ids are left out of the closed forms
    assert measured == pytest.approx(rho, rel=0.1)


def test_generated_tokens_take_room_from_what_survives():
    assert SnapKV().fit(0.1, 4096, Shape(**LLAMA), 64).capacity == SnapKV().fit(0.1, 4096, Shape(**LLAMA), 1).capacity - 63
