"""The matrix products of decode layers (shapes of Llama-3.1-8B, bf16) as one captured chain, beside torch's: microseconds per layer.

python kernels/benchmarks/linear.py [sweep]      sweep: also other tiles than the default, one product at a time
"""

import sys
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from macbench_kernels.triton_linear import linear, scale

LAYERS, HIDDEN, WIDE, QKV, EPS = 8, 4096, 14336, 6144, 1e-5
BYTES = 2 * HIDDEN * (QKV + HIDDEN + 3 * WIDE)
NEW = {"device": "cuda", "dtype": torch.bfloat16}
TILES = {
    "qkv": [(16, 256, 4, 2), (16, 256, 4, 4), (16, 512, 3, 2), (32, 256, 4, 4), (16, 128, 6, 2)],
    "out": [(16, 256, 4, 2), (16, 512, 3, 2), (16, 128, 8, 2), (32, 128, 6, 4)],
    "gate_up": [(16, 256, 3, 2), (16, 256, 4, 4), (32, 256, 3, 4), (32, 128, 5, 4), (16, 128, 5, 2), (64, 64, 5, 4)],
    "down": [(16, 256, 4, 2), (16, 512, 3, 2), (16, 512, 4, 4), (16, 256, 6, 2), (32, 256, 4, 4)],
}
AHEAD = (0, 2, 8, 32)


def microseconds(call, rounds: int = 15) -> float:
    """Median time per layer of a captured chain."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / LAYERS)
    return median(times[2:])


weights = [
    {"qkv": torch.randn(QKV, HIDDEN, **NEW), "out": torch.randn(HIDDEN, HIDDEN, **NEW), "gate_up": torch.randn(2 * WIDE, HIDDEN, **NEW),
     "down": torch.randn(HIDDEN, WIDE, **NEW)}
    for _ in range(LAYERS)
]  # fmt: skip
gain = torch.ones(HIDDEN, **NEW)


def ours(rows: int, knobs: dict):
    x = torch.randn(rows, HIDDEN, **NEW)

    def run():
        hidden, scaled = x, scale(x, gain)
        for w in weights:
            qkv = linear(scaled, w["qkv"], eps=EPS, **knobs.get("qkv", {}))
            hidden, scaled = linear(qkv[:, :HIDDEN].contiguous(), w["out"], residual=hidden, gain=gain, **knobs.get("out", {}))
            gates = linear(scaled, w["gate_up"], eps=EPS, gated=True, **knobs.get("gate_up", {}))
            hidden, scaled = linear(gates, w["down"], residual=hidden, gain=gain, **knobs.get("down", {}))

    return run


def torchs(rows: int):
    x = torch.randn(rows, HIDDEN, **NEW)
    product = torch.nn.functional.linear

    def run():
        for w in weights:
            qkv = product(x, w["qkv"])
            middle = product(qkv[:, :HIDDEN].contiguous(), w["out"])
            product(product(middle, w["gate_up"])[:, :WIDE].contiguous(), w["down"])

    return run


def show(label: str, call) -> float:
    try:
        time = microseconds(call)
    except Exception as error:  # a tile that does not fit
        print(f"{label:<44} {str(error).splitlines()[0][:80]}", flush=True)
        return float("inf")
    print(f"{label:<44} {time:8.2f} us a layer  {BYTES / time / 1e6:5.2f} TB/s", flush=True)
    return time


for rows in (1, 4, 16, 64):
    show(f"{rows} rows, torch (products alone)", torchs(rows))
    if rows <= 16:
        show(f"{rows} rows, linear (norms, SwiGLU, residuals)", ours(rows, {}))
if "sweep" in sys.argv:
    best: dict = {}
    for ahead in AHEAD:
        show(f"ahead {ahead}", ours(1, {name: {"ahead": ahead} for name in TILES}))
    for name, tiles in TILES.items():
        found = {}
        for tile in tiles:
            knobs = dict(zip(("block_n", "block_k", "stages", "warps"), tile, strict=True))
            found[show(f"{name} {tile}", ours(1, best | {name: knobs}))] = knobs
        best[name] = found[min(found)]
    show("best of each", ours(1, best))
    for ahead in AHEAD:
        show(f"best of each, ahead {ahead}", ours(1, {name: knobs | {"ahead": ahead} for name, knobs in best.items()}))
    print(best)
