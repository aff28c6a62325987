"""Attention over quantised keys and values, and the quantisation of one row per step.

Programs share the tiles of codes of one (request, KV head) equally; one more takes what lies behind the last whole tile, where rows may still be
in the cache, and are dequantised in full. See triton_codes for a tile of codes alone.
"""

import torch
import triton
import triton.language as tl

from macbench_kernels.cache import PagedKVCache
from macbench_kernels.dispatch import UnsupportedError
from macbench_kernels.quantised import SMALLEST_SCALE, Codes, Scheme
from macbench_kernels.state import State
from macbench_kernels.triton_codes import BOOST, assembly, code_tiles
from macbench_kernels.triton_common import INTERPRETED, LN2, LOG2E, check, finish, on_device, processors

# Most programs for one (request, KV head), besides the one for its end.
_MAX_SPLITS = 127
# Tokens per tile where rows may come from the cache: every group is as long, a part of it or a multiple.
_MIXED = 32
# Rows of a matrix product; sizes of groups, and of a tile of several of them.
_ROWS, _LEAST_GROUP, _MOST_TOKENS = 16, 16, 128


@triton.jit
def _dequantised(
    words_ptr, scale_ptr, zero_ptr, first, stop,
    dim: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK, DIM] of the tokens from ``first``, whole groups or a part of one; unspecified but finite from ``stop`` on.

    Pointers are of one head.
    """
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
    SAME: tl.constexpr = TOKENS if TOKENS < BLOCK else BLOCK  # tokens of a tile in one group
    row = first // TOKENS + tl.arange(0, BLOCK // SAME)
    column = tl.arange(0, DIM // WIDE)
    at = row[:, None] * (dim // CHANNELS) + column[None, :]
    there = (row * TOKENS < stop)[:, None] & (column < dim // CHANNELS)[None, :]
    x = codes * _spread(tl.load(scale_ptr + at, mask=there, other=0.0).to(tl.float32), SAME, WIDE, BLOCK, DIM)
    if not SYMMETRIC:
        x += _spread(tl.load(zero_ptr + at, mask=there, other=0.0).to(tl.float32), SAME, WIDE, BLOCK, DIM)
    return x


@triton.jit
def _spread(x, TOKENS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr):
    """Parameters [BLOCK / TOKENS, DIM / WIDE] -> [BLOCK, DIM]."""
    return tl.reshape(tl.broadcast_to(x[:, None, :, None], [BLOCK // TOKENS, TOKENS, DIM // WIDE, WIDE]), [BLOCK, DIM])


@triton.jit
def _mixed_tiles(
    q, k_ptr, v_ptr, table_ptr, kw_ptr, ks_ptr, kz_ptr, vw_ptr, vs_ptr, vz_ptr, begin, length, k_stop, v_stop, scale,
    dim: tl.constexpr, page: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
    KT: tl.constexpr, KC: tl.constexpr, VT: tl.constexpr, VC: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Softmax sums (top [c], total [c], acc [DIM, c]) over the tokens [begin, length), of which some rows come from the cache; keys are rows here.

    q [DIM, c]; ``begin`` is a multiple of BLOCK.
    """
    channel = tl.arange(0, DIM)[None, :]
    top = tl.full([COLUMNS], float("-inf"), tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    acc = tl.zeros([DIM, COLUMNS], tl.float32)
    for block in tl.range(begin, length, BLOCK, num_stages=1):
        token = block + tl.arange(0, BLOCK)
        k = _dequantised(kw_ptr, ks_ptr, kz_ptr, block, k_stop, dim, BITS, KT, KC, SYMMETRIC, BLOCK, DIM).to(q.dtype)
        v = _dequantised(vw_ptr, vs_ptr, vz_ptr, block, v_stop, dim, BITS, VT, VC, SYMMETRIC, BLOCK, DIM).to(q.dtype)
        late = (token < length) & (token >= tl.minimum(k_stop, v_stop))
        row = tl.load(table_ptr + token // page, mask=late, other=0).to(tl.int64) * page + token % page
        at = row[:, None] * dim + channel
        fresh_k, fresh_v = token >= k_stop, token >= v_stop
        k = tl.where(fresh_k[:, None], tl.load(k_ptr + at, mask=(late & fresh_k)[:, None] & (channel < dim), other=0.0), k)
        v = tl.where(fresh_v[:, None], tl.load(v_ptr + at, mask=(late & fresh_v)[:, None] & (channel < dim), other=0.0), v)
        score = tl.where((token < length)[:, None], tl.dot(k, q, input_precision="ieee") * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 0))
        p = tl.exp2(score - new_top[None, :])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(p, 0)
        acc = tl.dot(tl.trans(v), p.to(v.dtype), acc * fade[None, :], input_precision="ieee")
        top = new_top
    return top, total, acc


@triton.jit
def _attend_splits(
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, k_stop_ptr, v_stop_ptr, kw_ptr, ks_ptr, kz_ptr, vw_ptr, vs_ptr, vz_ptr, k4_ptr, v4_ptr,
    part_ptr, part_lse_ptr, scale, table_stride, head_stride, kw_stride, ks_stride, vw_stride, vs_stride,
    heads: tl.constexpr, group: tl.constexpr, dim: tl.constexpr, page: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
    KT: tl.constexpr, KC: tl.constexpr, VT: tl.constexpr, VC: tl.constexpr,
    COLUMNS: tl.constexpr, DIM: tl.constexpr, MIXED: tl.constexpr,
    SLOTS: tl.constexpr, HEADS: tl.constexpr, FOURS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    DTYPE: tl.constexpr, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, PACK: tl.constexpr, PURE: tl.constexpr,
):  # fmt: skip
    """One program: the end of one (request, KV head), or a split of its tiles of codes. part [B * Hkv, splits, group, dim], part_lse in base 2."""
    split, splits, unit = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    kv_heads: tl.constexpr = heads // group
    request, kv_head = unit // kv_heads, unit % kv_heads
    length = tl.load(lengths_ptr + request)
    k_stop = tl.minimum(tl.load(k_stop_ptr + request), length)
    v_stop = tl.minimum(tl.load(v_stop_ptr + request), length)
    tiles = tl.minimum(k_stop, v_stop) // BLOCK  # those of codes alone
    far = unit.to(tl.int64)
    ks, kz, vs, vz = ks_ptr + far * ks_stride, kz_ptr + far * ks_stride, vs_ptr + far * vs_stride, vz_ptr + far * vs_stride
    first_head = request * heads + kv_head * group
    at = (unit * splits + split) * group
    if split == 0:
        column, channel = tl.arange(0, COLUMNS), tl.arange(0, DIM)
        real = column < group
        held = real[None, :] & (channel < dim)[:, None]
        q = tl.load(q_ptr + (first_head + column)[None, :] * dim + channel[:, None], mask=held, other=0.0)
        base = kv_head * head_stride.to(tl.int64)
        end_top, end_total, acc = _mixed_tiles(
            q, k_ptr + base, v_ptr + base, table_ptr + request * table_stride, kw_ptr + far * kw_stride, ks, kz, vw_ptr + far * vw_stride, vs, vz,
            tiles * BLOCK, length, k_stop, v_stop, scale, dim, page, BITS, SYMMETRIC, KT, KC, VT, VC, COLUMNS, DIM, MIXED,
        )  # fmt: skip
        end_norm, end_lse = finish(end_top, end_total)
        tl.store(part_lse_ptr + at + column, end_lse, mask=real)
        tl.store(part_ptr + (at + column)[None, :] * dim + channel[:, None], acc / end_norm[None, :], mask=held)
    else:
        share = tl.cdiv(tiles, splits - 1)
        begin = (split - 1) * share
        per: tl.constexpr = 8 // BITS  # integers of four in a word
        top, total, a, b, c, d = code_tiles(
            q_ptr + first_head * dim, k4_ptr + far * kw_stride * per, ks, kz, v4_ptr + far * vw_stride * per, vs, vz,
            begin * BLOCK, tl.minimum(begin + share, tiles) * BLOCK, scale,
            group, dim, BITS, SYMMETRIC, KT, VC, SLOTS, HEADS, FOURS, BLOCK, STAGES, DTYPE, ASM, CONSTRAINTS, PACK, PURE,
        )  # fmt: skip
        norm, lse = finish(top, total)
        head, four = tl.arange(0, HEADS), tl.arange(0, FOURS)
        tl.store(part_lse_ptr + at + head, lse - BOOST, mask=head < group)
        target = part_ptr + (at + head)[:, None] * dim + 4 * four[None, :]
        inside = (head < group)[:, None] & (four < dim // 4)[None, :]
        norm = norm[:, None]
        tl.store(target, a / norm, mask=inside)
        tl.store(target + 1, b / norm, mask=inside)
        tl.store(target + 2, c / norm, mask=inside)
        tl.store(target + 3, d / norm, mask=inside)


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


def _tuning(k: Codes, group: int, dim: int, half: bool) -> dict:
    """Tile of codes: tokens, groups of tokens (slots) and heads per slot; pipeline stages, warps, most registers, programs per multiprocessor that
    the splits of all (request, KV head) add up to, and see triton_codes for ``pure``."""
    heads, tokens = triton.next_power_of_2(group), k.scheme.tokens
    if k.scheme.symmetric:
        slots, block = 1, 128 if half else 16
    else:
        slots = max(1, min(_ROWS // heads, _MOST_TOKENS // tokens)) if half else 1
        block = slots * tokens
    rows = max(slots * heads, _ROWS)
    # As many registers as let three programs of four warps run at once, or four, where that spills nothing.
    few = half and not k.scheme.symmetric and rows == _ROWS and tokens <= _MOST_TOKENS // 4 and dim <= 128
    two = k.scheme.bits == 2
    return {
        "slots": slots, "heads": rows // slots, "block": block, "stages": 3 if k.scheme.symmetric else 2, "warps": 4,
        "registers": (128 if two else 168) if few else None, "programs": 6 if k.scheme.symmetric else 8 if two else 3, "pure": k.scheme.symmetric,
    }  # fmt: skip


def _check(k: Codes, v: Codes, dim: int) -> None:
    """The schemes are those that the kernel is made for; raises UnsupportedError in one line."""
    one, other = k.scheme, v.scheme
    if one.symmetric:
        fits = one == other == Scheme(8, 1, dim, symmetric=True)
    else:
        sizes = (one.tokens, other.channels)
        fits = one.bits == other.bits < 8 and not other.symmetric and (one.channels, other.tokens) == (1, 1)
        fits = fits and all(size & (size - 1) == 0 and _LEAST_GROUP <= size <= _MOST_TOKENS for size in sizes)
    if not fits:
        raise UnsupportedError(
            f"codes {one} and {other}: triton kernels take symmetric ones of 8 bits with a scale per token, or keys of 2 or 4 bits in groups of "
            f"tokens and values in groups of channels, a power of two from {_LEAST_GROUP} to {_MOST_TOKENS} in a group"
        )


def attend_quantised(
    q: torch.Tensor, cache: PagedKVCache, layer: int, k: Codes, v: Codes, k_stop: torch.Tensor, v_stop: torch.Tensor, scale: float, **override
) -> State:
    """See quantised.attend_quantised. Float32 out and lse; no host synchronisation. ``override``: see ``_tuning``."""
    keys, values = cache.keys(layer), cache.values(layer)
    check(q, cache, layer)
    batch, heads, dim = q.shape
    _check(k, v, dim)
    kv_heads, _, page, _ = keys.shape
    units, group, bits = batch * kv_heads, heads // kv_heads, k.scheme.bits
    half = q.element_size() == 2 and not INTERPRETED
    knobs = _tuning(k, group, dim, half) | override
    wanted = processors(q.device) * knobs["programs"] // units
    splits = 1 + max(1, min(wanted, triton.cdiv(k.words.shape[2], knobs["block"]), _MAX_SPLITS))
    wide = triton.next_power_of_2(dim)
    part = torch.empty(units, splits, group, dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(units, splits, group, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, heads, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, heads, dtype=torch.float32, device=q.device)
    bfloat = k.scheme.symmetric and q.dtype == torch.bfloat16
    asm, constraints, pack = assembly(bits, bfloat) if half else (None, None, 1)
    four = {2: torch.uint8, 4: torch.int16, 8: torch.int32}[bits]
    with on_device(q):
        _attend_splits[(splits, units)](
            q.contiguous(), keys, values, cache.block_table, cache.lengths, k_stop, v_stop,
            k.words, k.scale, k.zero if k.zero is not None else k.scale, v.words, v.scale, v.zero if v.zero is not None else v.scale,
            k.words.view(four), v.words.view(four), part, part_lse, scale * LOG2E.value,
            cache.block_table.stride(0), keys.stride(0), k.words.stride(1), k.scale.stride(1), v.words.stride(1), v.scale.stride(1),
            heads=heads, group=group, dim=dim, page=page, BITS=bits, SYMMETRIC=k.scheme.symmetric,
            KT=k.scheme.tokens, KC=k.scheme.channels, VT=v.scheme.tokens, VC=v.scheme.channels,
            COLUMNS=max(16, triton.next_power_of_2(group)), DIM=wide, MIXED=_MIXED,
            SLOTS=knobs["slots"], HEADS=knobs["heads"], FOURS=max(16, wide // 4), BLOCK=knobs["block"], STAGES=knobs["stages"],
            DTYPE=tl.float32 if not half else tl.bfloat16 if bfloat else tl.float16, ASM=asm, CONSTRAINTS=constraints, PACK=pack,
            PURE=knobs["pure"],
            num_warps=knobs["warps"], maxnreg=knobs["registers"],
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
