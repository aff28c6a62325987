"""Layers on several devices: what one device makes. One CPU plays two devices and raises where their tensors meet (tests/pretended.py);
accelerate's own hooks carry activations from one to the other."""

from dataclasses import replace

import pytest
import torch
from accelerate import dispatch_model
from macbench_kernels import kernels

from macbench import engine as engines
from macbench.decoder import Preparation
from macbench.engine import Engine, Request
from macbench.errors import ConfigError
from macbench.methods.full import Full
from macbench.models import placement
from macbench.models.adapter import attention_shape
from macbench.output_error import Measured
from macbench.trace.text import layers
from tests.methods.cases import CASES
from tests.models.tiny import tiny
from tests.pretended import Pretended, place_of, put

LAYERS, HERE, THERE = 4, torch.device("cpu", 0), torch.device("cpu", 1)
# A model goes through its layers in order, whichever device they are on.
PLACES = [HERE, THERE, THERE, HERE]
PROMPTS = [[int(x) for x in torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(n))] for n in (300, 41)]
METHODS = [*{type(case.make()): name for name, case in reversed(CASES.items())}.values(), "streaming_llm cache"]


def network():
    return tiny("llama", torch.float32, num_hidden_layers=LAYERS, num_attention_heads=4).cpu()


@pytest.fixture(scope="module")
def one():
    return network()


@pytest.fixture(scope="module")
def two():
    spread = network()
    places = {"model.embed_tokens": HERE, "model.norm": HERE, "model.rotary_emb": THERE, "lm_head": THERE}
    places |= {f"model.layers.{i}": place for i, place in enumerate(PLACES)}
    with Pretended():
        dispatch_model(spread, places, main_device=HERE)
        for name, place in places.items():
            for tensor in [*spread.get_submodule(name).parameters(), *spread.get_submodule(name).buffers()]:
                put(tensor, place)
    return spread


def made(model, method):
    """Of two requests tokens and counts, logits [steps, B, vocab], and errors of the outputs."""
    engine = Engine(model, kernels("torch"), 330, page_size=4, chunk=256, batch=2)
    prompts = [engine.prefill(ids, method.prompt_queries, column_sums=method.prompt_column_sums) for ids in PROMPTS]
    preparation, measured, logits = Preparation(), Measured(method), []
    engine.decode_batch([Request(prompt, 1) for prompt in prompts], method, preparation=preparation)  # no step
    requests = [Request(prompt, 3 + i) for i, prompt in enumerate(prompts)]
    done = engine.decode_batch(requests, measured, watch=lambda step, row: logits.append(row.cpu()), preparation=preparation)
    errors = measured.errors()
    for prompt in prompts:
        prompt.free()
    assert engine.pool.free_pages == engine.pool.pages
    return done, torch.stack(logits), errors


@pytest.mark.parametrize("name", METHODS)
def test_two_devices_make_what_one_makes(name, one, two):
    want, logits, errors = made(one, CASES[name].make())
    with Pretended():
        got, scores, others = made(two, CASES[name].make())
    assert [g.tokens for g in got] == [g.tokens for g in want]
    for a, b in zip(got, want, strict=True):
        assert a.counts.keys() == b.counts.keys() and a.prepared_bytes == b.prepared_bytes
        assert all((a.counts[key] == b.counts[key]).all() for key in a.counts)
    torch.testing.assert_close(scores, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(others), torch.tensor(errors), atol=1e-6, rtol=1e-5)


def test_what_a_layer_needs_lies_on_its_device(two):
    with Pretended():
        engine = Engine(two, kernels("torch"), 330, page_size=4, chunk=128)
        prompt = engine.prefill(PROMPTS[0], 8, column_sums=True)
        method = CASES["mac"].make()
        engine.decode(prompt, method, 2)
        assert not engine.captures and engine.shape.devices == tuple(PLACES)
        for layer, place in enumerate(PLACES):
            cache, own = prompt.cache.at(layer)
            assert {place_of(x) for x in (cache.keys(own), cache.values(own), cache.block_table, cache.lengths, cache.slots)} == {place}
            assert place_of(prompt.queries[layer].q) == place_of(prompt.queries[layer].column_sums) == place
        assert [place_of(ring.out) for part in method.parts for ring in part.rings] == PLACES
        with layers(engine, PROMPTS[1], 4, 8) as found:  # a trace gathers them on the first device
            assert {place_of(x) for layer in found for x in (layer.x, layer.q, layer.k, layer.v)} == {HERE}
        engine.release()
        assert not method.parts


def test_one_cache_for_all_devices_is_noticed(two, monkeypatch):
    """The pretended devices are apart: an engine that takes the model for one of a single device fails at the first layer elsewhere."""
    monkeypatch.setattr(engines, "attention_shape", lambda *args: replace(attention_shape(*args), devices=()))
    with Pretended(), pytest.raises(RuntimeError, match="tensors on cpu:0 and cpu:1"):
        Engine(two, kernels("torch"), 330, page_size=4).prefill(PROMPTS[1])


def test_a_step_that_is_planned_for_one_device_is_refused(two):
    with Pretended(), pytest.raises(ConfigError, match="backend"):
        Engine(two, replace(kernels("torch"), plan=lambda *args: None), 330)


def test_gpus_share_layers_and_cache(one):
    """Contiguous blocks, and on no GPU more than there is room for: its weights and its layers' share of the cache."""
    layer, rest = (sum(p.numel() * 4 for p in module.parameters()) for module in (one.model.layers[0], one.model.embed_tokens))
    for free, cache in (([9 * layer, 9 * layer], 0), ([9 * layer, 9 * layer], 5 * layer), ([7 * layer, 4 * layer], 3 * layer)):
        placed = placement.shared_out(one, dict(enumerate(free)), cache)
        on = [placed[f"model.layers.{i}"] for i in range(LAYERS)]
        assert on == sorted(on) and set(on) == {0, 1}
        for gpu, room in enumerate(free):
            others = rest * sum(placed[name] == gpu for name in ("model.embed_tokens", "lm_head"))
            assert on.count(gpu) * (layer + cache / LAYERS) + others <= room
    with pytest.raises(ConfigError, match="finds no room on 2 GPUs"):
        placement.shared_out(one, {0: 4 * layer, 1: 4 * layer}, 5 * layer)


def test_full_attention_ends_with_the_models_own_choice(two, one):
    """Against transformers alone."""
    with Pretended():
        engine = Engine(two, kernels("torch"), 100, page_size=4)
        tokens = engine.decode(engine.prefill(PROMPTS[1]), Full(), 6).tokens
    whole = torch.tensor([PROMPTS[1] + tokens])
    assert tokens == one(whole).logits[0, len(PROMPTS[1]) - 1 : -1].argmax(-1).tolist()
