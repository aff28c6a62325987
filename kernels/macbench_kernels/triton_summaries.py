"""The kernels of ``summaries`` in Triton: one pass over the rows and columns that are needed, nothing else. No host synchronisation."""

import torch
import triton
import triton.language as tl

from macbench_kernels.cache import PagedKVCache
from macbench_kernels.dispatch import UnsupportedError
from macbench_kernels.triton_common import DTYPES, check, dependent_launch, follow, launch_options, on_device, processors

# Columns of a scoring program, and products that it holds.
_COLUMNS = 128
_PRODUCTS = 4096
_KEYS = 64
# Weighing programs per multiprocessor.
_SPLIT_PROGRAMS = 2


@triton.jit
def _extend_bounds(
    bounds_ptr, k_ptr, table_ptr, lengths_ptr, skipped_ptr, table_stride, head_stride, units,
    kv_heads: tl.constexpr, dim: tl.constexpr, page: tl.constexpr, size: tl.constexpr, rows: tl.constexpr, DIM: tl.constexpr,
    SKIPS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: one (request, KV head). bounds [B, Hkv, rows, units]."""
    follow(EARLY)
    pair = tl.program_id(0)
    request, kv_head = pair // kv_heads, pair % kv_heads
    position = tl.maximum(tl.load(lengths_ptr + request) - 1, 0)
    number = position
    if SKIPS:
        number = tl.maximum(position - tl.load(skipped_ptr + request), 0)
    page_id = tl.load(table_ptr + request * table_stride + position // page).to(tl.int64)
    channel = tl.arange(0, DIM)
    real = channel < dim
    key = tl.load(k_ptr + kv_head * head_stride.to(tl.int64) + (page_id * page + position % page) * dim + channel, mask=real, other=0.0)
    high_ptr = bounds_ptr + (pair.to(tl.int64) * rows + channel) * units + number // size
    old = real & (channel * 0 + number % size != 0)
    kept = key.to(tl.float32)  # comparing in float32 is exact
    high = tl.where(old, tl.maximum(tl.load(high_ptr, mask=old, other=0.0).to(tl.float32), kept), kept)
    tl.store(high_ptr, high.to(key.dtype), mask=real)
    if rows > dim:
        low_ptr = high_ptr + dim * units
        low = tl.where(old, tl.minimum(tl.load(low_ptr, mask=old, other=0.0).to(tl.float32), kept), kept)
        tl.store(low_ptr, low.to(key.dtype), mask=real)


def extend_bounds(bounds: torch.Tensor, cache: PagedKVCache, layer: int, size: int, skipped: torch.Tensor | None = None) -> None:
    """See summaries.extend_bounds: bounds [B, Hkv, d or 2d, units] contiguous, of the cache's dtype."""
    k = cache.keys(layer)
    batch, kv_heads, rows, units = bounds.shape
    if bounds.dtype != k.dtype or bounds.device != k.device or not bounds.is_contiguous():
        raise UnsupportedError(f"bounds of {bounds.dtype} on {bounds.device}: must be contiguous and like the cache, {k.dtype} on {k.device}")
    early = dependent_launch(k.device)
    with on_device(k):
        _extend_bounds[(batch * kv_heads,)](
            bounds, k, cache.block_table, cache.lengths, cache.lengths if skipped is None else skipped,
            cache.block_table.stride(0), k.stride(0), units,
            kv_heads=kv_heads, dim=k.shape[-1], page=k.shape[2], size=size, rows=rows, DIM=triton.next_power_of_2(k.shape[-1]),
            SKIPS=skipped is not None, EARLY=early, num_warps=1, **launch_options(early),
        )  # fmt: skip


@triton.jit
def _row_scores(
    weights_ptr, table_ptr, units_ptr, rows_ptr, out_ptr, width,
    kv_heads: tl.constexpr, taken: tl.constexpr, rows: tl.constexpr, members: tl.constexpr,
    LISTED: tl.constexpr, MEMBERS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS units of one (request, KV head). weights [B, Hkv, members, taken], table [B, Hkv, rows, width]."""
    follow(EARLY)
    pair = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    units = tl.load(units_ptr + pair // kv_heads)
    member = tl.arange(0, MEMBERS)
    acc = tl.zeros([MEMBERS, ROWS, COLUMNS], tl.float32)
    if tl.program_id(0) * COLUMNS < units:
        base = table_ptr + pair.to(tl.int64) * rows * width
        # A tile is read whole: a mask at ``units`` would split wide loads. What is too much of it is dropped below.
        inside = (column < width)[None, :]
        for block in tl.range(0, taken, ROWS, num_stages=STAGES):
            i = block + tl.arange(0, ROWS)
            row = i
            if LISTED:
                row = tl.load(rows_ptr + pair * taken + i, mask=i < taken, other=0)
            value = tl.load(base + row.to(tl.int64)[:, None] * width + column[None, :], mask=(i < taken)[:, None] & inside, other=0.0)
            wanted = (member < members)[:, None] & (i < taken)[None, :]
            weight = tl.load(weights_ptr + (pair * members + member)[:, None] * taken + i[None, :], mask=wanted, other=0.0)
            acc += weight[:, :, None] * value.to(tl.float32)[None, :, :]
    score = tl.where((column < units)[None, :], tl.sum(acc, 1), float("-inf"))
    target = (pair * members + member).to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out_ptr + target, score, mask=(member < members)[:, None] & (column < width)[None, :])


def row_scores(weights: torch.Tensor, table: torch.Tensor, units: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """See summaries.row_scores: weights [B, Hkv, M, r], table [B, Hkv, n, units] contiguous -> float32 [B, Hkv, M, units].

    Wide loads need units to be a multiple of 16, see summaries.rounded; up to a tile of columns behind a request's units is read for nothing.
    """
    batch, kv_heads, members, taken = weights.shape
    if table.dtype not in DTYPES or not table.is_contiguous() or not weights.device == table.device == units.device:
        raise UnsupportedError(f"table of {table.dtype} on {table.device}: must be float16, bfloat16 or float32, contiguous, on the queries' device")
    weights = weights.float().contiguous()
    width = table.shape[-1]
    out = torch.empty(batch, kv_heads, members, width, dtype=torch.float32, device=table.device)
    wide = triton.next_power_of_2(members)
    columns = _COLUMNS if wide <= _PRODUCTS // _COLUMNS else 16
    early = dependent_launch(table.device)
    with on_device(table):
        _row_scores[(triton.cdiv(width, columns), batch * kv_heads)](
            weights, table, units, units if rows is None else rows.int().contiguous(), out, width,
            kv_heads=kv_heads, taken=taken, rows=table.shape[2], members=members, LISTED=rows is not None, MEMBERS=wide,
            ROWS=max(1, _PRODUCTS // (wide * columns)), COLUMNS=columns, STAGES=3, EARLY=early, num_warps=4, **launch_options(early),
        )  # fmt: skip
    return out


@triton.jit
def _token_scores(
    q_ptr, k_ptr, table_ptr, lengths_ptr, out_ptr, scale, width, table_stride, head_stride,
    heads: tl.constexpr, group: tl.constexpr, dim: tl.constexpr, page: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK tokens of one (request, KV head). out [B, Hq, width]."""
    follow(EARLY)
    kv_heads: tl.constexpr = heads // group
    pair = tl.program_id(1)
    request, kv_head = pair // kv_heads, pair % kv_heads
    length = tl.load(lengths_ptr + request)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    member = tl.arange(0, GROUP)
    head = request * heads + kv_head * group + member
    real = member < group
    score = tl.full([BLOCK, GROUP], float("-inf"), tl.float32)
    if tl.program_id(0) * BLOCK < length:
        channel = tl.arange(0, DIM)
        q = tl.load(q_ptr + head[None, :] * dim + channel[:, None], mask=real[None, :] & (channel < dim)[:, None], other=0.0)
        seen = token < length
        page_id = tl.load(table_ptr + request * table_stride + token // page, mask=seen, other=0).to(tl.int64)
        k_at = k_ptr + kv_head * head_stride.to(tl.int64) + ((page_id * page + token % page) * dim)[:, None] + channel[None, :]
        k = tl.load(k_at, mask=seen[:, None] & (channel < dim)[None, :], other=0.0)
        score = tl.where(seen[:, None], tl.dot(k, q, input_precision="ieee") * scale, float("-inf"))
    tl.store(out_ptr + head.to(tl.int64)[None, :] * width + token[:, None], score, mask=real[None, :] & (token < width)[:, None])


def token_scores(q: torch.Tensor, cache: PagedKVCache, layer: int, scale: float, width: int) -> torch.Tensor:
    """See summaries.token_scores: q [B, Hq, d] -> float32 [B, Hq, width]."""
    k = cache.keys(layer)
    check(q, cache, layer)
    q = q.contiguous()
    batch, heads, dim = q.shape
    kv_heads = k.shape[0]
    out = torch.empty(batch, heads, width, dtype=torch.float32, device=q.device)
    block = _KEYS if q.element_size() == 2 else 16
    early = dependent_launch(q.device)
    with on_device(q):
        _token_scores[(triton.cdiv(width, block), batch * kv_heads)](
            q, k, cache.block_table, cache.lengths, out, scale, width, cache.block_table.stride(0), k.stride(0),
            heads=heads, group=heads // kv_heads, dim=dim, page=k.shape[2],
            GROUP=max(16, triton.next_power_of_2(heads // kv_heads)), DIM=triton.next_power_of_2(dim), BLOCK=block,
            EARLY=early, num_warps=4, **launch_options(early),
        )  # fmt: skip
    return out


@triton.jit
def _weigh_rows(
    weights_ptr, table_ptr, part_ptr, units, share,
    members: tl.constexpr, dim: tl.constexpr, MEMBERS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One program: ``share`` rows of one (request, KV head). weights [B * Hkv, members, units], part [splits, B * Hkv, members, dim]."""
    follow(EARLY)
    pair, split = tl.program_id(0), tl.program_id(1)
    member, channel = tl.arange(0, MEMBERS), tl.arange(0, DIM)
    real = member < members
    acc = tl.zeros([DIM, MEMBERS], tl.float32)
    begin = split * share
    for block in tl.range(begin, tl.minimum(begin + share, units), BLOCK, num_stages=STAGES):
        row = block + tl.arange(0, BLOCK)
        known = row < units
        weight = tl.load(weights_ptr + (pair * members + member)[None, :] * units + row[:, None], mask=known[:, None] & real[None, :], other=0.0)
        used = tl.max(tl.where(weight != 0, 1, 0), 1) > 0
        at = (pair.to(tl.int64) * units + row)[:, None] * dim + channel[None, :]
        value = tl.load(table_ptr + at, mask=used[:, None] & (channel < dim)[None, :], other=0.0)
        acc = tl.dot(tl.trans(value), weight.to(value.dtype), acc, input_precision="ieee")
    target = ((split * tl.num_programs(0) + pair) * members + member)[None, :] * dim + channel[:, None]
    tl.store(part_ptr + target, acc, mask=real[None, :] & (channel < dim)[:, None])


def weigh_rows(weights: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """See summaries.weigh_rows: weights [B, Hkv, M, units], table [B, Hkv, units, d] contiguous -> float32 [B, Hkv, M, d]."""
    batch, kv_heads, members, units = weights.shape
    dim = table.shape[-1]
    if table.dtype not in DTYPES or not table.is_contiguous() or weights.device != table.device:
        raise UnsupportedError(f"table of {table.dtype} on {table.device}: must be float16, bfloat16 or float32, contiguous, on the weights' device")
    weights = weights.float().contiguous()
    block = 64 if table.element_size() == 2 else 16
    aim = triton.cdiv(_SPLIT_PROGRAMS * processors(table.device), batch * kv_heads)
    share = triton.cdiv(triton.cdiv(units, min(aim, triton.cdiv(units, block))), block) * block
    splits = triton.cdiv(units, share)
    part = torch.empty(splits, batch, kv_heads, members, dim, dtype=torch.float32, device=table.device)
    early = dependent_launch(table.device)
    with on_device(table):
        _weigh_rows[(batch * kv_heads, splits)](
            weights, table, part, units, share,
            members=members, dim=dim, MEMBERS=max(16, triton.next_power_of_2(members)), DIM=triton.next_power_of_2(dim), BLOCK=block,
            STAGES=3, EARLY=early, num_warps=4, **launch_options(early),
        )  # fmt: skip
    return part.sum(0)
