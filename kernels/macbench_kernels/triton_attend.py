"""Paged decode attention over key spans: one persistent launch over equal shares of all tiles, one that merges the pieces.

A piece is what one program read of one item (see triton_spans): normalised output, and lse in base 2, of every head of the group.
Walking its share, a program meets items in ascending order, so ``program + item`` numbers all pieces without gaps or clashes.
"""

import torch
import triton
import triton.language as tl

from macbench_kernels.cache import PagedKVCache
from macbench_kernels.state import State
from macbench_kernels.triton_common import LN2, LOG2E, check, dependent_launch, finish, follow, launch_options, launchable, on_device, processors
from macbench_kernels.triton_spans import FAR, FULL, MAC, SPANS, bounds, extent, tiles

# Packed matches or bounds that a program of the persistent kernel looks at together.
_PROLOGUE_ELEMENTS = 4096
# (request, KV head) pairs from which on short reads are many.
_MANY_UNITS, _VERY_MANY_UNITS = 32, 256
# Tile of a merging program in elements, its fewest channels, and how many programs are enough.
_MERGE_ELEMENTS = 512
_THINNEST = 16
_MERGE_PROGRAMS = 2048


@triton.jit
def _tile_loop(
    q, k_ptr, v_ptr, table_ptr, begin, end, start, stop, scale,
    dim: tl.constexpr, page: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, GAPS: tl.constexpr,
):  # fmt: skip
    """Softmax sums of the keys [begin, end) for the heads of a group, each within its [start, stop): top [g], total [g], acc [DIM, g].

    Transposed (keys and channels are rows, heads are columns), so that the long axes fill the matrix units and heads need no padding to 64.
    ``q`` [DIM, g]; the pointers are those of one KV head and one request. GAPS: there may be keys in between that no head asked for.
    """
    channel = tl.arange(0, DIM)[None, :]
    top = tl.full([GROUP], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK, GROUP], tl.float32)
    acc = tl.zeros([DIM, GROUP], tl.float32)
    for block in tl.range(begin, end, BLOCK, num_stages=STAGES):
        key = block + tl.arange(0, BLOCK)
        seen = (key[:, None] >= start[None, :]) & (key[:, None] < tl.minimum(stop, end)[None, :])
        needed = key < end
        if GAPS:
            needed = tl.max(seen.to(tl.int32), 1) > 0
        page_id = tl.load(table_ptr + key // page, mask=needed, other=0).to(tl.int64)
        offset = ((page_id * page + key % page) * dim)[:, None] + channel
        inside = needed[:, None]
        if dim != DIM:
            inside = inside & (channel < dim)
        k = tl.load(k_ptr + offset, mask=inside, other=0.0)
        score = tl.dot(k, q, input_precision="ieee") * scale
        score = tl.where(seen, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 0))
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(score - pivot[None, :])
        fade = tl.exp2(top - pivot)
        top = new_top
        # Summed over keys once, at the end: one reduction across warps less per tile.
        weight = weight * fade[None, :] + p
        v = tl.load(v_ptr + offset, mask=inside, other=0.0)
        acc = tl.dot(tl.trans(v), p.to(v.dtype), acc * fade[None, :], input_precision="ieee")
    return top, tl.sum(weight, 0), acc


@triton.jit
def _place(item, count, items, passed, begin, end, before_ptr):
    """Sums over a chunk of items [n] with ``passed`` tiles before it: items and tiles before the share [begin, end), items up to its end."""
    upto = passed + tl.cumsum(count, 0)
    known = item < items
    over = known & (upto <= begin)
    if tl.program_id(0) == 0:
        tl.store(before_ptr + item, upto - count, mask=known)
    first, at = tl.sum(over.to(tl.int32), 0), tl.max(tl.where(over, upto, 0), 0)
    return first, at, tl.sum((known & (upto - count < end)).to(tl.int32), 0)


@triton.jit
def _attend_shares(
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, spans_ptr, keys_ptr, part_ptr, part_lse_ptr, before_ptr, scale,
    batch, items, table_stride, head_stride, radius, band, sink,
    heads: tl.constexpr, capacity: tl.constexpr, group: tl.constexpr, dim: tl.constexpr, page: tl.constexpr,
    COUNT: tl.constexpr, SIDES: tl.constexpr, SOURCE: tl.constexpr, SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: one share of all tiles. before [items + 1] gets the number of tiles before each item; part [pieces, SIDES * group, dim]."""
    follow(EARLY)
    program, programs = tl.program_id(0), tl.num_programs(0)
    kv_heads: tl.constexpr = heads // group
    lane = tl.arange(0, CHUNK)
    count = tiles(
        lane, items, lengths_ptr, spans_ptr, keys_ptr, batch, radius, band, sink,
        heads=heads, capacity=capacity, group=group, HEADS=HEADS, BLOCK=BLOCK, COUNT=COUNT, SOURCE=SOURCE, SPLITS=SPLITS,
    )  # fmt: skip
    passed = tl.sum(count, 0)
    total = passed
    for chunk in range(1, CHUNKS):
        more = tiles(
            chunk * CHUNK + lane, items, lengths_ptr, spans_ptr, keys_ptr, batch, radius, band, sink,
            heads=heads, capacity=capacity, group=group, HEADS=HEADS, BLOCK=BLOCK, COUNT=COUNT, SOURCE=SOURCE, SPLITS=SPLITS,
        )  # fmt: skip
        total += tl.sum(more, 0)
    share = tl.cdiv(total, programs)
    begin = program * share
    end = tl.minimum(begin + share, total)
    first_item, at, last_item = _place(lane, count, items, 0, begin, end, before_ptr)
    for chunk in range(1, CHUNKS):
        item = chunk * CHUNK + lane
        more = tiles(
            item, items, lengths_ptr, spans_ptr, keys_ptr, batch, radius, band, sink,
            heads=heads, capacity=capacity, group=group, HEADS=HEADS, BLOCK=BLOCK, COUNT=COUNT, SOURCE=SOURCE, SPLITS=SPLITS,
        )  # fmt: skip
        first, over, last = _place(item, more, items, passed, begin, end, before_ptr)
        first_item, last_item, at, passed = first_item + first, last_item + last, tl.maximum(at, over), passed + tl.sum(more, 0)
    if program == 0:
        tl.store(before_ptr + items, total)

    column = tl.arange(0, COLUMNS)
    real = column < SIDES * group
    channel = tl.arange(0, DIM)
    if begin < end:
        for item in range(first_item, last_item):
            unit, span = item // COUNT, item % COUNT
            request, kv_head = unit // kv_heads, unit % kv_heads
            head = kv_head * group + column % group
            start, stop = bounds(
                span, column // group, request, head, item < items, real, lengths_ptr, spans_ptr, keys_ptr, batch, radius, band, sink,
                heads=heads, capacity=capacity, SOURCE=SOURCE, SPLITS=SPLITS,
            )  # fmt: skip
            low, high = extent(start, stop)
            first_key = low + tl.maximum(begin - at, 0) * BLOCK
            end_key = tl.minimum(low + (end - at) * BLOCK, high)
            at += tl.cdiv(high - low, BLOCK)
            if first_key < end_key:
                q = tl.load(
                    q_ptr + (request * heads + head)[None, :] * dim + channel[:, None], mask=real[None, :] & (channel < dim)[:, None], other=0.0,
                )  # fmt: skip
                base = kv_head * head_stride.to(tl.int64)
                k, v, table = k_ptr + base, v_ptr + base, table_ptr + request * table_stride
                if SOURCE == SPANS:
                    # Heads that all start or all stop together leave no gap. Only then are the loads free of a mask from all heads.
                    some = stop > start
                    together = (tl.min(tl.where(some, stop, FAR), 0) == high) | (tl.max(tl.where(some, start, 0), 0) == low)
                    if together:
                        top, total_weight, acc = _tile_loop(
                            q, k, v, table, first_key, end_key, start, stop, scale,
                            dim=dim, page=page, GROUP=COLUMNS, DIM=DIM, BLOCK=BLOCK, STAGES=STAGES, GAPS=False,
                        )  # fmt: skip
                    else:
                        top, total_weight, acc = _tile_loop(
                            q, k, v, table, first_key, end_key, start, stop, scale,
                            dim=dim, page=page, GROUP=COLUMNS, DIM=DIM, BLOCK=BLOCK, STAGES=STAGES, GAPS=True,
                        )  # fmt: skip
                else:
                    top, total_weight, acc = _tile_loop(
                        q, k, v, table, first_key, end_key, start, stop, scale,
                        dim=dim, page=page, GROUP=COLUMNS, DIM=DIM, BLOCK=BLOCK, STAGES=STAGES, GAPS=False,
                    )  # fmt: skip
                norm, lse = finish(top, total_weight)
                target = (program + item) * (SIDES * group) + column
                tl.store(part_lse_ptr + target, lse, mask=real)
                tl.store(
                    part_ptr + target[None, :] * dim + channel[:, None], acc / norm[None, :], mask=real[None, :] & (channel < dim)[:, None],
                )  # fmt: skip


@triton.jit
def piece_range(before, upto, skip, total, programs):
    """(first piece relative to the item, number of pieces) of an item with the tiles [before, upto), its first ``skip`` tiles left out."""
    share = tl.maximum(tl.cdiv(total, programs), 1)
    first = (before + skip) // share
    return first, tl.where(upto > before, (upto - 1) // share - first + 1, 0)


@triton.jit
def load_pieces(part_ptr, part_lse_ptr, first, count, column, channel, columns: tl.constexpr, dim: tl.constexpr, PIECES: tl.constexpr):
    """(lse in base 2 [PIECES], out [PIECES, c]) of a column in the pieces first, first + 1, ...; empty states from ``count`` on."""
    index = tl.arange(0, PIECES)
    at = (first + index) * columns + column
    lse = tl.load(part_lse_ptr + at, mask=index < count, other=float("-inf"))
    return lse, tl.load(part_ptr + at[:, None] * dim + channel[None, :], mask=(index < count)[:, None] & (channel < dim)[None, :], other=0.0)


@triton.jit
def gather_pieces(
    lse, out, part_ptr, part_lse_ptr, first, count, column, channel,
    columns: tl.constexpr, dim: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Softmax sums (top, total scalars, acc [c]) of a column over ``count`` pieces, whose first PIECES are loaded already.

    Piece i is added to row i % PIECES, so that rows meet only once, at the end.
    """
    top, total, acc = lse, tl.where(lse > float("-inf"), 1.0, 0.0), out
    for done in range(PIECES, count, PIECES):
        lse, out = load_pieces(part_ptr, part_lse_ptr, first + done, count - done, column, channel, columns=columns, dim=dim, PIECES=PIECES)
        new_top = tl.maximum(top, lse)
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        fade, weight = tl.exp2(top - pivot), tl.exp2(lse - pivot)
        acc = acc * fade[:, None] + out * weight[:, None]
        total = total * fade + weight
        top = new_top
    whole = tl.max(top, 0)
    weight = tl.exp2(top - tl.where(whole == float("-inf"), 0.0, whole))
    return whole, tl.sum(total * weight, 0), tl.sum(acc * weight[:, None], 0)


@triton.jit
def join(top, total, acc, other_top, other_total, other_acc):
    """Softmax sums over the union of two disjoint sets of keys."""
    whole = tl.maximum(top, other_top)
    pivot = tl.where(whole == float("-inf"), 0.0, whole)
    weight, other_weight = tl.exp2(top - pivot), tl.exp2(other_top - pivot)
    return whole, total * weight + other_total * other_weight, acc * weight + other_acc * other_weight


@triton.jit
def _merge_pieces(
    part_ptr, part_lse_ptr, before_ptr, out_ptr, lse_ptr, rows, items, programs,
    group: tl.constexpr, dim: tl.constexpr, COUNT: tl.constexpr, SLICE: tl.constexpr, PIECES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: a slice of the channels of the state of one (request, head) over one span. out [S, rows, dim], lse [S, rows], rows = B * Hq."""
    follow(EARLY)
    at, span = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    item, column = at // group * COUNT + span, at % group
    before, upto, whole = tl.load(before_ptr + item), tl.load(before_ptr + item + 1), tl.load(before_ptr + items)
    first, count = piece_range(before, upto, 0, whole, programs)
    lse, out = load_pieces(part_ptr, part_lse_ptr, first + item, count, column, channel, columns=group, dim=dim, PIECES=PIECES)
    top, total, acc = gather_pieces(lse, out, part_ptr, part_lse_ptr, first + item, count, column, channel, columns=group, dim=dim, PIECES=PIECES)
    norm, lse = finish(top, total)
    target = span * rows + at
    if tl.program_id(1) == 0:
        tl.store(lse_ptr + target, lse * LN2)
    tl.store(out_ptr + target.to(tl.int64) * dim + channel, acc / norm, mask=channel < dim)


def tuning(dim: int, sides: int, itemsize: int, units: int) -> dict:
    """Tile and pipeline of the persistent kernel: keys per tile, stages, warps, programs per multiprocessor.

    Block tables are loaded through the same pipeline, one step ahead, so that 5 stages hold 3 tiles of K and V and 3 stages hold 2.
    Matrix units want 64 keys of a half-precision type; 2 or 3 tiles of K and V must fit into shared memory. Long reads do best with one
    program per multiprocessor (fewest pieces), the many short reads of MAC with two, or three of a shorter pipeline for many ``units``;
    for very many, three programs get in each other's way when they stream long prefixes.
    """
    if itemsize > 2:
        return {"block": 16, "stages": 3, "warps": 4, "occupancy": 1}
    stages, occupancy = (5, 1) if sides == 1 else (3, 3) if _MANY_UNITS <= units < _VERY_MANY_UNITS else (5, 2)
    if dim > 128:
        stages, occupancy = 3, 1
    return {"block": 64, "stages": stages, "warps": 4, "occupancy": occupancy}


class Pieces:
    """Launch of the persistent kernel and the scratch that it fills: part float32 [pieces, columns, d], part_lse, before."""

    def __init__(
        self, q, cache: PagedKVCache, layer: int, scale: float, source, count: int,
        spans=None, keys=None, radius=0.0, capacity=1, band=0, sink=0, **override,
    ):  # fmt: skip
        k, v = cache.keys(layer), cache.values(layer)
        batch, heads, dim = q.shape
        kv_heads, _, page, _ = k.shape
        table, lengths = cache.block_table, cache.lengths
        group = heads // kv_heads
        sides = 2 if source.value == MAC.value else 1
        self.columns = sides * group
        knobs = tuning(dim, sides, q.element_size(), batch * kv_heads) | override
        wide, self.block = triton.next_power_of_2(group), knobs["block"]
        self.items = batch * kv_heads * count
        most = self.items * triton.cdiv(table.shape[1] * page, knobs["block"])
        self.programs = max(1, min(processors(q.device) * knobs["occupancy"], most))
        pieces = self.programs + self.items
        self.part = torch.empty(pieces, self.columns, dim, dtype=torch.float32, device=q.device)
        self.part_lse = torch.empty(pieces, self.columns, dtype=torch.float32, device=q.device)
        self.before = torch.empty(self.items + 1, dtype=torch.int32, device=q.device)
        early = dependent_launch(q.device)
        chunk = max(16, min(triton.next_power_of_2(self.items), _PROLOGUE_ELEMENTS // wide))
        _attend_shares[(self.programs,)](
            q, k, v, table, lengths, spans, keys, self.part, self.part_lse, self.before, scale * LOG2E.value,
            batch, self.items, table.stride(0), k.stride(0), radius, band, sink,
            heads=heads, capacity=capacity, group=group, dim=dim, page=page,
            COUNT=count, SIDES=sides, SOURCE=source.value, SPLITS=1 if keys is None else keys.shape[0],
            COLUMNS=max(16, triton.next_power_of_2(self.columns)), HEADS=wide, DIM=triton.next_power_of_2(dim), BLOCK=knobs["block"],
            CHUNK=chunk, CHUNKS=triton.cdiv(self.items, chunk), STAGES=knobs["stages"],
            EARLY=early, num_warps=knobs["warps"], **launch_options(early),
        )  # fmt: skip

    def merging(self, rows: int) -> tuple[int, dict]:
        """See the function of this name."""
        return merging(self.part.shape[-1], rows)


def merging(dim: int, rows: int) -> tuple[int, dict]:
    """Programs per (request, head) row for a kernel that merges pieces, and its tile: channels times pieces that are loaded at once.

    A program is one warp, so that nothing waits at a barrier. Few rows are cut into thin slices of channels: that occupies the machine,
    and a warp takes more pieces at once.
    """
    wide = triton.next_power_of_2(dim)
    width = min(wide, max(_THINNEST, triton.next_power_of_2(wide * rows // _MERGE_PROGRAMS)))
    return wide // width, {"SLICE": width, "PIECES": max(4, _MERGE_ELEMENTS // width), "num_warps": 1}


def attend(q: torch.Tensor, cache: PagedKVCache, layer: int, spans: torch.Tensor, scale: float) -> State:
    """See torch_backend.attend: q [B, Hq, d], spans int32 [S, 2, B, Hq] -> out float32 [S, B, Hq, d], lse [S, B, Hq]. No host synchronisation."""
    check(q, cache, layer)
    launchable(q, {"spans": spans})
    with on_device(q):
        q = q.contiguous()
        count = spans.shape[0]
        return _merged(q, Pieces(q, cache, layer, scale, SPANS, count, spans.contiguous()), count, torch.float32)


def attend_full(q: torch.Tensor, cache: PagedKVCache, layer: int, scale: float, dtype: torch.dtype = torch.float32, **override) -> State:
    """Every visible key: q [B, Hq, d] -> out [B, Hq, d] in ``dtype``, lse float32 [B, Hq]. ``override``: see ``tuning``."""
    check(q, cache, layer)
    with on_device(q):
        q = q.contiguous()
        state = _merged(q, Pieces(q, cache, layer, scale, FULL, 1, **override), 1, dtype)
    return State(state.out[0], state.lse[0])


def full(q: torch.Tensor, cache: PagedKVCache, layer: int, scale: float) -> torch.Tensor:
    """See torch_backend.full: attention over every visible key, [B, Hq, d] in q's dtype. No host synchronisation."""
    return attend_full(q, cache, layer, scale, q.dtype).out


def _merged(q: torch.Tensor, pieces: Pieces, count: int, dtype: torch.dtype) -> State:
    batch, heads, dim = q.shape
    out = torch.empty(count, batch, heads, dim, dtype=dtype, device=q.device)
    lse = torch.empty(count, batch, heads, dtype=torch.float32, device=q.device)
    early = dependent_launch(q.device)
    slices, tile = pieces.merging(batch * heads * count)
    _merge_pieces[(batch * heads, slices, count)](
        pieces.part, pieces.part_lse, pieces.before, out, lse, batch * heads, pieces.items, pieces.programs,
        group=pieces.columns, dim=dim, COUNT=count, EARLY=early, **tile, **launch_options(early),
    )  # fmt: skip
    return State(out, lse)
