"""Paged decode attention over key spans, split over the keys (flash-decoding), and the merge of the splits."""

import torch
import triton
import triton.language as tl

from macbench_kernels.cache import PagedKVCache
from macbench_kernels.state import State
from macbench_kernels.triton_common import check, on_device

BLOCK_KEYS = 64
# Programs to aim for; a few times the 132 multiprocessors of an H100.
TARGET_PROGRAMS = 528


@triton.jit
def _attend_split(
    q_ptr, k_ptr, v_ptr, table_ptr, spans_ptr, out_ptr, lse_ptr, scale,
    batch, heads, splits, table_stride, head_stride,
    group: tl.constexpr, dim: tl.constexpr, page: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one (request, KV head), one split of one span. Spans int32 [S, 2, batch, heads]; out [S, splits, batch, heads, dim]."""
    kv_heads = heads // group
    request = tl.program_id(0) // kv_heads
    kv_head = tl.program_id(0) % kv_heads
    split, span = tl.program_id(1), tl.program_id(2)

    row = tl.arange(0, GROUP)
    head = kv_head * group + row
    real = row < group
    bound = (span * 2 * batch + request) * heads + head
    start = tl.load(spans_ptr + bound, mask=real, other=0)
    stop = tl.load(spans_ptr + bound + batch * heads, mask=real, other=0)
    start = tl.maximum(start, 0)
    wanted = real & (stop > start)
    lo = tl.min(tl.where(wanted, start, 2147483647))
    hi = tl.max(tl.where(wanted, stop, 0))

    share = tl.cdiv(tl.cdiv(tl.maximum(hi - lo, 0), splits), BLOCK) * BLOCK
    first = lo + split * share
    last = tl.minimum(first + share, hi)

    channel = tl.arange(0, DIM)
    q = tl.load(q_ptr + (request * heads + head)[:, None] * dim + channel, mask=real[:, None] & (channel < dim), other=0.0)
    top = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    acc = tl.zeros([GROUP, DIM], tl.float32)
    base = kv_head.to(tl.int64) * head_stride
    for block in range(first, last, BLOCK):
        key = block + tl.arange(0, BLOCK)
        seen = (key >= start[:, None]) & (key < stop[:, None]) & wanted[:, None] & (key < last)
        needed = tl.max(seen.to(tl.int32), 0) > 0  # only rows that some head of the group asked for are loaded
        page_id = tl.load(table_ptr + request * table_stride + key // page, mask=needed, other=0).to(tl.int64)
        offset = base + (page_id * page + key % page)[:, None] * dim + channel
        inside = needed[:, None] & (channel < dim)
        k = tl.load(k_ptr + offset, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(scores - pivot[:, None])
        fade = tl.exp(top - pivot)
        v = tl.load(v_ptr + offset, mask=inside, other=0.0)
        acc = acc * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * fade + tl.sum(weights, 1)
        top = new_top

    found = total > 0
    norm = tl.where(found, total, 1.0)
    target = ((span * splits + split) * batch + request) * heads + head
    tl.store(lse_ptr + target, tl.where(found, top + tl.log(norm), float("-inf")), mask=real)
    tl.store(out_ptr + target[:, None] * dim + channel, acc / norm[:, None], mask=real[:, None] & (channel < dim))


@triton.jit
def _merge_splits(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, splits, rows,
    dim: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """One program: the state of one (span, request, head) from its splits. part [S, splits, rows, dim] -> out [S, rows, dim]."""
    row, span = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, DIM)
    top, total = float("-inf"), 0.0
    acc = tl.zeros([DIM], tl.float32)
    for split in range(splits):
        source = (span * splits + split) * rows + row
        lse = tl.load(part_lse_ptr + source)
        new_top = tl.maximum(top, lse)
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        fade, weight = tl.exp(top - pivot), tl.exp(lse - pivot)
        part = tl.load(part_ptr + source * dim + channel, mask=channel < dim, other=0.0)
        acc = acc * fade + part * weight
        total = total * fade + weight
        top = new_top
    found = total > 0
    norm = tl.where(found, total, 1.0)
    target = span * rows + row
    tl.store(lse_ptr + target, tl.where(found, top + tl.log(norm), float("-inf")))
    tl.store(out_ptr + target * dim + channel, acc / norm, mask=channel < dim)


def attend(q: torch.Tensor, cache: PagedKVCache, layer: int, spans: torch.Tensor, scale: float) -> State:
    """See torch_backend.attend: q [B, Hq, d], spans int32 [S, 2, B, Hq] -> out float32 [S, B, Hq, d], lse [S, B, Hq]. No host synchronisation."""
    k, v = cache.keys(layer), cache.values(layer)
    check(q, k)
    q, spans = q.contiguous(), spans.contiguous()
    count, _, batch, heads = spans.shape
    kv_heads, _, page, dim = k.shape
    capacity = cache.block_table.shape[1] * page
    splits = max(1, min(TARGET_PROGRAMS // (batch * kv_heads * count), triton.cdiv(capacity, 4 * BLOCK_KEYS)))
    part = torch.empty(count, splits, batch, heads, dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(count, splits, batch, heads, dtype=torch.float32, device=q.device)
    wide = triton.next_power_of_2(dim)
    group = heads // kv_heads
    with on_device(q):
        _attend_split[(batch * kv_heads, splits, count)](
            q, k, v, cache.block_table, spans, part, part_lse, scale,
            batch, heads, splits, cache.block_table.stride(0), k.stride(0),
            group=group, dim=dim, page=page,
            GROUP=max(16, triton.next_power_of_2(group)), DIM=wide, BLOCK=BLOCK_KEYS,
        )  # fmt: skip
        if splits == 1:
            return State(part[:, 0], part_lse[:, 0])
        out = torch.empty(count, batch, heads, dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(count, batch, heads, dtype=torch.float32, device=q.device)
        _merge_splits[(batch * heads, count)](part, part_lse, out, lse, splits, batch * heads, dim=dim, DIM=wide)
    return State(out, lse)
