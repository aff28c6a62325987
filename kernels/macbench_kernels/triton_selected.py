"""Paged decode attention over selected tokens or pages: the persistent kernel of triton_attend with a gather instead of a span.

An item is one set: (request, KV head) or (request, query head). Its places 0 .. count * unit - 1 are cut into tiles, all tiles of all
sets into equal shares (stream-K), so that one request fills the machine and sets of different sizes balance. Place j is token
ids[j // unit] * unit + j % unit, found through the block table; what lies at or behind the request's length is skipped.
"""

import torch
import triton
import triton.language as tl

from macbench_kernels.cache import PagedKVCache
from macbench_kernels.dispatch import UnsupportedError
from macbench_kernels.state import State
from macbench_kernels.triton_attend import _merge_pieces, _place, merging
from macbench_kernels.triton_common import LN2, LOG2E, check, dependent_launch, finish, follow, launch_options, on_device, processors

# Sets whose tile counts a program sums up together.
_PROLOGUE_SETS = 1024


@triton.jit
def _tiles(item, items, counts_ptr, unit: tl.constexpr, BLOCK: tl.constexpr):
    return tl.cdiv(tl.load(counts_ptr + item, mask=item < items, other=0) * unit, BLOCK)


@triton.jit
def _gather_loop(
    q, k_ptr, v_ptr, table_ptr, ids_ptr, scores, real, begin, end, length, scale,
    dim: tl.constexpr, page: tl.constexpr, unit: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    SCORES: tl.constexpr,
):  # fmt: skip
    """Softmax sums over the places [begin, end) of one set: top [c], total [c], acc [DIM, c]. Transposed like triton_attend._tile_loop."""
    channel = tl.arange(0, DIM)[None, :]
    top = tl.full([COLUMNS], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK, COLUMNS], tl.float32)
    acc = tl.zeros([DIM, COLUMNS], tl.float32)
    for block in tl.range(begin, end, BLOCK, num_stages=STAGES):
        place = block + tl.arange(0, BLOCK)
        listed = place < end
        token = tl.load(ids_ptr + place // unit, mask=listed, other=0) * unit + place % unit
        seen = listed & (token < length)
        page_id = tl.load(table_ptr + token // page, mask=seen, other=0).to(tl.int64)
        offset = ((page_id * page + token % page) * dim)[:, None] + channel
        inside = seen[:, None]
        if dim != DIM:
            inside = inside & (channel < dim)
        k = tl.load(k_ptr + offset, mask=inside, other=0.0)
        score = tl.dot(k, q, input_precision="ieee") * scale
        score = tl.where(seen[:, None], score, float("-inf"))
        if SCORES:
            tl.store(scores[None, :] + place[:, None], score * LN2, mask=listed[:, None] & real[None, :])
        new_top = tl.maximum(top, tl.max(score, 0))
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(score - pivot[None, :])
        fade = tl.exp2(top - pivot)
        top = new_top
        weight = weight * fade[None, :] + p
        v = tl.load(v_ptr + offset, mask=inside, other=0.0)
        acc = tl.dot(tl.trans(v), p.to(v.dtype), acc * fade[None, :], input_precision="ieee")
    return top, tl.sum(weight, 0), acc


@triton.jit
def _attend_sets(
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, ids_ptr, counts_ptr, part_ptr, part_lse_ptr, before_ptr, scores_ptr, scale,
    items, width, table_stride, head_stride,
    heads: tl.constexpr, sets: tl.constexpr, kv_heads: tl.constexpr, dim: tl.constexpr, page: tl.constexpr, unit: tl.constexpr,
    COLUMNS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    STAGES: tl.constexpr, EARLY: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    """One program: one share of all tiles. ids [items, width]; before [items + 1]; part [pieces, heads / sets, dim], see triton_attend.

    SCORES: scaled scores of all places are left in scores [B * Hq, width].
    """
    follow(EARLY)
    program, programs = tl.program_id(0), tl.num_programs(0)
    lane = tl.arange(0, CHUNK)
    total = tl.sum(_tiles(lane, items, counts_ptr, unit, BLOCK), 0)
    for chunk in range(1, CHUNKS):
        total += tl.sum(_tiles(chunk * CHUNK + lane, items, counts_ptr, unit, BLOCK), 0)
    share = tl.cdiv(total, programs)
    begin = program * share
    end = tl.minimum(begin + share, total)
    count = _tiles(lane, items, counts_ptr, unit, BLOCK)
    first_item, at, last_item = _place(lane, count, items, 0, begin, end, before_ptr)
    passed = tl.sum(count, 0)
    for chunk in range(1, CHUNKS):
        count = _tiles(chunk * CHUNK + lane, items, counts_ptr, unit, BLOCK)
        first, over, last = _place(chunk * CHUNK + lane, count, items, passed, begin, end, before_ptr)
        first_item, last_item, at, passed = first_item + first, last_item + last, tl.maximum(at, over), passed + tl.sum(count, 0)
    if program == 0:
        tl.store(before_ptr + items, total)

    columns: tl.constexpr = heads // sets
    column = tl.arange(0, COLUMNS)
    real = column < columns
    channel = tl.arange(0, DIM)
    if begin < end:
        for item in range(first_item, last_item):
            places = tl.load(counts_ptr + item) * unit
            first_place = tl.maximum(begin - at, 0) * BLOCK
            end_place = tl.minimum((end - at) * BLOCK, places)
            at += tl.cdiv(places, BLOCK)
            if first_place < end_place:
                request, one = item // sets, item % sets
                head = one * columns + column
                q = tl.load(
                    q_ptr + (request * heads + head)[None, :] * dim + channel[:, None], mask=real[None, :] & (channel < dim)[:, None], other=0.0,
                )  # fmt: skip
                base = (one * kv_heads // sets) * head_stride.to(tl.int64)
                top, total_weight, acc = _gather_loop(
                    q, k_ptr + base, v_ptr + base, table_ptr + request * table_stride, ids_ptr + item * width,
                    scores_ptr + (request * heads + head).to(tl.int64) * width, real,
                    first_place, end_place, tl.load(lengths_ptr + request), scale,
                    dim=dim, page=page, unit=unit, COLUMNS=COLUMNS, DIM=DIM, BLOCK=BLOCK, STAGES=STAGES, SCORES=SCORES,
                )  # fmt: skip
                norm, lse = finish(top, total_weight)
                target = (program + item) * columns + column
                tl.store(part_lse_ptr + target, lse, mask=real)
                tl.store(
                    part_ptr + target[None, :] * dim + channel[:, None], acc / norm[None, :], mask=real[None, :] & (channel < dim)[:, None],
                )  # fmt: skip


def _tuning(dim: int, itemsize: int) -> dict:
    """Keys per tile, stages, warps, programs per multiprocessor: like triton_attend.tuning; ids and table are two steps ahead of the rows."""
    if itemsize > 2:
        return {"block": 16, "stages": 3, "warps": 4, "occupancy": 1}
    return {"block": 64, "stages": 5 if dim <= 128 else 3, "warps": 4, "occupancy": 2 if dim <= 128 else 1}


def attend_selected(
    q: torch.Tensor, cache: PagedKVCache, layer: int, ids: torch.Tensor, counts: torch.Tensor, scale: float, unit: int = 1,
    scores: torch.Tensor | None = None,
) -> State:  # fmt: skip
    """See torch_backend.attend_selected: ids int32 [B, R, n], counts int32 [B, R] -> out float32 [B, Hq, d], lse [B, Hq]. No host synchronisation."""
    k, v = cache.keys(layer), cache.values(layer)
    check(q, cache, layer)
    batch, heads, dim = q.shape
    kv_heads, _, page, _ = k.shape
    sets, width = ids.shape[1:]
    if sets not in (kv_heads, heads) or counts.shape != (batch, sets) or ids.shape[0] != batch:
        raise UnsupportedError(
            f"ids {tuple(ids.shape)}, counts {tuple(counts.shape)}: must be one set per KV head ({kv_heads}) or query head ({heads})"
        )
    if ids.dtype != torch.int32 or counts.dtype != torch.int32:
        raise UnsupportedError(f"ids of {ids.dtype}, counts of {counts.dtype}: triton kernels take int32")
    if not q.device == ids.device == counts.device:
        raise UnsupportedError(f"queries on {q.device}, ids on {ids.device}, counts on {counts.device}: all must be on one device")
    q, ids, counts = q.contiguous(), ids.contiguous(), counts.contiguous()
    columns, items = heads // sets, batch * sets
    knobs = _tuning(dim, q.element_size())
    most = items * triton.cdiv(width * unit, knobs["block"])
    programs = max(1, min(processors(q.device) * knobs["occupancy"], most))
    part = torch.empty(programs + items, columns, dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(programs + items, columns, dtype=torch.float32, device=q.device)
    before = torch.empty(items + 1, dtype=torch.int32, device=q.device)
    out = torch.empty(batch, heads, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, heads, dtype=torch.float32, device=q.device)
    early = dependent_launch(q.device)
    chunk = max(16, min(triton.next_power_of_2(items), _PROLOGUE_SETS))
    slices, tile = merging(dim, batch * heads)
    with on_device(q):
        _attend_sets[(programs,)](
            q, k, v, cache.block_table, cache.lengths, ids, counts, part, part_lse, before,
            part if scores is None else scores, scale * LOG2E.value,
            items, width, cache.block_table.stride(0), k.stride(0),
            heads=heads, sets=sets, kv_heads=kv_heads, dim=dim, page=page, unit=unit,
            COLUMNS=max(16, triton.next_power_of_2(columns)), DIM=triton.next_power_of_2(dim), BLOCK=knobs["block"],
            CHUNK=chunk, CHUNKS=triton.cdiv(items, chunk), STAGES=knobs["stages"],
            EARLY=early, SCORES=scores is not None, num_warps=knobs["warps"], **launch_options(early),
        )  # fmt: skip
        _merge_pieces[(batch * heads, slices, 1)](
            part, part_lse, before, out, lse, batch * heads, items, programs,
            group=columns, dim=dim, COUNT=1, EARLY=early, **tile, **launch_options(early),
        )  # fmt: skip
    return State(out, lse)
