"""A model whose weights come and go: the same texts and counts as one that stays in memory. Host memory and disk stand in for GPU and host."""

import pytest
import torch
from macbench_kernels import kernels

from macbench.engine import Engine
from macbench.methods.full import Full
from macbench.methods.mac import MAC
from macbench.models import placement, weights
from tests import real
from tests.models.tiny import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny("llama", dtype=torch.float32).cpu().save_pretrained(path)
    return path


@pytest.fixture
def load(folder, monkeypatch, tmp_path):
    def call(**placed):
        monkeypatch.setattr(weights.placement, "options", lambda *args: placed)
        spec = real.spec().copy()
        spec.path = str(folder)
        return weights.load(spec, "cpu", real.chat()).network

    return call


def test_offloaded_layers_compute_where_the_cache_is(load, tmp_path):
    whole = load()
    split = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    parted = load(device_map=split | {"lm_head": "disk"}, offload_folder=str(tmp_path))
    assert placement.dispatched(parted) and not placement.dispatched(whole)
    assert next(parted.model.layers[1].parameters()).device.type == "meta"
    assert placement.compute_device(parted) == placement.compute_device(whole) == torch.device("cpu")
    ids = [int(x) for x in torch.randint(0, 97, (60,), generator=torch.Generator().manual_seed(1))]
    made = []
    for network in (whole, parted):
        engine = Engine(network, kernels("torch"), 128)
        prompt = engine.prefill(ids, 32)
        made.append([engine.decode(prompt, method, 20) for method in (Full(), MAC(min_context=0, window=32, band=8))])
        prompt.free()
    for one, two in zip(*made, strict=True):
        assert one.tokens == two.tokens
        assert all((one.counts[name] == two.counts[name]).all() for name in one.counts)
