"""Which keys every head reads, as seen by a kernel, and how that work is shared out.

An item is one contiguous read of one (request, KV head): item = (request * Hkv + KV head) * COUNT + span. Its tiles of BLOCK keys start
at the smallest start of its columns. All tiles of all items, in order, are cut into equal shares, one per program (stream-K), so every
mix of long and short items balances. Nothing is scheduled on the host: each program sums the tile counts itself.

A column is one softmax of one query head with its own [start, stop): SIDES * group columns share the read of an item.
Where the bounds come from (SOURCE):
    FULL   [0, length): COUNT = SIDES = 1
    SPANS  a tensor int32 [COUNT, 2, B, Hq], SIDES = 1
    MAC    packed matches, SIDES = 2: the keys before the band [start, edge) and the band [edge, length) come from the same read;
           with sinks, COUNT = 2 and the second item is [0, front), on side 1
"""

import triton
import triton.language as tl

from macbench_kernels.triton_match import nearest, source_of, unpack

FULL: tl.constexpr = tl.constexpr(0)
SPANS: tl.constexpr = tl.constexpr(1)
MAC: tl.constexpr = tl.constexpr(2)
FAR: tl.constexpr = tl.constexpr(2147483647)


@triton.jit
def mac_limits(length, band, sink):
    """(front, edge): the sinks are [0, front), the band is [edge, length)."""
    front = tl.minimum(length, sink)
    return front, tl.maximum(length - band, front)


@triton.jit
def mac_start(key, length, front, radius, band, capacity):
    """(start of the fresh read, slot, looked up, hit) from a packed match. The start is never behind the edge."""
    distance, slot, full = unpack(key)
    looked_up = distance < radius
    hit = looked_up & full
    return tl.where(hit, source_of(slot, length - 1, capacity) + 1 - band, front), slot, looked_up, hit


@triton.jit
def bounds(
    span, side, request, head, known, wanted, lengths_ptr, spans_ptr, keys_ptr, batch, radius, band, sink,
    heads: tl.constexpr, capacity: tl.constexpr, SOURCE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """(start, stop) of columns; side -1 is both sides of MAC together.

    ``span``, ``request`` and the mask ``known`` are scalars or [n, 1]; ``side``, ``head`` and the mask ``wanted`` [g] or [n, g].
    """
    if SOURCE == SPANS:
        at = (span * 2 * batch + request) * heads + head
        start = tl.load(spans_ptr + at, mask=wanted, other=0)
        stop = tl.load(spans_ptr + at + batch * heads, mask=wanted, other=0)
    else:
        length = tl.load(lengths_ptr + request, mask=known, other=0)
        start = tl.zeros_like(head + request)
        stop = start + length
        if SOURCE == MAC:
            front, edge = mac_limits(length, band, sink)
            key = nearest(keys_ptr, request * heads + head, wanted & (side < 1) & (span == 0), batch * heads, SPLITS)
            first = mac_start(key, length, front, radius, band, capacity)[0]
            start += tl.where(span == 0, tl.where(side < 1, first, edge), 0)
            stop = tl.where(span == 0, tl.where(side == 0, edge, stop), tl.where(side == 0, 0, front))
    return tl.maximum(start, 0), tl.where(wanted, stop, 0)


@triton.jit
def tiles(
    item, items, lengths_ptr, spans_ptr, keys_ptr, batch, radius, band, sink,
    heads: tl.constexpr, capacity: tl.constexpr, group: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
    SOURCE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Tile counts int32 [n] of the items [n]; 0 from ``items`` on."""
    row = tl.arange(0, HEADS)[None, :]
    known = (item < items)[:, None]
    unit, span = (item // COUNT)[:, None], (item % COUNT)[:, None]
    kv_heads = heads // group
    request, head = unit // kv_heads, (unit % kv_heads) * group + row
    start, stop = bounds(
        span, tl.zeros_like(row) - 1, request, head, known, known & (row < group), lengths_ptr, spans_ptr, keys_ptr, batch, radius, band, sink,
        heads=heads, capacity=capacity, SOURCE=SOURCE, SPLITS=SPLITS,
    )  # fmt: skip
    low, high = extent(start, stop)
    return tl.cdiv(high - low, BLOCK)


@triton.jit
def extent(start, stop):
    """[low, high) around the non-empty ranges of the last axis; (0, 0) if all are empty."""
    low = tl.min(tl.where(stop > start, start, FAR), axis=-1)
    high = tl.max(tl.where(stop > start, stop, 0), axis=-1)
    return tl.minimum(low, high), high
