"""The breakdown of a step on a device whose time a test makes."""

import pytest
import torch
from macbench_kernels import kernels

from macbench.engine import Engine
from macbench.latency import breakdown
from macbench.latency.breakdown import Echo, outputs, parts
from macbench.methods.full import Full
from tests.conftest import DEVICE
from tests.models.tiny import tiny


class Device:
    """Its time moves by what runs on it, in ms; each of the runs may have another duration every time."""

    def __init__(self, **durations: list[float]):
        self.now, self.left = 0.0, {name: list(times) for name, times in durations.items()}

    def run(self, name: str):
        def go():
            self.now += self.left[name].pop(0)

        return go

    def measure(self, run) -> float:
        began = self.now
        run()
        return self.now - began


def of(device: Device, step_ms: float) -> dict:
    return parts(*(device.run(name) for name in ("step", "without", "products")), device.measure, step_ms)


def test_parts_add_up_to_the_step():
    """Attention 4 of 10, products 5; what the host's clock saw beyond the device's 10 is part of the rest. One round of each is disturbed."""
    found = of(Device(step=[10, 17, 10.5], without=[30, 6, 6], products=[5, 5, 1]), 11.0)
    assert found == {"attention_ms": 4.5, "products_ms": 5, "rest_ms": 1.5, "device_ms": 10.5}
    assert found["attention_ms"] + found["products_ms"] + found["rest_ms"] == 11.0


@pytest.mark.parametrize(
    "durations", [{"step": [5] * 3, "without": [6] * 3, "products": [4] * 3}, {"step": [9] * 3, "without": [6] * 3, "products": [8] * 3}]
)
def test_times_that_cannot_be_are_none(durations):
    found = of(Device(**durations), 9.5)
    assert [found[name] for name in ("attention_ms", "products_ms", "rest_ms")] == [None] * 3


def test_a_run_is_timed_over_several_in_a_row(monkeypatch):
    """Between two events of the device, which first waits: 2 + 4 + 6 + 8 ms are 5 a run. And a breakdown takes as many steps as it says."""
    device = Device(wait=[100] * 9, step=[2, 4, 6, 8] * 3)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = device.now

        def synchronize(self): ...

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(breakdown.torch.cuda, "_sleep", lambda cycles: device.run("wait")())
    monkeypatch.setattr(breakdown.torch.cuda, "Event", Event)
    found = parts(device.run("step"), lambda: None, lambda: None, breakdown.device_ms, 6.0)
    assert found == {"attention_ms": 5.0, "products_ms": 0.0, "rest_ms": 1.0, "device_ms": 5.0}
    assert breakdown.USED == 3 * 4 + 1 and not device.left["step"]


@pytest.mark.parametrize(("kind", "experts"), [("llama", "eager"), ("qwen3_moe", "batched_mm"), ("qwen3_moe", "eager")])
def test_the_step_without_attention_sees_what_the_step_saw(kind, experts):
    """Given the outputs of a step, a decoder without attention ends with the same logits on the same tokens; the step itself went on as ever.

    On a GPU the last one is not captured, as its experts wait for the device.
    """
    network = tiny(kind, torch.float32, head_dim=64)
    network.config._experts_implementation = experts
    engine = Engine(network, kernels("auto", DEVICE), 64, page_size=4, batch=2, graph=DEVICE == "cuda")
    with torch.inference_mode():
        for storage in (engine.pool.k, engine.pool.v):
            storage.normal_()
        assert engine.captures == (DEVICE == "cuda" and (kind, experts) != ("qwen3_moe", "eager"))
        decoder = engine.decoder(Full(), 2)
        decoder.start_at(20, 8)
        decoder.tokens.copy_(torch.tensor([3, 5]))
        kept = outputs(decoder)
        assert len(kept) == 2 and kept[0].shape == (2, network.config.num_attention_heads, 64) and decoder.cache.host_lengths == [21, 21]
        logits, chosen = decoder.logits.clone(), decoder.chosen.clone()
        assert torch.equal(decoder.tokens, chosen)
        idle = engine.decoder(Echo(kept), 2)
        idle.start_at(1, 4)
        idle.tokens.copy_(torch.tensor([3, 5]))
        idle.before()
        idle.step()
        torch.testing.assert_close(idle.logits, logits, atol=1e-4, rtol=1e-4)
        idle.tokens.copy_(torch.tensor([4, 6]))
        idle.before()
        idle.step()
        assert (idle.logits - logits).abs().max() > 1e-2
        for one in (idle, decoder):
            one.stop()
