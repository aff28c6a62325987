"""Where a method's attention spends its time, by kernels: attention itself, choosing what to attend, and torch's own (bookkeeping).

Durations are those of single kernels, launched one after the other by the host. In a captured step they overlap, and the gaps between them count.
"""

from collections.abc import Callable

import torch

#: Triton kernels of this layer by what they are for; whatever has another name is torch's.
ATTENTION = ("_attend", "_merge", "_append")
CHOICE = ("_scan", "_extend", "_row", "_weigh", "_token", "_select", "_least", "_quantise", "_probe", "_mean", "_column")
NAMES = ("attention_ms", "choice_ms", "torch_ms")
_REPEATS, _LISTED = 3, 6


def phases(attend: Callable[[], object], layers: int) -> dict[str, float | str]:
    """Milliseconds and launches per layer of ``attend``, which calls a method for ``layers`` layers, and its slowest kernels. Needs a GPU."""
    attend()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(_REPEATS):
            attend()
        torch.cuda.synchronize()
    return summed([(e.key, e.self_device_time_total, e.count) for e in profiler.key_averages() if e.self_device_time_total], _REPEATS * layers)


def summed(kernels: list[tuple[str, float, int]], calls: int) -> dict[str, float | str]:
    """Of (name, microseconds in all, launches) during ``calls`` calls."""
    kinds = {name: 0.0 for name in NAMES}
    for name, microseconds, _ in kernels:
        kind = "attention_ms" if name.startswith(ATTENTION) else "choice_ms" if name.startswith(CHOICE) else "torch_ms"
        kinds[kind] += microseconds / calls / 1e3
    longest = sorted(kernels, key=lambda kernel: -kernel[1])[:_LISTED]
    slowest = "; ".join(f"{_short(name)} {us / calls:.1f} us in {count / calls:g}" for name, us, count in longest)
    return kinds | {"launches": sum(count for *_, count in kernels) / calls, "slowest": slowest}


def _short(name: str) -> str:
    """Without the template arguments of torch's kernels, which say little and fill lines; their functor says what they do."""
    head, _, rest = name.removeprefix("void ").partition("<")
    inner = next((part for part in rest.replace("(", ",").replace("<", ",").split(",") if "unctor" in part or "lambda" in part), "")
    return f"{head.rpartition('::')[2]} {inner.rpartition('::')[2]}".strip()[:60]
