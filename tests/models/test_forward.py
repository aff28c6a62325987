"""Which models' steps wait for the device, and so cannot be captured."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from macbench.models import random_weights
from macbench.models.forward import waits_for_device
from tests.models.tiny import ARCHITECTURES, tiny


def mixture(experts: str, dtype: torch.dtype):
    network = tiny("qwen3_moe", dtype).cpu()
    network.config._experts_implementation = experts
    return network


@pytest.mark.parametrize(
    ("experts", "dtype", "generation", "waits"),
    [
        ("grouped_mm", torch.bfloat16, 9, False),
        ("grouped_mm", torch.bfloat16, 10, False),
        ("grouped_mm", torch.bfloat16, 8, True),
        ("grouped_mm", torch.float32, 9, True),
        ("batched_mm", torch.float32, 8, False),
        ("eager", torch.bfloat16, 9, True),
    ],
)
def test_a_mixture_waits_where_it_asks_for_the_chosen_experts(monkeypatch, experts, dtype, generation, waits):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
    assert waits_for_device(mixture(experts, dtype)) is waits


class Waits(TorchDispatchMode):
    """Notes the operators whose results the host needs: values as numbers, and elements of which there may be any number."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.seen |= {name} & {"nonzero", "_local_scalar_dense"}
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("experts", ["eager", "batched_mm"])
def test_what_waits_needs_results_on_the_host(experts):
    network = mixture(experts, torch.float32)
    with Waits() as waits:
        network.base_model.layers[0].mlp(torch.randn(2, 1, 48))
    assert bool(waits.seen) == waits_for_device(network)


def test_a_dense_model_does_not_wait():
    assert not any(waits_for_device(tiny(kind, torch.float32)) for kind in ARCHITECTURES if kind != "qwen3_moe")


def test_random_weights_of_a_mixture_do_not_wait_on_a_hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config = tiny("qwen3_moe", torch.float32).config.to_dict()
    assert not waits_for_device(random_weights.build(config, "cpu", torch.bfloat16))
