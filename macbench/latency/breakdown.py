"""Where the time of a decode step goes, by leaving parts out: the step, the step without attention, the matrix products alone.

Kernels overlap (each may start while its predecessor ends), so their own durations do not add up; differences of whole steps do. The step
without attention gets the outputs of a real one instead, so that its layers see the same numbers and a mixture of experts asks the same experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from macbench.engine import Engine
from macbench.methods.base import Method

# Rounds of each of the three, which take turns; steps in a row of a round.
_ROUNDS, _STEPS = 3, 4
# Decode steps that a breakdown takes: one of them shows the outputs.
USED = _ROUNDS * _STEPS + 1
# The device waits this long before the clock starts, so that the host's launches are ahead of it: some 10 ms.
_WAIT_CYCLES = 20_000_000
Measure = Callable[[Callable[[], object]], float]


@dataclass
class Echo(Method):
    """No attention at all: the output of layer i is ``outputs[i]`` [B, Hq, d]."""

    outputs: list[torch.Tensor]

    def attend(self, layer, q_pre, q, cache):
        return self.outputs[layer]


@torch.inference_mode()
def breakdown(engine: Engine, decoder, step_ms: float, feed: Callable[[], None] = lambda: None) -> dict[str, float | None]:
    """``attention_ms``, ``products_ms`` and ``rest_ms`` add up to ``step_ms``, the host's time for a step; ``device_ms``: the device's.

    ``decoder`` is at work and has room for ``USED`` steps more, before each of which ``feed`` is called; the engine's pool has a few pages left.
    Products of a mixture of experts are part of the rest. None where steps are not captured, or there is no way to run the products alone.
    """
    products = getattr(engine.forward, "products", None)
    if products is None or not engine.captures:
        return dict.fromkeys(("attention_ms", "products_ms", "rest_ms", "device_ms"))
    batch = decoder.shape.batch

    def step():
        feed()
        decoder.before()
        decoder.step()

    feed()
    idle = engine.decoder(Echo(outputs(decoder)), batch)
    tokens = decoder.tokens.clone()
    idle.start_at(1, USED)
    products(batch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        products(batch)

    def without():
        idle.tokens.copy_(tokens)
        idle.before()
        idle.step()

    found = parts(step, without, graph.replay, device_ms, step_ms)
    idle.stop()
    return found


def outputs(decoder) -> list[torch.Tensor]:
    """A step, launched anew, and the attention output [B, Hq, d] of each of its layers."""
    kept: list[torch.Tensor] = []

    def attend(layer, q_pre, q):
        kept.append(decoder.attend(layer, q_pre, q).clone())
        return kept[-1]

    decoder.before()
    decoder.launch(attend)
    return kept


def parts(step: Callable, without: Callable, products: Callable, measure: Measure, step_ms: float) -> dict[str, float | None]:
    """See ``breakdown``: the three in turns, medians over rounds. ``measure(run)`` -> milliseconds of a run.

    A difference below zero says that the device did not hold still: no breakdown then.
    """
    times = [[measure(run) for run in (step, without, products)] for _ in range(_ROUNDS)]
    whole, idle, alone = (median(column) for column in zip(*times, strict=True))
    attention, rest = whole - idle, step_ms - (whole - idle) - alone
    if attention < 0 or rest < 0:
        attention = alone = rest = None
    return {"attention_ms": attention, "products_ms": alone, "rest_ms": rest, "device_ms": whole}


def device_ms(run: Callable[[], object]) -> float:
    """Milliseconds of the device for each of several runs in a row, between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_WAIT_CYCLES)
    start.record()
    for _ in range(_STEPS):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / _STEPS
