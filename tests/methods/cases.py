"""The rows of the matrix of methods.

A case is a way to make the method for small texts, the settings with which it keeps everything, what its ``gqa`` may be, the bytes that one
layer of one step should count, and how to spoil those parts of its state that it did not report as read.
"""

from collections.abc import Callable
from dataclasses import dataclass

from macbench.methods.base import Method
from macbench.methods.full import Full
from macbench.methods.h2o import H2O
from macbench.methods.int8 import INT8
from macbench.methods.kivi import KIVI
from macbench.methods.mac import MAC
from macbench.methods.multipole import Multipole
from macbench.methods.oracle_topk import OracleTopK
from macbench.methods.pyramidkv import PyramidKV
from macbench.methods.quest import Quest
from macbench.methods.rocketkv import RocketKV
from macbench.methods.snapkv import SnapKV
from macbench.methods.streaming_llm import StreamingLLM
from macbench.methods.tidaldecode import TidalDecode
from macbench.methods.tova import TOVA
from tests.conftest import DEVICE
from tests.methods import expected, spoils
from tests.methods.driver import Batch, Text
from tests.methods.expected import Seen
from tests.methods.recorder import Recorder

PROMPTS = (90, 41, 130)
FLUSHED = (94, 41, 126)  # a residual of 32 keys is full behind two generated tokens of two of these
SHORT = (47, 20)
STEPS = 6


def fast(backend: str) -> bool:
    """The interpreter takes its time: few and short texts."""
    return backend == "torch" or DEVICE == "cuda"


@dataclass
class Case:
    make: Callable[..., Method]
    everything: dict | None = None
    gqa: tuple = (None,)
    expected: Callable[[Method, Seen], dict] | None = None
    # Returns (tensor, mask of what was not read) pairs; may note in the recorder which rows of the cache were read.
    spoil: Callable[[Method, Recorder, Batch], list] | None = None
    ideal: bool = False  # counts less than it reads, on purpose: no poison
    scored: bool = False  # reads state even while it keeps everything
    prompts: tuple = PROMPTS
    short: tuple = SHORT  # these are for the interpreter
    short_layers: int = 1

    def texts(self, backend="torch", **sizes) -> list[Text]:
        prompts = self.prompts
        if not fast(backend):
            prompts, sizes = self.short, {"layers": self.short_layers} | sizes
        return [Text.random(n, STEPS, seed=n, device=DEVICE, **sizes) for n in prompts]


def maker(kind, **settings):
    return lambda **more: kind(**(settings | more))


CASES = {
    "full": Case(Full, {}, expected=expected.full_counts),
    # What it reads follows from hits: test_counting holds that to closed forms and poisons its rings as well.
    "mac": Case(
        *(maker(MAC, tau=1.1, window=16, band=8, min_context=0), {"tau": 0.0}, (None,), expected.mac_counts),
        **{"scored": True, "short": (24,)},
    ),
    "streaming_llm": Case(maker(StreamingLLM, sinks=3, recent=20), {"recent": 500}, expected=expected.streaming_counts),
    "streaming_llm cache": Case(maker(StreamingLLM, sinks=3, recent=20, mode="faithful"), {"recent": 500}, expected=expected.streaming_counts),
    "quest": Case(
        maker(Quest, budget=40, page=8, dense_layers=(1,)),
        {"budget": 500},
        ("sum", "max", "mean_query", "per_q_head"),
        expected.quest_counts,
        spoils.spoil_quest,
    ),
    "quest faithful": Case(
        maker(Quest, budget=24, page=8, dense_layers=(), mode="faithful"), {"budget": 500}, (None,), expected.quest_counts, spoils.spoil_quest
    ),
    "oracle_topk": Case(maker(OracleTopK, budget=25), {"budget": 500}, expected=expected.oracle_counts),
    "oracle_topk per_q_head": Case(maker(OracleTopK, budget=25, variant="per_q_head"), {"budget": 500}, expected=expected.oracle_counts),
    "oracle_topk page": Case(maker(OracleTopK, budget=32, variant="page", page=8), {"budget": 500}, expected=expected.oracle_counts),
    "oracle_topk ideal": Case(maker(OracleTopK, budget=25, count="ideal"), {"budget": 500}, expected=expected.oracle_counts, ideal=True),
    "multipole": Case(
        maker(Multipole, budget=40),
        {"budget": 500},
        (None,),
        expected.multipole_counts,
        spoils.spoil_multipole,
        prompts=(400, 393, 41, 262),
        short=(300, 20),
    ),
    "multipole faithful": Case(
        *(maker(Multipole, budget=70, mode="faithful"), None, (None,), expected.multipole_counts, spoils.spoil_multipole),
        **{"prompts": (393, 262), "short": (300, 20)},
    ),
    "multipole near only": Case(
        maker(Multipole, budget=40, replacement=False),
        {"budget": 500},
        (None,),
        expected.multipole_counts,
        spoils.spoil_multipole,
        prompts=(393, 262),
        short=(300, 20),
    ),
    "rocketkv": Case(maker(RocketKV, budget=30, window=8, max_new=10), {"budget": 500}, (None,), expected.rocket_counts, spoils.spoil_rocket),
    "rocketkv large": Case(
        *(maker(RocketKV, budget=60, window=8, max_new=10), {"budget": 500}, (None,), expected.rocket_counts, spoils.spoil_rocket),
        short=(90, 20),
    ),
    "rocketkv faithful": Case(
        maker(RocketKV, budget=24, window=8, max_new=10, mode="faithful"),
        {"budget": 1000, "max_new": 5},
        (None,),
        expected.rocket_counts,
        spoils.spoil_rocket,
    ),
    "tidaldecode": Case(
        *(maker(TidalDecode, budget=25, reselect=9), {"budget": 500}, ("mean", "per_q_head"), expected.tidal_counts),
        **{"short": (47,), "short_layers": 4},
    ),
    "tidaldecode faithful": Case(
        *(maker(TidalDecode, budget=25, reselect=9, mode="faithful"), {"budget": 500}, (None,), expected.tidal_counts),
        **{"short": (47,), "short_layers": 4},
    ),
    "snapkv": Case(
        maker(SnapKV, capacity=25, window=8), {"capacity": 500}, ("sum", "max", "per_q_head"), expected.snap_counts, spoils.spoil_survivors
    ),
    "snapkv faithful": Case(
        maker(SnapKV, capacity=25, window=8, mode="faithful"), {"capacity": 500}, (None,), expected.snap_counts, spoils.spoil_survivors
    ),
    "pyramidkv": Case(
        maker(PyramidKV, capacity=25, beta=4),
        {"capacity": 500},
        ("sum", "max", "per_q_head"),
        expected.snap_counts,
        spoils.spoil_survivors,
        short_layers=2,
    ),
    "pyramidkv faithful": Case(
        *(maker(PyramidKV, capacity=25, beta=4, mode="faithful"), {"capacity": 500}, (None,), expected.snap_counts, spoils.spoil_survivors),
        short_layers=2,
    ),
    "tova": Case(maker(TOVA, capacity=25), {"capacity": 500}, ("mean",), expected.tova_counts, spoils.spoil_survivors),
    "tova faithful": Case(maker(TOVA, capacity=25, mode="faithful"), {"capacity": 500}, (None,), expected.tova_counts, spoils.spoil_survivors),
    "h2o": Case(maker(H2O, heavy=15, recent=10), {"heavy": 300, "recent": 300}, (None,), expected.h2o_counts, spoils.spoil_survivors, scored=True),
    "kivi": Case(maker(KIVI, bits=2, group=16, residual=32), expected=expected.kivi_counts, spoil=spoils.spoil_codes, prompts=FLUSHED),
    "kivi 4": Case(maker(KIVI, group=32, residual=32), expected=expected.kivi_counts, spoil=spoils.spoil_codes, prompts=FLUSHED),
    "int8": Case(INT8, expected=expected.int8_counts, spoil=spoils.spoil_codes),
}
