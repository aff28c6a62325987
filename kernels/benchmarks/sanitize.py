"""Every Triton kernel on small shapes, for compute-sanitizer (one GPU):

compute-sanitizer --tool memcheck  python kernels/benchmarks/sanitize.py
compute-sanitizer --tool racecheck python kernels/benchmarks/sanitize.py
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from macbench_kernels import Codes, MacParams, PagedKVCache, PagePool, Ring, Scheme, kernels, triton_linear, triton_rope, triton_rows

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


def whole(*sizes: int) -> torch.Tensor:
    return torch.zeros(*sizes, dtype=torch.int32, device=NEW["device"])


def sets(cache: PagedKVCache, group: int) -> None:
    """Attention to lists of tokens and of pages, per KV head and per query head, with scores; sums of probabilities and their least."""
    heads, dim, batch, length = KV_HEADS * group, cache.pool.head_dim, cache.batch, cache.host_lengths[0]
    q = torch.randn(batch, heads, dim, **NEW)
    for rows, unit, most in ((KV_HEADS, 1, 70), (heads, 1, 33), (KV_HEADS, 4, length // 4 + 1)):
        ids = torch.stack([torch.randperm(most) for _ in range(batch * rows)]).view(batch, rows, most).int().to(NEW["device"])
        counts = whole(batch, rows) + most - torch.arange(rows, device=NEW["device"], dtype=torch.int32)
        scores = torch.zeros(batch, heads, most * unit, device=NEW["device"])
        state = layer.attend_selected(q, cache, 0, ids, counts, dim**-0.5, unit, scores=scores)
        report(f"group {group}, d {dim}: {rows} sets of {most} x {unit}", state.out)
        if rows == KV_HEADS and unit == 1:
            place, total = torch.zeros(batch, rows, dtype=torch.int64, device=NEW["device"]), torch.zeros(batch, rows, most, device=NEW["device"])
            layer.least_attended(scores, state.lse, ids, counts, cache.lengths, 5, place, total)
            report("least attended", total)
    prompt = torch.randn(1, heads, 40, dim, **NEW)
    lse = layer.causal(prompt, cache, 0, length - 40, dim**-0.5).lse
    report("column sums", layer.column_sums(prompt, cache, 0, length - 40, lse, dim**-0.5))
    report("token scores", layer.token_scores(q, cache, 0, dim**-0.5, length))


def summaries(cache: PagedKVCache, group: int) -> None:
    """Bounds of pages, their scores, and weighted sums of rows."""
    dim, batch, units = cache.pool.head_dim, cache.batch, cache.host_lengths[0] // 4 + 1
    bounds = torch.zeros(batch, KV_HEADS, 2 * dim, units, **NEW)
    layer.extend_bounds(bounds, cache, 0, 4)
    scores = layer.row_scores(torch.randn(batch, KV_HEADS, group, 2 * dim, device=NEW["device"]), bounds, whole(batch) + units)
    listed = torch.randint(0, 2 * dim, (batch, KV_HEADS, 9), dtype=torch.int32, device=NEW["device"])
    layer.row_scores(torch.randn(batch, KV_HEADS, group, 9, device=NEW["device"]), bounds, whole(batch) + units, listed)
    weighed = layer.weigh_rows(scores.softmax(-1), torch.randn(batch, KV_HEADS, units, dim, **NEW))
    report(f"group {group}, d {dim}: summaries of {units} pages", scores, weighed)


def choosing(cache: PagedKVCache, group: int) -> None:
    """The best of rows that one program holds and of longer ones; strong channels, probabilities of units of tokens and the tokens of the best."""
    dim, batch, ids = cache.pool.head_dim, cache.batch, whole(cache.batch, KV_HEADS, 9)
    weights, rows = layer.strong_channels(torch.randn(batch, KV_HEADS * group, dim, **NEW), KV_HEADS, dim // 2, True)
    report(f"group {group}, d {dim}: strong channels", weights, rows)
    for units in (70, 20000):
        scores = torch.randn(batch, KV_HEADS, group, units, device=NEW["device"])
        mean = layer.mean_probability(scores, whole(batch) + 3 * units - 1, 3)
        counts = whole(batch, KV_HEADS) + 30
        for newest in (True, False):
            layer.top_tokens(mean, whole(batch) + 3 * units - 1, counts, 3, 40, newest, ids, whole(batch) + 5)
        layer.top(scores, 50, scores > -1)
        report(f"group {group}, d {dim}: the best of {units} units", mean)


def quantised(cache: PagedKVCache, group: int) -> None:
    """Rows become codes of 2, 4 and 8 bits, and are attended to."""
    dim, batch, length = cache.pool.head_dim, cache.batch, cache.host_lengths[0]
    q = torch.randn(batch, KV_HEADS * group, dim, **NEW)
    for k_scheme, v_scheme in (*((Scheme(bits, 32, 1), Scheme(bits, 1, 32)) for bits in (2, 4)), (Scheme(8, 1, dim, symmetric=True),) * 2):
        room = (length + 32, dim, lambda name, *size, dtype: torch.zeros(size, dtype=dtype, device=NEW["device"]))
        k, v = (Codes.create(scheme, batch, KV_HEADS, *room) for scheme in (k_scheme, v_scheme))
        for request in range(batch):
            k.write(request, 0, cache.stacked(slice(0, 1), request, 0, length // 32 * 32, 0)[0])
            v.write(request, 0, cache.stacked(slice(0, 1), request, 0, length - 20, 1)[0])
        layer.quantise_rows(v, cache.values(0), cache, whole(batch) + length - 20)
        state = layer.attend_quantised(q, cache, 0, k, v, whole(batch) + length // 32 * 32, whole(batch) + length - 19, dim**-0.5)
        report(f"group {group}, d {dim}: {k_scheme.bits} bits", state.out)


def between(cache: PagedKVCache, group: int) -> None:
    """What lies between the attentions: products of few rows with and without a norm, a gate and a residual, RoPE, RMS norm, SwiGLU."""
    heads, dim, batch = KV_HEADS * group, cache.pool.head_dim, cache.batch
    width, hidden = heads * dim, 3 * heads * dim // 2
    x, gain = torch.randn(batch, width, **NEW), torch.randn(width, **NEW)
    weight = {n: 0.1 * torch.randn(n, k, **NEW) for n, k in ((width + 2 * KV_HEADS * dim, width), (2 * hidden, width), (width, hidden))}
    qkv = triton_linear.linear(triton_linear.scale(x, gain), weight[width + 2 * KV_HEADS * dim], eps=1e-5)
    angles = torch.randn(cache.host_lengths[0] + 8, dim // 2, device=NEW["device"])
    grow(cache, 1)
    q_pre, q = triton_rope.rotate_append(qkv, angles.cos(), angles.sin(), cache, 0, heads)
    gates = triton_linear.linear(x, weight[2 * hidden], gated=True)
    out, scaled = triton_linear.linear(gates, weight[width], residual=x, gain=gain)
    report(f"group {group}, d {dim}: between the attentions", q_pre, q, out, *scaled, triton_rows.rms_norm(x, gain, 1e-5), triton_rows.swiglu(qkv))


torch.manual_seed(0)
# (group, head_dim, ring, page size, batch): powers of two, and an odd group with a ring that is no multiple of a tile.
for group, dim, window, page, batch in ((4, 64, 32, 16, 2), (3, 96, 77, 5, 1)):
    cache = filled(dim, page, batch)
    mac_steps(cache, group, window)
    spans(cache, group)
    for kernel in (sets, summaries, choosing, quantised, between):
        kernel(cache, group)
