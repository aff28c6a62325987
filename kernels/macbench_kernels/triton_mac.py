"""The MAC step in three launches: match (triton_match), attend over shares of the fresh keys (triton_attend), and amend, merge, append (here)."""

import torch
import triton
import triton.language as tl

from macbench_kernels.cache import PagedKVCache
from macbench_kernels.dispatch import UnsupportedError
from macbench_kernels.mac import MacParams, MacStep
from macbench_kernels.ring import Ring
from macbench_kernels.triton_attend import Pieces, gather_pieces, join, load_pieces, piece_range
from macbench_kernels.triton_common import LN2, LOG2E, check, check_ring, dependent_launch, finish, follow, launch_options, launchable, on_device
from macbench_kernels.triton_match import nearest_state, scan
from macbench_kernels.triton_spans import MAC, mac_limits, mac_start


@triton.jit
def _append(
    q_ptr, ring_q_ptr, ring_out_ptr, ring_lse_ptr, ring_depth_ptr, lengths_ptr, keys_ptr, found_ptr, part_ptr, part_lse_ptr, before_ptr,
    out_ptr, spans_ptr, looked_up_ptr, hit_ptr, chain_ptr,
    rows, items, programs, radius, band, sink,
    heads: tl.constexpr, capacity: tl.constexpr, group: tl.constexpr, dim: tl.constexpr, COUNT: tl.constexpr,
    BLOCK: tl.constexpr, SLICE: tl.constexpr, PIECES: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: a slice of the channels of one (request, query head). Merges the pieces with the stored state, writes output and ring entry."""
    at, part = tl.program_id(0), tl.program_id(1)
    request, item, column = at // heads, at // group * COUNT, at % group
    channel = part * SLICE + tl.arange(0, SLICE)
    # The scan was over before the attending kernel let this one start: matches and ring can be read ahead of the pieces.
    length = tl.load(lengths_ptr + request)
    key, stored_lse = nearest_state(keys_ptr, found_ptr, at, rows, SPLITS)
    front, edge = mac_limits(length, band, sink)
    start, slot, looked_up, hit = mac_start(key, length, front, radius, band, capacity)
    base = at.to(tl.int64) * capacity
    stored = base + slot
    stored_out = tl.load(ring_out_ptr + stored * dim + channel, mask=channel < tl.where(hit, dim, 0), other=0.0)
    depth = tl.load(ring_depth_ptr + stored, mask=hit & (part == 0), other=-1)
    q = tl.load(q_ptr + at * dim + channel, mask=channel < dim, other=0.0)
    follow(EARLY)

    before, upto, whole = tl.load(before_ptr + item), tl.load(before_ptr + item + 1), tl.load(before_ptr + items)
    first, count = piece_range(before, upto, 0, whole, programs)
    # Tiles before the last band / BLOCK + 1 hold no key of the band.
    late, late_count = piece_range(before, upto, tl.maximum(upto - before - tl.cdiv(band, BLOCK) - 1, 0), whole, programs)
    lse, out = load_pieces(part_ptr, part_lse_ptr, first + item, count, column, channel, columns=2 * group, dim=dim, PIECES=PIECES)
    late_lse, late_out = load_pieces(
        part_ptr, part_lse_ptr, late + item, late_count, column + group, channel, columns=2 * group, dim=dim, PIECES=PIECES
    )
    fresh_top, fresh_total, fresh_acc = gather_pieces(
        lse, out, part_ptr, part_lse_ptr, first + item, count, column, channel, columns=2 * group, dim=dim, PIECES=PIECES
    )
    stored_top = tl.where(hit, stored_lse * LOG2E, float("-inf"))
    top, total, acc = join(stored_top, tl.where(hit, 1.0, 0.0), stored_out, fresh_top, fresh_total, fresh_acc)
    late_top, late_total, late_acc = gather_pieces(
        late_lse, late_out, part_ptr, part_lse_ptr, late + item, late_count, column + group, channel, columns=2 * group, dim=dim, PIECES=PIECES
    )
    if COUNT == 2:
        first, count = piece_range(upto, tl.load(before_ptr + item + 2), 0, whole, programs)
        first += item + 1
        lse, out = load_pieces(part_ptr, part_lse_ptr, first, count, column + group, channel, columns=2 * group, dim=dim, PIECES=PIECES)
        sink_top, sink_total, sink_acc = gather_pieces(
            lse, out, part_ptr, part_lse_ptr, first, count, column + group, channel, columns=2 * group, dim=dim, PIECES=PIECES
        )
        late_top, late_total, late_acc = join(late_top, late_total, late_acc, sink_top, sink_total, sink_acc)

    tl.debug_barrier()  # the entry that was read may lie in the very row that is written: all warps have read before any writes
    norm, lse = finish(top, total)
    row = base + (length - 1) % capacity
    visible = length > 0
    written = channel < tl.where(visible, dim, 0)
    tl.store(ring_q_ptr + row * dim + channel, q, mask=written)
    tl.store(ring_out_ptr + row * dim + channel, acc / norm, mask=written)
    top, total, acc = join(top, total, acc, late_top, late_total, late_acc)
    norm, _ = finish(top, total)
    tl.store(out_ptr + at * dim + channel, acc / norm, mask=channel < dim)
    if part == 0:
        tl.store(ring_lse_ptr + row, lse * LN2, mask=visible)
        tl.store(ring_depth_ptr + row, depth + 1, mask=visible)
        tl.store(spans_ptr + at, start)
        tl.store(spans_ptr + rows + at, edge)
        tl.store(spans_ptr + 2 * rows + at, edge)
        tl.store(spans_ptr + 3 * rows + at, length)
        if COUNT == 2:
            tl.store(spans_ptr + 4 * rows + at, 0)
            tl.store(spans_ptr + 5 * rows + at, front)
        tl.store(looked_up_ptr + at, looked_up)
        tl.store(hit_ptr + at, hit)
        tl.store(chain_ptr + at, depth + 1)


def mac_step(
    q_pre: torch.Tensor, q: torch.Tensor, cache: PagedKVCache, layer: int, ring: Ring, params: MacParams, scale: float, **override
) -> MacStep:
    """See mac.compose: q_pre, q [B, Hq, d] before and after RoPE. No host synchronisation. ``override``: see triton_attend.tuning."""
    check(q, cache, layer)
    check_ring(q_pre, ring)
    launchable(q, {"queries before RoPE": q_pre})
    if q_pre.shape != q.shape:
        raise UnsupportedError(f"queries {tuple(q_pre.shape)} before and {tuple(q.shape)} after RoPE: must agree")
    batch, heads, dim = q.shape
    count = 2 if params.sink else 1  # contiguous reads per KV head
    new = {"device": q.device}
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    spans = torch.empty(count + 1, 2, batch, heads, dtype=torch.int32, **new)
    looked_up, hit = (torch.empty(batch, heads, dtype=torch.bool, **new) for _ in range(2))
    chain = torch.empty(batch, heads, dtype=torch.int32, **new)
    with on_device(q):
        q_pre, q = q_pre.contiguous(), q.contiguous()
        keys, found, scanned = scan(q_pre, ring, cache.lengths, -1, params.radius, params.sink + params.band, params.max_chain, params.min_context)
        pieces = Pieces(
            q, cache, layer, scale, MAC, count, keys=keys, radius=params.radius, capacity=ring.capacity, band=params.band, sink=params.sink,
            **override,
        )  # fmt: skip
        early = dependent_launch(q.device)
        slices, tile = pieces.merging(batch * heads)
        _append[(batch * heads, slices)](
            q_pre, ring.q, ring.out, ring.lse, ring.depth, cache.lengths, keys, found, pieces.part, pieces.part_lse, pieces.before,
            out, spans, looked_up, hit, chain,
            batch * heads, pieces.items, pieces.programs, params.radius, params.band, params.sink,
            heads=heads, capacity=ring.capacity, group=heads // cache.pool.kv_heads, dim=dim, COUNT=count,
            BLOCK=pieces.block, SPLITS=keys.shape[0], EARLY=early, **tile, **launch_options(early),
        )  # fmt: skip
    return MacStep(out, spans, looked_up, hit, chain, scanned)
