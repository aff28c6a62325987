"""Timing of rounds (one call per layer): CUDA-graph replay, eager CUDA, or the host clock on a CPU."""

from collections.abc import Callable
from functools import lru_cache
from statistics import quantiles
from time import perf_counter

import torch


def timed(count: int, warm: int) -> range:
    """Which of ``count`` rounds are timed: all but the first ``warm``, and the last in any case."""
    return range(min(warm, count - 1), count)


def rounds(
    run: Callable[[], object], before: Callable[[int], None], count: int, calls: int, mode: str, warm: int, after: Callable = lambda i, result: None
) -> dict:
    """Milliseconds per call over the timed ones of ``count`` rounds of ``calls`` calls each: median, 10th and 90th percentile.

    ``before(i)`` loads the inputs of round i, outside the clock. ``mode``: 'graph' captures ``run`` once and replays it, 'eager' calls it,
    'cpu' uses the host clock. ``after(i, result)`` sees what ``run`` returned in the timed round i, outside the clock and before the next
    round; of a graph that is always the captured result, whose tensors every replay fills anew.
    """
    chosen = timed(count, warm)
    if mode == "cpu":
        times = []
        for i in range(count):
            before(i)
            began = perf_counter()
            result = run()
            times.append((perf_counter() - began) * 1e3 / calls)
            if i in chosen:
                after(i, result)
        return _spread([times[i] for i in chosen])
    if mode == "graph":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()

        def run():
            graph.replay()
            return captured

    _wake()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for i, (start, end) in enumerate(events):
        before(i)
        start.record()
        result = run()
        end.record()
        if i in chosen:
            after(i, result)
    torch.cuda.synchronize()
    return _spread([events[i][0].elapsed_time(events[i][1]) / calls for i in chosen])


def _wake(milliseconds: float = 60.0) -> None:
    """Keep the GPU copying for a while: after the host's preparations its clocks are low, which short measurements would show."""
    source = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    for _ in range(int(milliseconds / 0.18)):
        target.copy_(source)


def _spread(times: list[float]) -> dict:
    times = sorted(times)
    if len(times) < 2:
        return {"time_ms": times[0], "time_p10_ms": times[0], "time_p90_ms": times[0], "rounds": 1}
    tenths = quantiles(times, n=10, method="inclusive")
    return {"time_ms": quantiles(times, n=2, method="inclusive")[0], "time_p10_ms": tenths[0], "time_p90_ms": tenths[-1], "rounds": len(times)}


@lru_cache
def copy_bandwidth(device: str) -> float | None:
    """Bytes per second, read plus written, of a large device-to-device copy: the measured ceiling, once per process. None on a CPU."""
    if device != "cuda":
        return None
    _wake()
    source = torch.empty(2 << 30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    spread = rounds(lambda: target.copy_(source), lambda i: None, 12, 1, "eager", 2)
    return 2 * source.numel() / (spread["time_ms"] * 1e-3)
