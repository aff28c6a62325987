"""Where the time of a decode step goes, from the profiler's kernel records."""

from collections.abc import Callable

import torch

# Parts of kernel names; what matches neither is the rest (norms outside of products, sampling, bookkeeping).
_ATTENTION = ("_attend", "_merge_pieces", "_scan", "_append", "_report", "Decode", "Prefill", "Persistent", "flash", "fmha", "attention")
_PRODUCTS = ("_linear", "gemm", "gemv", "nvjet", "cutlass", "cublas", "splitK")


def breakdown(step: Callable[[], None], count: int) -> dict[str, float | None]:
    """Milliseconds per step that kernels of each kind ran; with dependent launches they overlap a little, so the sum may exceed the step's time."""
    names = ("attention_ms", "products_ms", "rest_ms")
    if not torch.cuda.is_available():
        return dict.fromkeys(names)
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(count):
            step()
        torch.cuda.synchronize()
    sums = dict.fromkeys(names, 0.0)
    for event in profiler.key_averages():
        kind = "rest_ms"
        # _rotate_append belongs to the rest: it is what the attention is given.
        if any(part in event.key for part in _ATTENTION) and "_rotate" not in event.key:
            kind = "attention_ms"
        elif any(part in event.key for part in _PRODUCTS):
            kind = "products_ms"
        sums[kind] += event.self_device_time_total / 1e3 / count
    return sums if sum(sums.values()) else dict.fromkeys(names)
