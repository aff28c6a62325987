"""MAC steps, attention over spans, full attention and the match on small shapes, for compute-sanitizer (one GPU):

compute-sanitizer --tool memcheck  python kernels/benchmarks/sanitize.py
compute-sanitizer --tool racecheck python kernels/benchmarks/sanitize.py
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from macbench_kernels import MacParams, PagedKVCache, PagePool, Ring, kernels

KV_HEADS, LENGTH = 2, 150
# TRITON_INTERPRET=1 tries the script itself out, without a sanitizer, on a CPU.
NEW = {"device": "cpu", "dtype": torch.float32} if os.environ.get("TRITON_INTERPRET") == "1" else {"device": "cuda", "dtype": torch.bfloat16}
layer = kernels("triton", NEW["device"])


def report(name: str, *results: torch.Tensor) -> None:
    print(f"{name}: finite {all(bool(torch.isfinite(x).all()) for x in results)}", flush=True)


def filled(dim: int, page: int, batch: int) -> PagedKVCache:
    cache = PagedKVCache(PagePool(1, KV_HEADS, dim, batch * (LENGTH // page + 6), page, **{k: NEW[k] for k in ("dtype", "device")}), batch)
    grow(cache, LENGTH)
    return cache


def grow(cache: PagedKVCache, tokens: int) -> None:
    cache.extend(tokens)
    cache.append(0, *(torch.randn(cache.batch, KV_HEADS, tokens, cache.pool.head_dim, **NEW) for _ in range(2)))


def mac_steps(cache: PagedKVCache, group: int, window: int) -> None:
    """Steps with and without sinks and a bound on chains, and the match alone; some heads hit, some miss."""
    heads, dim = KV_HEADS * group, cache.pool.head_dim
    ring = Ring.create(cache.batch, heads, window, dim, NEW["dtype"], NEW["device"])
    for part in (ring.q, ring.out, ring.lse):
        part.normal_()
    radius = 0.45 * (2 * dim) ** 0.5
    for sink, max_chain in ((0, None), (4, None), (4, 2)):
        grow(cache, 1)
        q = torch.randn(cache.batch, heads, dim, **NEW)
        q_pre = ring.q[:, :, 5] + 0.1 * q
        q_pre[:, ::3] = 5 * q[:, ::3]  # these miss
        found = layer.match(q_pre, ring, cache.lengths - 1, radius, sink + 16, max_chain)
        step = layer.mac_step(q_pre, q, cache, 0, ring, MacParams(radius, 16, sink, 0, max_chain), dim**-0.5)
        report(f"group {group}, d {dim}, K {window}, sink {sink}, max_chain {max_chain}: {int(step.hit.sum())} of {step.hit.numel()} hit", step.out)
        assert torch.equal(found.hit, step.looked_up)


def spans(cache: PagedKVCache, group: int) -> None:
    """Attention over several spans: all heads alike, heads that differ, and heads that leave a gap and one that is empty."""
    heads, dim = KV_HEADS * group, cache.pool.head_dim
    head = torch.arange(heads, device=NEW["device"]).expand(cache.batch, heads)
    alike = torch.stack([0 * head + 3, 0 * head + 77])
    slanted = torch.stack([80 + head, 0 * head + 110])
    gap = torch.stack([90 * (head % 2), 90 * (head % 2) + 20])
    gap[1, :, -1] = gap[0, :, -1]
    q = torch.randn(cache.batch, heads, dim, **NEW)
    state = layer.attend(q, cache, 0, torch.stack([alike, slanted, gap]).int(), dim**-0.5)
    report(f"group {group}, d {dim}: three spans", state.out, state.lse[:2])
    report(f"group {group}, d {dim}: full attention", layer.full(q, cache, 0, dim**-0.5))


torch.manual_seed(0)
# (group, head_dim, ring, page size, batch): powers of two, and an odd group with a ring that is no multiple of a tile.
for group, dim, window, page, batch in ((4, 64, 32, 16, 2), (3, 96, 77, 5, 1)):
    cache = filled(dim, page, batch)
    mac_steps(cache, group, window)
    spans(cache, group)
