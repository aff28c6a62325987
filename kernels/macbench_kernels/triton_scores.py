"""Attention probabilities in Triton: sums over prompt queries (keys are rows, queries columns), and the least of a decode step."""

import torch
import triton
import triton.language as tl

from macbench_kernels.cache import PagedKVCache
from macbench_kernels.triton_common import LOG2E, check_heads, launchable, on_device


@triton.jit
def _column_sums(
    q_ptr, k_ptr, table_ptr, lse_ptr, sums_ptr, first, n, head_stride, scale,
    group: tl.constexpr, dim: tl.constexpr, page: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: a block of keys for one query head, over all queries that see any of them. q [Hq, n, dim], lse [Hq, n], sums [Hq, first + n]."""
    start, head = tl.program_id(0) * BLOCK, tl.program_id(1)
    key = start + tl.arange(0, BLOCK)
    base = (head // group) * head_stride.to(tl.int64)
    page_id = tl.load(table_ptr + key // page, mask=key < first + n, other=0).to(tl.int64)
    channel = tl.arange(0, DIM)[None, :]
    k = tl.load(k_ptr + base + ((page_id * page + key % page) * dim)[:, None] + channel, mask=(key < first + n)[:, None] & (channel < dim), other=0.0)
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
def _least_attended(
    scores_ptr, lse_ptr, ids_ptr, counts_ptr, lengths_ptr, place_ptr, total_ptr, width, newest,
    heads: tl.constexpr, sets: tl.constexpr, SHARED: tl.constexpr, TOTAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one set. scores [B * Hq, width], ids and total [B * Hkv, width]."""
    item = tl.program_id(0)
    request = item // sets
    columns: tl.constexpr = heads if SHARED else heads // sets
    first = request * heads + (0 if SHARED else item % sets * columns)
    count, youngest = tl.load(counts_ptr + item), tl.load(lengths_ptr + request) - newest
    row = item.to(tl.int64) * width
    base = first.to(tl.int64) * width
    least, latest, where = tl.full([], float("inf"), tl.float32), tl.full([], -1, tl.int32), tl.full([], 0, tl.int32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        listed = place < count
        received = tl.zeros([BLOCK], tl.float32)
        for head in range(columns):
            score = tl.load(scores_ptr + base + head * width + place, mask=listed, other=float("-inf"))
            received += tl.exp2((score - tl.load(lse_ptr + first + head)) * LOG2E)
        if TOTAL:
            received += tl.load(total_ptr + row + place, mask=listed, other=0.0)
            tl.store(total_ptr + row + place, received, mask=listed)
        token = tl.load(ids_ptr + row + place, mask=listed, other=0)
        free = listed & (token < youngest)
        low = tl.min(tl.where(free, received, float("inf")), 0)
        tied = free & (received == low)
        last = tl.max(tl.where(tied, token, -1), 0)
        at = tl.max(tl.where(tied & (token == last), place, 0), 0)
        better = (low < least) | ((low == least) & (last > latest))
        least, latest, where = tl.where(better, low, least), tl.where(better, last, latest), tl.where(better, at, where)
    tl.store(place_ptr + item, where.to(tl.int64))


def least_attended(
    scores: torch.Tensor, lse: torch.Tensor, ids: torch.Tensor, counts: torch.Tensor, lengths: torch.Tensor, newest: int,
    place: torch.Tensor, total: torch.Tensor | None = None, shared: bool = False,
) -> None:  # fmt: skip
    """See scores.least_attended; all tensors contiguous. No host synchronisation."""
    batch, sets, width = ids.shape
    with on_device(scores):
        _least_attended[(batch * sets,)](
            scores, lse, ids, counts, lengths, place, scores if total is None else total, width, newest,
            heads=scores.shape[1], sets=sets, SHARED=shared, TOTAL=total is not None,
            BLOCK=min(2048, triton.next_power_of_2(width)), num_warps=8,
        )  # fmt: skip
