"""Attention probabilities in Triton: sums over prompt queries, and those of selected tokens in a decode step. Keys are rows, queries columns."""

import torch
import triton
import triton.language as tl

from macbench_kernels.cache import PagedKVCache
from macbench_kernels.triton_common import LOG2E, check, check_heads, launchable, on_device


@triton.jit
def _keys(k_ptr, table_ptr, token, wanted, dim: tl.constexpr, page: tl.constexpr, DIM: tl.constexpr):
    """[BLOCK, DIM] of one KV head of one request."""
    page_id = tl.load(table_ptr + token // page, mask=wanted, other=0).to(tl.int64)
    channel = tl.arange(0, DIM)[None, :]
    return tl.load(k_ptr + ((page_id * page + token % page) * dim)[:, None] + channel, mask=wanted[:, None] & (channel < dim), other=0.0)


@triton.jit
def _column_sums(
    q_ptr, k_ptr, table_ptr, lse_ptr, sums_ptr, first, n, head_stride, scale,
    group: tl.constexpr, dim: tl.constexpr, page: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: a block of keys for one query head, over all queries that see any of them. q [Hq, n, dim], lse [Hq, n], sums [Hq, first + n]."""
    start, head = tl.program_id(0) * BLOCK, tl.program_id(1)
    key = start + tl.arange(0, BLOCK)
    base = (head // group) * head_stride.to(tl.int64)
    k = _keys(k_ptr + base, table_ptr, key, key < first + n, dim, page, DIM)
    channel = tl.arange(0, DIM)[:, None]
    row = head.to(tl.int64) * n
    sums = tl.zeros([BLOCK], tl.float32)
    for at in tl.range(tl.maximum(start - first, 0), n, QUERIES, num_stages=STAGES):
        query = at + tl.arange(0, QUERIES)
        q = tl.load(q_ptr + (row + query)[None, :] * dim + channel, mask=(query < n)[None, :] & (channel < dim), other=0.0)
        lse = tl.load(lse_ptr + row + query, mask=query < n, other=0.0) * LOG2E
        p = tl.exp2(tl.dot(k, q, input_precision="ieee") * scale - lse[None, :])
        sums += tl.sum(tl.where((key[:, None] <= first + query[None, :]) & (query < n)[None, :], p, 0.0), 1)
    tl.store(sums_ptr + head.to(tl.int64) * (first + n) + key, sums, mask=key < first + n)


def column_sums(q: torch.Tensor, cache: PagedKVCache, layer: int, first: int, lse: torch.Tensor, scale: float, request: int = 0) -> torch.Tensor:
    """See scores.column_sums; float32 [Hq, first + n]."""
    keys = cache.keys(layer)
    launchable(q, {"cache": keys, "block table": cache.block_table})
    check_heads(q[:, :, 0], keys)
    heads, n, dim = q.shape[1:]
    sums = torch.empty(heads, first + n, dtype=torch.float32, device=q.device)
    half = q.element_size() == 2
    block = 128 if half else 16
    with on_device(q):
        _column_sums[(triton.cdiv(first + n, block), heads)](
            q[0].contiguous(), keys, cache.block_table[request], lse[0].float().contiguous(), sums, first, n, keys.stride(0), scale * LOG2E.value,
            group=heads // keys.shape[0], dim=dim, page=keys.shape[2], DIM=triton.next_power_of_2(dim), BLOCK=block, QUERIES=64 if half else 32,
            STAGES=3, num_warps=4,
        )  # fmt: skip
    return sums


@triton.jit
def _probabilities(
    q_ptr, k_ptr, table_ptr, ids_ptr, counts_ptr, lse_ptr, out_ptr, scale, width, table_stride, head_stride,
    heads: tl.constexpr, sets: tl.constexpr, kv_heads: tl.constexpr, dim: tl.constexpr, page: tl.constexpr,
    COLUMNS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a block of places of one set. ids [B * R, width], out [B * Hq, width]."""
    item = tl.program_id(1)
    columns: tl.constexpr = heads // sets
    request, one = item // sets, item % sets
    count = tl.load(counts_ptr + item)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    listed = place < count
    column, channel = tl.arange(0, COLUMNS), tl.arange(0, DIM)[:, None]
    head = request * heads + one * columns + column
    real = (column < columns)[None, :]
    p = tl.zeros([BLOCK, COLUMNS], tl.float32)
    if tl.program_id(0) * BLOCK < count:
        token = tl.load(ids_ptr + item.to(tl.int64) * width + place, mask=listed, other=0)
        base = (one * kv_heads // sets) * head_stride.to(tl.int64)
        k = _keys(k_ptr + base, table_ptr + request * table_stride, token, listed, dim, page, DIM)
        q = tl.load(q_ptr + head[None, :] * dim + channel, mask=real & (channel < dim), other=0.0)
        lse = tl.load(lse_ptr + head, mask=column < columns, other=0.0) * LOG2E
        p = tl.where(listed[:, None], tl.exp2(tl.dot(k, q, input_precision="ieee") * scale - lse[None, :]), 0.0)
    tl.store(out_ptr + head.to(tl.int64)[None, :] * width + place[:, None], p, mask=real & (place < width)[:, None])


def probabilities(
    q: torch.Tensor, cache: PagedKVCache, layer: int, ids: torch.Tensor, counts: torch.Tensor, lse: torch.Tensor, scale: float
) -> torch.Tensor:
    """See scores.probabilities; float32 [B, Hq, n]. No host synchronisation."""
    keys = cache.keys(layer)
    check(q, cache, layer)
    batch, heads, dim = q.shape
    sets, width = ids.shape[1:]
    out = torch.empty(batch, heads, width, dtype=torch.float32, device=q.device)
    block = 64 if q.element_size() == 2 else 16
    with on_device(q):
        _probabilities[(triton.cdiv(width, block), batch * sets)](
            q.contiguous(), keys, cache.block_table, ids.contiguous(), counts.contiguous(), lse.float().contiguous(), out, scale * LOG2E.value,
            width, cache.block_table.stride(0), keys.stride(0),
            heads=heads, sets=sets, kv_heads=keys.shape[0], dim=dim, page=keys.shape[2],
            COLUMNS=max(16, triton.next_power_of_2(heads // sets)), DIM=triton.next_power_of_2(dim), BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out
