"""Attention over quantised keys and values, and the quantisation of one row per step.

Programs share the tiles of one (request, KV head) equally; like in triton_attend keys are rows and heads are columns. A tile's codes are loaded
as whole 32-bit words and spread over channels in registers, so DRAM and L1 traffic are those of the packed codes.
"""

import torch
import triton
import triton.language as tl

from macbench_kernels.cache import PagedKVCache
from macbench_kernels.quantised import SMALLEST_SCALE, Codes
from macbench_kernels.state import State
from macbench_kernels.triton_common import LN2, LOG2E, check, finish, on_device, processors

# Programs per multiprocessor that the splits of all (request, KV head) pairs add up to.
_PROGRAMS_PER_PROCESSOR = 2
_MAX_SPLITS = 128
# Keys per tile: a multiple of every group of KIVI; half of it for float32, which is for tests.
_BLOCK = 64


@triton.jit
def _dequantised(
    words_ptr, scale_ptr, zero_ptr, first, stop,
    dim: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK, DIM] of the tokens from ``first`` (a multiple of BLOCK); unspecified but finite from ``stop`` on. Pointers are of one head."""
    per: tl.constexpr = 32 // BITS
    token = first + tl.arange(0, BLOCK)
    word = tl.arange(0, DIM // per)
    words = tl.load(
        words_ptr + token[:, None] * (dim // per) + word[None, :], mask=(token < stop)[:, None] & (word < dim // per)[None, :], other=0
    )  # fmt: skip
    codes = tl.reshape((words[:, :, None] >> (tl.arange(0, per) * BITS)[None, None, :]) & ((1 << BITS) - 1), [BLOCK, DIM]).to(tl.float32)
    if SYMMETRIC:
        codes -= 1 << (BITS - 1)
    # Groups as wide as the head fill the padded width too.
    WIDE: tl.constexpr = DIM if dim == CHANNELS else CHANNELS
    row = first // TOKENS + tl.arange(0, BLOCK // TOKENS)
    column = tl.arange(0, DIM // WIDE)
    at = row[:, None] * (dim // CHANNELS) + column[None, :]
    there = (row * TOKENS < stop)[:, None] & (column < dim // CHANNELS)[None, :]
    x = codes * _spread(tl.load(scale_ptr + at, mask=there, other=0.0).to(tl.float32), TOKENS, WIDE, BLOCK, DIM)
    if not SYMMETRIC:
        x += _spread(tl.load(zero_ptr + at, mask=there, other=0.0).to(tl.float32), TOKENS, WIDE, BLOCK, DIM)
    return x


@triton.jit
def _spread(x, TOKENS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr):
    """Parameters [BLOCK / TOKENS, DIM / WIDE] -> [BLOCK, DIM]."""
    return tl.reshape(tl.broadcast_to(x[:, None, :, None], [BLOCK // TOKENS, TOKENS, DIM // WIDE, WIDE]), [BLOCK, DIM])


@triton.jit
def _tiles(
    q, top, total, acc, k_ptr, v_ptr, table_ptr, kw_ptr, ks_ptr, kz_ptr, vw_ptr, vs_ptr, vz_ptr, begin, end, length, k_stop, v_stop, scale,
    dim: tl.constexpr, page: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
    KT: tl.constexpr, KC: tl.constexpr, VT: tl.constexpr, VC: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Softmax sums (top [g], total [g], acc [DIM, g]) with the keys [begin, end) added. MIXED: some rows may come from the cache."""
    channel = tl.arange(0, DIM)[None, :]
    for block in tl.range(begin, end, BLOCK, num_stages=STAGES):
        token = block + tl.arange(0, BLOCK)
        k = _dequantised(kw_ptr, ks_ptr, kz_ptr, block, k_stop, dim, BITS, KT, KC, SYMMETRIC, BLOCK, DIM).to(q.dtype)
        v = _dequantised(vw_ptr, vs_ptr, vz_ptr, block, v_stop, dim, BITS, VT, VC, SYMMETRIC, BLOCK, DIM).to(q.dtype)
        if MIXED:
            late = (token < length) & (token >= tl.minimum(k_stop, v_stop))
            row = tl.load(table_ptr + token // page, mask=late, other=0).to(tl.int64) * page + token % page
            at = row[:, None] * dim + channel
            fresh_k, fresh_v = token >= k_stop, token >= v_stop
            k = tl.where(fresh_k[:, None], tl.load(k_ptr + at, mask=(late & fresh_k)[:, None] & (channel < dim), other=0.0), k)
            v = tl.where(fresh_v[:, None], tl.load(v_ptr + at, mask=(late & fresh_v)[:, None] & (channel < dim), other=0.0), v)
        score = tl.dot(k, q, input_precision="ieee") * scale
        if MIXED:
            score = tl.where((token < length)[:, None], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 0))
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(score - pivot[None, :])
        fade = tl.exp2(top - pivot)
        total = total * fade + tl.sum(p, 0)
        acc = tl.dot(tl.trans(v), p.to(v.dtype), acc * fade[None, :], input_precision="ieee")
        top = new_top
    return top, total, acc


@triton.jit
def _attend_splits(
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, k_stop_ptr, v_stop_ptr, kw_ptr, ks_ptr, kz_ptr, vw_ptr, vs_ptr, vz_ptr, part_ptr, part_lse_ptr,
    scale, table_stride, head_stride, kw_stride, ks_stride, vw_stride, vs_stride,
    heads: tl.constexpr, group: tl.constexpr, dim: tl.constexpr, page: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
    KT: tl.constexpr, KC: tl.constexpr, VT: tl.constexpr, VC: tl.constexpr,
    COLUMNS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: a split of the tiles of one (request, KV head). part [B * Hkv, splits, group, dim], part_lse in base 2."""
    split, splits, unit = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    kv_heads: tl.constexpr = heads // group
    request, kv_head = unit // kv_heads, unit % kv_heads
    length = tl.load(lengths_ptr + request)
    k_stop = tl.minimum(tl.load(k_stop_ptr + request), length)
    v_stop = tl.minimum(tl.load(v_stop_ptr + request), length)
    share = tl.cdiv(tl.cdiv(length, BLOCK), splits) * BLOCK
    begin = split * share
    end = tl.minimum(begin + share, length)
    pure = tl.minimum(tl.minimum(k_stop, v_stop) // BLOCK * BLOCK, end)  # tiles up to here are of codes alone

    column, channel = tl.arange(0, COLUMNS), tl.arange(0, DIM)
    real = column < group
    head = request * heads + kv_head * group + column
    q = tl.load(q_ptr + head[None, :] * dim + channel[:, None], mask=real[None, :] & (channel < dim)[:, None], other=0.0)
    top = tl.full([COLUMNS], float("-inf"), tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    acc = tl.zeros([DIM, COLUMNS], tl.float32)
    far = unit.to(tl.int64)
    base = kv_head * head_stride.to(tl.int64)
    k, v, table = k_ptr + base, v_ptr + base, table_ptr + request * table_stride
    kw, ks, kz = kw_ptr + far * kw_stride, ks_ptr + far * ks_stride, kz_ptr + far * ks_stride
    vw, vs, vz = vw_ptr + far * vw_stride, vs_ptr + far * vs_stride, vz_ptr + far * vs_stride
    top, total, acc = _tiles(
        q, top, total, acc, k, v, table, kw, ks, kz, vw, vs, vz, begin, pure, length, k_stop, v_stop, scale,
        dim, page, BITS, SYMMETRIC, KT, KC, VT, VC, DIM, BLOCK, STAGES, False,
    )  # fmt: skip
    top, total, acc = _tiles(
        q, top, total, acc, k, v, table, kw, ks, kz, vw, vs, vz, tl.maximum(begin, pure), end, length, k_stop, v_stop, scale,
        dim, page, BITS, SYMMETRIC, KT, KC, VT, VC, DIM, BLOCK, 1, True,
    )  # fmt: skip
    norm, lse = finish(top, total)
    at = (unit * splits + split) * group + column
    tl.store(part_lse_ptr + at, lse, mask=real)
    tl.store(part_ptr + at[None, :] * dim + channel[:, None], acc / norm[None, :], mask=real[None, :] & (channel < dim)[:, None])


@triton.jit
def _merge_splits(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, splits, group: tl.constexpr, dim: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One program: the state of one (request, query head). out [B * Hq, dim], lse [B * Hq]."""
    row = tl.program_id(0)
    split, channel = tl.arange(0, SPLITS), tl.arange(0, DIM)
    at = (row // group * splits + split) * group + row % group
    lse = tl.load(part_lse_ptr + at, mask=split < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    # Parts without a key have weight 0 and an output of 0.
    part = tl.load(part_ptr + at[:, None] * dim + channel[None, :], mask=(split < splits)[:, None] & (channel < dim)[None, :], other=0.0)
    norm, lse = finish(top, tl.sum(weight, 0))
    tl.store(lse_ptr + row, lse * LN2)
    tl.store(out_ptr + row * dim + channel, tl.sum(part * weight[:, None], 0) / norm, mask=channel < dim)


def attend_quantised(
    q: torch.Tensor, cache: PagedKVCache, layer: int, k: Codes, v: Codes, k_stop: torch.Tensor, v_stop: torch.Tensor, scale: float
) -> State:
    """See quantised.attend_quantised. Float32 out and lse; no host synchronisation."""
    keys, values = cache.keys(layer), cache.values(layer)
    check(q, cache, layer)
    batch, heads, dim = q.shape
    kv_heads, _, page, _ = keys.shape
    units, group = batch * kv_heads, heads // kv_heads
    block = max(_BLOCK, k.scheme.tokens, v.scheme.tokens) if q.element_size() == 2 else max(16, k.scheme.tokens, v.scheme.tokens)
    wanted = triton.cdiv(processors(q.device) * _PROGRAMS_PER_PROCESSOR, units)
    splits = max(1, min(wanted, triton.cdiv(k.words.shape[2], block), _MAX_SPLITS))
    wide = triton.next_power_of_2(dim)
    part = torch.empty(units, splits, group, dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(units, splits, group, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, heads, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, heads, dtype=torch.float32, device=q.device)
    with on_device(q):
        _attend_splits[(splits, units)](
            q.contiguous(), keys, values, cache.block_table, cache.lengths, k_stop, v_stop,
            k.words, k.scale, k.zero if k.zero is not None else k.scale, v.words, v.scale, v.zero if v.zero is not None else v.scale,
            part, part_lse, scale * LOG2E.value,
            cache.block_table.stride(0), keys.stride(0), k.words.stride(1), k.scale.stride(1), v.words.stride(1), v.scale.stride(1),
            heads=heads, group=group, dim=dim, page=page, BITS=k.scheme.bits, SYMMETRIC=k.scheme.symmetric,
            KT=k.scheme.tokens, KC=k.scheme.channels, VT=v.scheme.tokens, VC=v.scheme.channels,
            COLUMNS=max(16, triton.next_power_of_2(group)), DIM=wide, BLOCK=block, STAGES=3, num_warps=4,
        )  # fmt: skip
        _merge_splits[(batch * heads,)](
            part, part_lse, out, lse, splits, group=group, dim=dim, DIM=wide, SPLITS=triton.next_power_of_2(splits), num_warps=4,
        )  # fmt: skip
    return State(out, lse)


@triton.jit
def _round(x):
    """To the nearest integer, halves to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no room for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _quantise_rows(
    rows_ptr, table_ptr, position_ptr, words_ptr, scale_ptr, zero_ptr, table_stride, head_stride, room, smallest,
    kv_heads: tl.constexpr, dim: tl.constexpr, page: tl.constexpr, BITS: tl.constexpr, CHANNELS: tl.constexpr, SYMMETRIC: tl.constexpr,
    GROUPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: one row of one (request, KV head). GROUPS x WIDE channels, padded to powers of two."""
    unit = tl.program_id(0)
    request, kv_head = unit // kv_heads, unit % kv_heads
    per: tl.constexpr = 32 // BITS
    group, lane = tl.arange(0, GROUPS), tl.arange(0, WIDE)
    inside = (group < dim // CHANNELS)[:, None] & (lane < CHANNELS)[None, :]
    position = tl.maximum(tl.load(position_ptr + request), 0)
    page_id = tl.load(table_ptr + request * table_stride + position // page).to(tl.int64)
    row = rows_ptr + kv_head * head_stride.to(tl.int64) + (page_id * page + position % page) * dim
    x = tl.load(row + group[:, None] * CHANNELS + lane[None, :], mask=inside, other=0.0).to(tl.float32)
    at = unit.to(tl.int64) * room + position
    target = at * (dim // CHANNELS) + group
    if SYMMETRIC:
        half: tl.constexpr = 1 << (BITS - 1)
        # The compiler would divide approximately; codes shall be those of the reference.
        scale = tl.maximum(tl.math.div_rn(tl.max(tl.abs(x), 1), tl.full([GROUPS], half - 1, tl.float32)), smallest)
        codes = _round(tl.math.div_rn(x, tl.broadcast_to(scale[:, None], [GROUPS, WIDE])))
        codes = tl.minimum(tl.maximum(codes, -half), half - 1) + half
        tl.store(scale_ptr + target, scale, mask=group < dim // CHANNELS)
    else:
        most: tl.constexpr = (1 << BITS) - 1
        low = tl.min(tl.where(inside, x, float("inf")), 1)
        high = tl.max(tl.where(inside, x, float("-inf")), 1)
        zero = low.to(tl.float16)
        scale = tl.math.div_rn(high - low, tl.full([GROUPS], most, tl.float32)).to(tl.float16)
        flat = scale == 0.0
        scale = tl.where(flat, 1.0, scale).to(tl.float16)
        steps = tl.broadcast_to(scale.to(tl.float32)[:, None], [GROUPS, WIDE])
        codes = _round(tl.math.div_rn(x - zero.to(tl.float32)[:, None], steps))
        codes = tl.where(flat[:, None], 0.0, tl.minimum(tl.maximum(codes, 0.0), most))
        tl.store(scale_ptr + target, scale, mask=group < dim // CHANNELS)
        tl.store(zero_ptr + target, zero, mask=group < dim // CHANNELS)
    bits = tl.reshape(codes.to(tl.int32), [GROUPS, WIDE // per, per]) << (tl.arange(0, per) * BITS)[None, None, :]
    words = tl.sum(bits, 2)  # disjoint bits: the sum is their union
    word = tl.arange(0, WIDE // per)
    tl.store(
        words_ptr + at * (dim // per) + group[:, None] * (CHANNELS // per) + word[None, :], words,
        mask=(group < dim // CHANNELS)[:, None] & (word < CHANNELS // per)[None, :],
    )  # fmt: skip


def quantise_rows(codes: Codes, rows: torch.Tensor, cache: PagedKVCache, position: torch.Tensor) -> None:
    """See quantised.quantise_rows. No host synchronisation."""
    scheme, dim = codes.scheme, rows.shape[-1]
    batch, kv_heads, room, _ = codes.words.shape
    with on_device(rows):
        _quantise_rows[(batch * kv_heads,)](
            rows, cache.block_table, position, codes.words, codes.scale, codes.zero if codes.zero is not None else codes.scale,
            cache.block_table.stride(0), rows.stride(0), room, SMALLEST_SCALE,
            kv_heads=kv_heads, dim=dim, page=rows.shape[2], BITS=scheme.bits, CHANNELS=scheme.channels, SYMMETRIC=scheme.symmetric,
            GROUPS=triton.next_power_of_2(dim // scheme.channels), WIDE=triton.next_power_of_2(scheme.channels), num_warps=1,
        )  # fmt: skip
