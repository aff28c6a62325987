"""A few MAC steps and a full attention on small shapes, for compute-sanitizer (one GPU):

compute-sanitizer --tool memcheck  python kernels/benchmarks/sanitize.py
compute-sanitizer --tool racecheck python kernels/benchmarks/sanitize.py
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from macbench_kernels import MacParams, PagedKVCache, PagePool, Ring, kernels

torch.manual_seed(0)
BATCH, KV_HEADS, HEADS, DIM, SCALE = 2, 2, 8, 64, 0.125
NEW = {"device": "cuda", "dtype": torch.bfloat16}

layer = kernels("triton", "cuda")
cache = PagedKVCache(PagePool(1, KV_HEADS, DIM, 40, 16, NEW["dtype"], NEW["device"]), BATCH)
cache.extend(150)
cache.append(0, *(torch.randn(BATCH, KV_HEADS, 150, DIM, **NEW) for _ in range(2)))
ring = Ring.create(BATCH, HEADS, 32, DIM, NEW["dtype"], NEW["device"])
for part in (ring.q, ring.out, ring.lse):
    part.normal_()
for sink in (0, 4, 4):
    cache.extend(1)
    cache.append(0, *(torch.randn(BATCH, KV_HEADS, 1, DIM, **NEW) for _ in range(2)))
    q = torch.randn(BATCH, HEADS, DIM, **NEW)
    q_pre = ring.q[:, :, 5] + 0.1 * q
    q_pre[:, ::3] = 5 * q[:, ::3]  # these miss
    step = layer.mac_step(q_pre, q, cache, 0, ring, MacParams(0.45 * (2 * DIM) ** 0.5, 16, sink), SCALE)
    print(f"sink {sink}: {int(step.hit.sum())} of {BATCH * HEADS} heads hit, finite: {bool(torch.isfinite(step.out).all())}")
print("full attention, finite:", bool(torch.isfinite(layer.full(q, cache, 0, SCALE)).all()))
