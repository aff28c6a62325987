"""Products of a decode step (shapes of Llama-3.1-8B, bf16) beside torch's: microseconds and bandwidth by graph replay, weights larger than the L2.

python kernels/benchmarks/linear.py [sweep]      sweep: also other tiles than the default
"""

import sys
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from macbench_kernels.triton_linear import linear

# name: outputs, inputs, gated, norm
SHAPES = {
    "qkv": (6144, 4096, False, True), "out": (4096, 4096, False, False), "gate_up": (14336, 4096, True, True),
    "down": (4096, 14336, False, False), "head": (128256, 4096, False, True),
}  # fmt: skip
TILES = [
    (16, 256, 4, 4),
    (16, 512, 3, 4),
    (16, 128, 6, 4),
    (16, 256, 4, 2),
    (32, 256, 3, 4),
    (32, 128, 5, 4),
    (64, 128, 4, 4),
    (64, 64, 6, 4),
    (64, 256, 3, 8),
]
NEW = {"device": "cuda", "dtype": torch.bfloat16}


def microseconds(calls, rounds: int = 15) -> float:
    """Median time of one call out of a graph of all of them."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return median(times[2:])


for name, (n, k, gated, norm) in SHAPES.items():
    size = n * k * 2 * (1 + gated)
    weights = [torch.randn(n * (1 + gated), k, **NEW) for _ in range(max(2, (600 << 20) // size))]
    gain = torch.ones(k, **NEW) if norm else None
    for rows in (1, 4, 16, 64):
        x = torch.randn(rows, k, **NEW)
        residual = None if norm else torch.randn(rows, n, **NEW)

        def show(label, calls, size=size, rows=rows, name=name):
            try:
                time = microseconds(calls)
                print(f"{name:<8} {rows:>3} rows  {label:<24} {time:8.2f} us  {size / time / 1e6:5.2f} TB/s", flush=True)
            except Exception as error:  # a tile that does not fit
                print(f"{name:<8} {rows:>3} rows  {label:<24} {str(error).splitlines()[0][:80]}", flush=True)

        show("torch", [lambda w=w: torch.nn.functional.linear(x, w) for w in weights])
        show("linear", [lambda w=w: linear(x, w, residual=residual, gain=gain, gated=gated) for w in weights])
        for bn, bk, stages, warps in TILES if "sweep" in sys.argv and rows in (1, 64) else ():
            knobs = {"block_n": bn, "block_k": bk, "stages": stages, "warps": warps}
            show(str((bn, bk, stages, warps)), [lambda w=w: linear(x, w, residual=residual, gain=gain, gated=gated, **knobs) for w in weights])
