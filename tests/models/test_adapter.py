"""The adapter against the models' own forward pass: same logits, true pre-RoPE queries, nothing left behind."""

import pytest
import torch
from macbench_kernels import kernels
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from macbench.engine import Engine
from macbench.errors import ConfigError
from macbench.methods.full import Full
from macbench.methods.mac import MAC
from macbench.models.adapter import attention_modules, intercept
from tests.conftest import DEVICE
from tests.models.tiny import ARCHITECTURES, rotary, tiny

IDS = torch.randint(0, 97, (1, 50), generator=torch.Generator().manual_seed(1)).to(DEVICE)


@pytest.fixture(params=ARCHITECTURES, scope="module")
def model(request):
    return tiny(request.param)


@pytest.mark.parametrize("chunk", [7, 50, 512])
def test_chunked_prefill_gives_the_models_own_logits(model, chunk):
    engine = Engine(model, kernels("torch", DEVICE), ctx=64, page_size=4, chunk=chunk)
    prompt = engine.prefill(IDS[0].tolist())
    torch.testing.assert_close(prompt.logits.double(), model(IDS).logits[0, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [Full(), MAC(tau=0, window=16, band=4, min_context=0)])
def test_decoding_follows_the_models_own_argmax(model, method):
    engine = Engine(model, kernels("torch", DEVICE), ctx=64, page_size=4, chunk=16)
    prompt = engine.prefill(IDS[0].tolist(), method.prompt_queries)
    tokens = engine.decode(prompt, method, 14).tokens
    whole = torch.cat([IDS, torch.tensor([tokens], device=DEVICE)], 1)
    assert tokens == model(whole).logits[0, 49:-1].argmax(-1).tolist()
    prompt.free()
    assert engine.pool.free_pages == engine.pool.pages


def test_queries_are_those_before_rope(model):
    """Rotating q_pre with the architecture's own function must give q; for Qwen3 that includes its query norm."""
    seen = {}

    def attend(layer, q_pre, q, k, v):
        seen[layer] = (q_pre, q)
        return torch.zeros_like(q)

    with intercept(model, attend):
        model.base_model(input_ids=IDS, use_cache=False)
    cos, sin = model.base_model.rotary_emb(torch.zeros(1, 50, 48, dtype=torch.float64, device=DEVICE), torch.arange(50, device=DEVICE)[None])
    assert sorted(seen) == [0, 1]
    for q_pre, q in seen.values():
        torch.testing.assert_close(rotary(model)(q_pre, q_pre, cos, sin)[0], q, atol=1e-6, rtol=1e-6)
        assert (q_pre - q).abs().max() > 0.1


@pytest.mark.parametrize("fail", [False, True])
def test_model_is_left_as_it_was(model, fail):
    before = model(IDS).logits
    names = set(ALL_ATTENTION_FUNCTIONS)

    def attend(layer, q_pre, q, k, v):
        if fail:
            raise RuntimeError("inside attention")
        return torch.zeros_like(q)

    try:
        with intercept(model, attend):
            model.base_model(input_ids=IDS, use_cache=False)
    except RuntimeError:
        assert fail
    assert model.config._attn_implementation == "sdpa"
    assert set(ALL_ATTENTION_FUNCTIONS) == names
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(model(IDS).logits, before)


def test_prompt_queries_are_the_last_ones_whatever_the_chunks(model):
    tails = []
    for chunk in (9, 50):
        engine = Engine(model, kernels("torch", DEVICE), ctx=64, page_size=4, chunk=chunk)
        tails.append(engine.prefill(IDS[0].tolist(), 20).queries)
    for a, b in zip(*tails, strict=True):
        assert a.first == b.first == 30
        torch.testing.assert_close(a.q, b.q, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(a.q_pre, b.q_pre, atol=1e-6, rtol=1e-6)


def test_other_architectures_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(ConfigError, match="gpt2"):
        attention_modules(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10)))


@pytest.mark.parametrize("method", [Full(), MAC(tau=0.5, window=32, band=4, min_context=0)])
def test_backends_give_the_same_tokens_and_counts(method):
    """A whole generation through torch and through Triton (interpreted, and shorter, where there is no GPU)."""
    network = tiny("llama", torch.float32)
    results, steps = [], 20 if DEVICE == "cuda" else 8
    for backend in ("torch", "triton"):
        engine = Engine(network, kernels(backend, DEVICE), ctx=80, page_size=4, chunk=16)
        results.append(engine.decode(engine.prefill(IDS[0].tolist(), method.prompt_queries), method, steps))
    assert results[0].tokens == results[1].tokens
    for name, values in results[0].counts.items():
        assert (values == results[1].counts[name]).all(), name
    if isinstance(method, MAC):
        assert results[0].counts["hits"].sum() > 0
