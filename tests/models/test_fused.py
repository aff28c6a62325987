"""The fused decode step against transformers' own modules: same weights, same attention, same logits."""

import pytest
import torch
from macbench_kernels import UnsupportedError, kernels, one_by_one

from macbench.engine import Engine
from macbench.methods.full import Full
from macbench.methods.mac import MAC
from macbench.models.forward import Modules
from macbench.models.fused import Fused, obstacle
from tests.conftest import DEVICE
from tests.models.tiny import ARCHITECTURES, tiny

PROMPTS = [[int(x) for x in torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(n))] for n in (33, 50, 9)]


def decoded(network, forward, method, prompts, steps=5, layer_kernels=None, which=(0, 1, 2, 3)):
    """Logits [steps, B, vocab]. ``which``: requests of four there are, of whom each gets other tokens."""
    engine = Engine(network, layer_kernels or kernels("torch", DEVICE), 80, page_size=4, chunk=16, batch=4, graph=False)
    engine.forward = forward
    ready = [engine.prefill(ids, method.prompt_queries) for ids in prompts]
    decoder = engine.decoder(method, len(which))
    decoder.start(ready)
    logits = []
    with torch.inference_mode():
        for step in range(steps):
            decoder.tokens.copy_(torch.tensor([5 * step, 7 * step, step, 0])[list(which)])
            decoder.before()
            decoder.step()
            logits.append(decoder.logits[: len(prompts)].clone())
    decoder.stop()
    return torch.stack(logits)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("method", [Full(), MAC(min_context=0, window=16, band=4, tau=0.6)])
@pytest.mark.parametrize("most", [16, 2])
def test_logits_are_those_of_the_modules(kind, method, most, monkeypatch):
    """Four rows, as few of them and as many."""
    monkeypatch.setattr("macbench_kernels.triton_linear.MAX_ROWS", most)
    network = tiny(kind, torch.float32)
    want = decoded(network, Modules(network), method, PROMPTS)
    fused = Fused(network, 80)
    got = decoded(network, fused, method, PROMPTS)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
    # The modules still work, on the joint weights.
    torch.testing.assert_close(decoded(network, Modules(network), method, PROMPTS), want, atol=1e-5, rtol=1e-5)


def test_what_it_cannot_serve_is_named():
    assert obstacle(tiny("llama", torch.float32)) is None
    assert "dtype" in obstacle(tiny("llama"))
    assert "RoPE" in obstacle(tiny("llama", torch.float32, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}))


def test_a_request_gets_what_it_gets_alone():
    """Own products and attention request by request: logits of a batch are bit for bit those of single ones; and where that is no promise."""
    network = tiny("llama", torch.float32)
    fused = Fused(network, 80)
    assert fused.invariant(16) and not fused.invariant(17) and not Fused(tiny("qwen3_moe", torch.float32), 80).invariant(2)
    method, layer_kernels = MAC(min_context=0, window=16, band=4, tau=0.6), one_by_one(kernels("triton", DEVICE))
    together = decoded(network, fused, method, PROMPTS[1:], 1, layer_kernels, [0, 1])
    assert torch.equal(together[:, 1:], decoded(network, fused, method, PROMPTS[2:], 1, kernels("triton", DEVICE), [1]))
    if DEVICE == "cpu":
        with pytest.raises(UnsupportedError, match="needs the fused step of a GPU"):
            Engine(network, layer_kernels, 80, batch=2, batch_invariant=True)
