"""Where the time of a decode step goes, by leaving parts out: the step, the step without attention, the matrix products alone.

Kernels overlap (each may start while its predecessor ends), so their own durations do not add up; differences of whole steps do.
"""

from collections.abc import Callable
from statistics import median

import torch

from macbench.engine import Engine
from macbench.methods.base import Method

_REPEATS = 8


class Idle(Method):
    """No attention at all: the queries are the output."""

    def attend(self, layer, q_pre, q, cache):
        return q


@torch.inference_mode()
def breakdown(engine: Engine, decoder) -> dict[str, float | None]:
    """Milliseconds of device time per step. ``decoder`` is at work and has room for a few steps more; the engine's pool has a few pages left."""
    names = ("attention_ms", "products_ms", "rest_ms")
    products = getattr(engine.forward, "products", None)
    if products is None or not torch.cuda.is_available():
        return dict.fromkeys(names)
    batch = decoder.shape.batch
    idle = engine.decoder(Idle(), batch)
    idle.start_at(1, _REPEATS)
    graph = torch.cuda.CUDAGraph()
    products(batch)
    with torch.cuda.graph(graph):
        products(batch)
    whole, rest, alone = _milliseconds(decoder.step, decoder.before), _milliseconds(idle.step, idle.before), _milliseconds(graph.replay)
    idle.stop()
    return dict(zip(names, (whole - rest, alone, rest - alone), strict=True))


def _milliseconds(step: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    times = []
    for _ in range(_REPEATS):
        before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return median(times[1:])
