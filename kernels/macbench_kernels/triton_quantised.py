"""Attention over quantised keys and values, and the quantisation of one row per step.

Programs walk equal shares of all tiles, and keys are rows and heads are columns, as in triton_attend. Codes become half-precision numbers in two
or three instructions for two of them (see ``_assembly``) and go to the matrix units as they are; parameters are applied where they cost least:

* a key's scale per channel multiplies the query, one copy of it for each group of tokens in a tile: column (slot, head) then holds the scores of
  slot's tokens, with zero points as one number per column, and has a softmax of its own. The merging kernel joins slots like pieces;
* a scale per token multiplies scores, or probabilities;
* a value's scale and zero per group of channels take part in the conversion, one instruction for two of them.

Tiles that hold anything else than codes, at the end of a request, go through a plain loop of small tiles.
"""

import struct
from functools import cache

import torch
import triton
import triton.language as tl

from macbench_kernels.cache import PagedKVCache
from macbench_kernels.dispatch import UnsupportedError
from macbench_kernels.quantised import SMALLEST_SCALE, Codes
from macbench_kernels.state import State
from macbench_kernels.triton_attend import _merge_pieces, _place, merging
from macbench_kernels.triton_common import (
    INTERPRETED,
    LOG2E,
    check,
    dependent_launch,
    finish,
    follow,
    launch_options,
    on_device,
    processors,
)

# Requests times KV heads whose tile counts a program sums up together.
_PROLOGUE_UNITS = 1024
# Probabilities are kept 2^8 times as large, so that small ones survive in half precision.
_BOOST: tl.constexpr = tl.constexpr(8.0)
# Queries of at most 2 times scales are kept 2^4 times as large for the same reason, bare bits are 2^24 times too small.
_LIFT: tl.constexpr = tl.constexpr(4.0)
_RAW: tl.constexpr = tl.constexpr(2.0**20)


def _twice(x: float) -> str:
    """Two half-precision numbers in a register."""
    bits = struct.unpack("<H", struct.pack("<e", x))[0]
    return f"0x{bits << 16 | bits:08x}"


@cache
def _assembly(bits: int, kind: str) -> tuple[str, str]:
    """PTX that turns four bytes of codes into half-precision numbers, and its constraints. One result of four for each of a byte's 8 / bits fields.

    ``kind``: *raw*, a field f as 2^(bits f - 24) times its code, which is the bare bits as a subnormal number; *signed*, 8-bit codes minus
    128; *scaled*, code * scale + zero with two more operands of four numbers each. The latter put codes under the exponent of 1024.
    """
    fields = 8 // bits
    words, lines = 2 * fields, [".reg .b32 part, base, step, back;"]
    for field in range(fields):
        mask = (2**bits - 1) << bits * field
        lines.append(f"and.b32 part, ${words}, 0x{mask * 0x01010101:08x};")
        lines.append(f"mov.b32 base, {'0' if kind == 'raw' else '0x64646464'};")
        for half, order in enumerate(("0x4140", "0x4342")):
            out = f"${2 * field + half}"
            lines.append(f"prmt.b32 {out}, part, base, {order};")
            if kind == "signed":
                lines += [f"mov.b32 back, {_twice(-1152)};", f"add.rn.f16x2 {out}, {out}, back;"]
            if kind == "scaled":
                small = 2.0 ** -(bits * field)
                lines += [f"mov.b32 step, {_twice(small)};", f"mov.b32 back, {_twice(-1024 * small)};", f"fma.rn.f16x2 {out}, {out}, step, back;"]
                lines.append(f"fma.rn.f16x2 {out}, {out}, ${words + 1 + half}, ${words + 3 + half};")
    # Results are written before all operands have been read.
    constraints = ["=&r"] * words + ["r"] * (5 if kind == "scaled" else 1)
    return "{ " + " ".join(lines) + " }", ",".join(constraints)


@triton.jit
def _interleaved(a, b, c, d, BITS: tl.constexpr):
    """Fields of bytes, the lowest first, as a last axis."""
    if BITS == 4:
        fields = tl.join(a, b)
    else:
        fields = tl.join(tl.join(a, c), tl.join(b, d))
    return fields


@triton.jit
def _keys(codes, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Codes in bytes [n, groups, m] as numbers [n, groups * m * 8 / BITS]: float32 without ASM, else as it makes them."""
    most: tl.constexpr = (1 << BITS) - 1
    if BITS == 8:
        if ASM is None:
            x = codes.to(tl.float32) - (128.0 if SYMMETRIC else 0.0)
        else:
            x = tl.inline_asm_elementwise(ASM, CONSTRAINTS, [codes], dtype=tl.float16, is_pure=True, pack=4)
    else:
        if ASM is None:
            x = codes.to(tl.int32)
            fields = _interleaved(x & most, (x >> BITS) & most, (x >> 2 * BITS) & most, (x >> 3 * BITS) & most, BITS).to(tl.float32)
        elif BITS == 4:
            a, b = tl.inline_asm_elementwise(ASM, CONSTRAINTS, [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=4)
            fields = _interleaved(a, b, a, b, BITS)
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                ASM, CONSTRAINTS, [codes], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=4
            )  # fmt: skip
            fields = _interleaved(a, b, c, d, BITS)
        x = fields
    return tl.reshape(x, [codes.shape[0], codes.shape[1] * codes.shape[2] * (8 // BITS)])


@triton.jit
def _values(codes, scale, zero, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, BITS: tl.constexpr):
    """Codes in bytes [n, groups, m] with parameters [n, groups] as values [n, groups * m * 8 / BITS]."""
    if ASM is None:
        most: tl.constexpr = (1 << BITS) - 1
        x = codes.to(tl.int32)
        fields = _interleaved(x & most, (x >> BITS) & most, (x >> 2 * BITS) & most, (x >> 3 * BITS) & most, BITS).to(tl.float32)
        step, low = scale.to(tl.float32)[:, :, None], zero.to(tl.float32)[:, :, None]
        fields = tl.reshape(fields, [codes.shape[0], codes.shape[1], codes.shape[2] * (8 // BITS)]) * step + low
    else:
        step, low = tl.broadcast_to(scale[:, :, None], codes.shape), tl.broadcast_to(zero[:, :, None], codes.shape)
        if BITS == 4:
            a, b = tl.inline_asm_elementwise(ASM, CONSTRAINTS, [codes, step, low], dtype=(tl.float16, tl.float16), is_pure=True, pack=4)
            fields = _interleaved(a, b, a, b, BITS)
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                ASM, CONSTRAINTS, [codes, step, low], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=4
            )  # fmt: skip
            fields = _interleaved(a, b, c, d, BITS)
    return tl.reshape(fields, [codes.shape[0], codes.shape[1] * codes.shape[2] * (8 // BITS)])


@triton.jit
def _softmax(score, top, weight):
    """(p, fade, new top, new weight) of scores in base 2 [n, c] after ``top`` [c]; p is 2^_BOOST times as large as it should be."""
    new_top = tl.maximum(top, tl.max(score, 0))
    pivot = tl.where(new_top == float("-inf"), 0.0, new_top) - _BOOST
    p = tl.exp2(score - pivot[None, :])
    fade = tl.exp2(top - pivot - _BOOST)
    return p, fade, new_top, weight * fade + tl.sum(p, 0)


@triton.jit
def _code_loop(
    q, top, total, acc, kw_ptr, ks_ptr, kz_ptr, vw_ptr, vs_ptr, vz_ptr, begin, end, factor,
    dim: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, KT: tl.constexpr, VC: tl.constexpr,
    SLOTS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, HALF: tl.constexpr,
    K_ASM: tl.constexpr, K_CONSTRAINTS: tl.constexpr, V_ASM: tl.constexpr, V_CONSTRAINTS: tl.constexpr,
):  # fmt: skip
    """Softmax sums (top [c], total [c], acc [DIM, c]) with the tokens [begin, end) of codes added; both multiples of BLOCK.

    q [DIM, SLOTS, HEADS], prepared; ``factor`` [c] makes scores in base 2 of its products. c = SLOTS * HEADS.
    """
    columns: tl.constexpr = SLOTS * HEADS
    fields: tl.constexpr = 8 // BITS
    row_bytes: tl.constexpr = dim // fields
    channel, slot = tl.arange(0, DIM), tl.arange(0, SLOTS)
    place = tl.arange(0, BLOCK)
    if SYMMETRIC:
        # Three axes keep the compiler from asking for single bytes in the order of the matrix units.
        part, inner = tl.arange(0, DIM // 16), tl.arange(0, 16)
        whole = tl.reshape(q, [DIM, columns])
        if HALF:
            whole = whole.to(tl.float16)
    else:
        groups: tl.constexpr = DIM // VC
        group, inner = tl.arange(0, groups), tl.arange(0, VC // fields)
        part = group
        # A byte's upper fields come 2^BITS, 2^2 BITS .. times too large.
        lift = tl.exp2((channel % fields).to(tl.float32) * -BITS + _LIFT)
        # Which column a token's scores belong to.
        other = tl.where((place // KT)[:, None] == (tl.arange(0, columns) // HEADS)[None, :], 0.0, float("-inf"))
    for block in tl.range(begin, end, BLOCK, num_stages=STAGES):
        token = block + place
        within = part[None, :, None] * inner.shape[0] + inner[None, None, :]
        at = token[:, None, None] * row_bytes + within
        if dim == DIM:
            k_codes = tl.load(kw_ptr + at)
        else:
            k_codes = tl.load(kw_ptr + at, mask=within < row_bytes, other=0)
        k = _keys(k_codes, K_ASM, K_CONSTRAINTS, BITS, SYMMETRIC)
        if SYMMETRIC:
            score = tl.dot(k, whole, input_precision="ieee") * (tl.load(ks_ptr + token)[:, None] * factor[None, :])
            p, fade, top, total = _softmax(score, top, total)
            if dim == DIM:
                v_codes = tl.load(vw_ptr + at)
            else:
                v_codes = tl.load(vw_ptr + at, mask=within < row_bytes, other=0)
            v = _keys(v_codes, K_ASM, K_CONSTRAINTS, BITS, SYMMETRIC)
            p *= tl.load(vs_ptr + token)[:, None]
        else:
            parameter = (block // KT + slot)[None, :] * dim + channel[:, None]
            inside = (channel < dim)[:, None] & (slot < SLOTS)[None, :]
            step = tl.load(ks_ptr + parameter, mask=inside, other=0.0).to(tl.float32)
            low = tl.load(kz_ptr + parameter, mask=inside, other=0.0).to(tl.float32)
            zero = tl.reshape(tl.sum(q * low[:, :, None], 0), [columns])
            scaled = tl.reshape(q * step[:, :, None], [DIM, columns])
            if HALF:
                score = tl.dot(k, (scaled * lift[:, None]).to(tl.float16)) * (factor * _RAW)[None, :]
            else:
                score = tl.dot(k, scaled, input_precision="ieee") * factor[None, :]
            p, fade, top, total = _softmax(score + (zero * factor)[None, :] + other, top, total)
            params = token[:, None] * (dim // VC) + group[None, :]
            if dim == DIM:
                v_codes, v_step, v_low = tl.load(vw_ptr + at), tl.load(vs_ptr + params), tl.load(vz_ptr + params)
            else:
                known = (group < dim // VC)[None, :]
                v_codes = tl.load(vw_ptr + at, mask=known[:, :, None], other=0)
                v_step, v_low = tl.load(vs_ptr + params, mask=known, other=0.0), tl.load(vz_ptr + params, mask=known, other=0.0)
            v = _values(v_codes, v_step, v_low, V_ASM, V_CONSTRAINTS, BITS)
        acc = tl.dot(tl.trans(v), p.to(v.dtype), acc * fade[None, :], input_precision="ieee")
    return top, total, acc


@triton.jit
def _plain_loop(
    q, top, total, acc, k_ptr, v_ptr, table_ptr, kw_ptr, ks_ptr, kz_ptr, vw_ptr, vs_ptr, vz_ptr, begin, end, k_stop, v_stop, factor,
    dim: tl.constexpr, page: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, KT: tl.constexpr, VC: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same for any tokens [begin, end), of which keys below ``k_stop`` and values below ``v_stop`` are codes. q [DIM, c] as it is;
    ``factor`` [c]: scale in base 2, -inf in columns that are not to be used."""
    channel = tl.arange(0, DIM)[None, :]
    for block in tl.range(begin, end, BLOCK, num_stages=1):
        token = block + tl.arange(0, BLOCK)
        late = (token < end) & (token >= tl.minimum(k_stop, v_stop))
        row = tl.load(table_ptr + token // page, mask=late, other=0).to(tl.int64) * page + token % page
        at = row[:, None] * dim + channel
        here = (token < end)[:, None] & (channel < dim)
        k = tl.load(k_ptr + at, mask=here & (token >= k_stop)[:, None], other=0.0)
        v = tl.load(v_ptr + at, mask=here & (token >= v_stop)[:, None], other=0.0)
        if SYMMETRIC:
            old_k = _plain(kw_ptr, ks_ptr, ks_ptr, token, channel, here & (token < k_stop)[:, None], 1, dim, dim, BITS, True)
            old_v = _plain(vw_ptr, vs_ptr, vs_ptr, token, channel, here & (token < v_stop)[:, None], 1, dim, dim, BITS, True)
        else:
            old_k = _plain(kw_ptr, ks_ptr, kz_ptr, token, channel, here & (token < k_stop)[:, None], KT, 1, dim, BITS, False)
            old_v = _plain(vw_ptr, vs_ptr, vz_ptr, token, channel, here & (token < v_stop)[:, None], 1, VC, dim, BITS, False)
        k = tl.where((token >= k_stop)[:, None], k, old_k.to(k.dtype))
        v = tl.where((token >= v_stop)[:, None], v, old_v.to(v.dtype))
        used = (token < end)[:, None] & (factor > float("-inf"))[None, :]
        score = tl.where(used, tl.dot(k, q, input_precision="ieee") * factor[None, :], float("-inf"))
        p, fade, top, total = _softmax(score, top, total)
        acc = tl.dot(tl.trans(v), p.to(v.dtype), acc * fade[None, :], input_precision="ieee")
    return top, total, acc


@triton.jit
def _plain(
    words_ptr, scale_ptr, zero_ptr, token, channel, mask,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, dim: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """float32 values of tokens [n] and channels [1, m], one load of everything for each."""
    fields: tl.constexpr = 8 // BITS
    codes = tl.load(words_ptr + token[:, None] * (dim // fields) + channel // fields, mask=mask, other=0).to(tl.int32)
    codes = (codes >> (channel % fields) * BITS) & ((1 << BITS) - 1)
    at = (token // TOKENS)[:, None] * (dim // CHANNELS) + channel // CHANNELS
    step = tl.load(scale_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if SYMMETRIC:
        return (codes - (1 << (BITS - 1))).to(tl.float32) * step
    return codes.to(tl.float32) * step + tl.load(zero_ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _tile_count(unit, units, lengths_ptr, kv_heads: tl.constexpr, BLOCK: tl.constexpr):
    return tl.cdiv(tl.load(lengths_ptr + unit // kv_heads, mask=unit < units, other=0), BLOCK)


@triton.jit
def _attend_codes(
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, k_stop_ptr, v_stop_ptr, kw_ptr, ks_ptr, kz_ptr, vw_ptr, vs_ptr, vz_ptr,
    part_ptr, part_lse_ptr, before_ptr, scale, units, table_stride, head_stride, kw_stride, ks_stride, vw_stride, vs_stride,
    heads: tl.constexpr, group: tl.constexpr, dim: tl.constexpr, page: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
    KT: tl.constexpr, VC: tl.constexpr, SLOTS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, PLAIN: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr, HALF: tl.constexpr,
    K_ASM: tl.constexpr, K_CONSTRAINTS: tl.constexpr, V_ASM: tl.constexpr, V_CONSTRAINTS: tl.constexpr,
):  # fmt: skip
    """One program: one share of the tiles of all (request, KV head). before [units + 1]; part [pieces, SLOTS * group, dim], see triton_attend."""
    follow(EARLY)
    program, programs = tl.program_id(0), tl.num_programs(0)
    kv_heads: tl.constexpr = heads // group
    columns: tl.constexpr = SLOTS * HEADS
    lane = tl.arange(0, CHUNK)
    total = tl.sum(_tile_count(lane, units, lengths_ptr, kv_heads, BLOCK), 0)
    for chunk in range(1, CHUNKS):
        total += tl.sum(_tile_count(chunk * CHUNK + lane, units, lengths_ptr, kv_heads, BLOCK), 0)
    share = tl.cdiv(total, programs)
    begin = program * share
    end = tl.minimum(begin + share, total)
    count = _tile_count(lane, units, lengths_ptr, kv_heads, BLOCK)
    first_unit, at, last_unit = _place(lane, count, units, 0, begin, end, before_ptr)
    passed = tl.sum(count, 0)
    for chunk in range(1, CHUNKS):
        count = _tile_count(chunk * CHUNK + lane, units, lengths_ptr, kv_heads, BLOCK)
        first, over, last = _place(chunk * CHUNK + lane, count, units, passed, begin, end, before_ptr)
        first_unit, last_unit, at, passed = first_unit + first, last_unit + last, tl.maximum(at, over), passed + tl.sum(count, 0)
    if program == 0:
        tl.store(before_ptr + units, total)

    channel = tl.arange(0, DIM)
    column = tl.arange(0, columns)
    member, slot = column % HEADS, column // HEADS
    if begin < end:
        for unit in range(first_unit, last_unit):
            request, kv_head = unit // kv_heads, unit % kv_heads
            length = tl.load(lengths_ptr + request)
            k_stop = tl.minimum(tl.load(k_stop_ptr + request), length)
            v_stop = tl.minimum(tl.load(v_stop_ptr + request), length)
            first_token = tl.maximum(begin - at, 0) * BLOCK
            end_token = tl.minimum((end - at) * BLOCK, length)
            at += tl.cdiv(length, BLOCK)
            if first_token < end_token:
                far = tl.zeros([], tl.int64) + unit
                kw, ks, kz = kw_ptr + far * kw_stride, ks_ptr + far * ks_stride, kz_ptr + far * ks_stride
                vw, vs, vz = vw_ptr + far * vw_stride, vs_ptr + far * vs_stride, vz_ptr + far * vs_stride
                first_head = request * heads + kv_head * group
                q_at = q_ptr + (first_head + member)[None, :] * dim + channel[:, None]
                q = tl.load(q_at, mask=(member < group)[None, :] & (channel < dim)[:, None], other=0.0)
                # Queries in units of a power of two of their own, so that half precision holds them exactly.
                largest = tl.maximum(tl.max(tl.abs(q.to(tl.float32)), 0), 1e-30)
                unit_of = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
                spread = tl.reshape(q.to(tl.float32) / unit_of[None, :], [DIM, SLOTS, HEADS])
                top = tl.full([columns], float("-inf"), tl.float32)
                total_weight = tl.zeros([columns], tl.float32)
                acc = tl.zeros([DIM, columns], tl.float32)
                pure = tl.minimum(tl.minimum(k_stop, v_stop) // BLOCK * BLOCK, end_token)  # tiles up to here are of codes alone
                top, total_weight, acc = _code_loop(
                    spread, top, total_weight, acc, kw, ks, kz, vw, vs, vz, first_token, pure, scale * unit_of,
                    dim, BITS, SYMMETRIC, KT, VC, SLOTS, HEADS, DIM, BLOCK, STAGES, HALF, K_ASM, K_CONSTRAINTS, V_ASM, V_CONSTRAINTS,
                )  # fmt: skip
                base = kv_head * head_stride.to(tl.int64)
                top, total_weight, acc = _plain_loop(
                    q, top, total_weight, acc, k_ptr + base, v_ptr + base, table_ptr + request * table_stride, kw, ks, kz, vw, vs, vz,
                    tl.maximum(first_token, pure), end_token, k_stop, v_stop, tl.where(slot == 0, scale, float("-inf")),
                    dim, page, BITS, SYMMETRIC, KT, VC, DIM, PLAIN,
                )  # fmt: skip
                norm, lse = finish(top - _BOOST, total_weight)
                real = member < group
                target = ((program + unit) * SLOTS + slot) * group + member
                tl.store(part_lse_ptr + target, lse, mask=real)
                tl.store(
                    part_ptr + target[None, :] * dim + channel[:, None], acc / norm[None, :], mask=real[None, :] & (channel < dim)[:, None],
                )  # fmt: skip


def tuning(symmetric: bool, half: bool, group: int, dim: int) -> dict:
    """Tokens per tile, stages, warps, programs per multiprocessor, and perhaps registers per thread; without matrix units small tiles, for tests.

    Long tiles of groups of tokens have more columns; those of more than 4 heads, or of wide heads, would not fit registers.
    """
    if not half:
        return {"block": 16, "stages": 1, "warps": 4, "occupancy": 1}
    if symmetric:
        return {"block": 64, "stages": 3, "warps": 4, "occupancy": 3 if dim <= 128 else 1}
    long = group <= 4 and dim <= 128
    return {"block": 128 if long else 64, "stages": 3, "warps": 4, "occupancy": 2 if dim <= 128 else 1}


def attend_quantised(
    q: torch.Tensor, cache: PagedKVCache, layer: int, k: Codes, v: Codes, k_stop: torch.Tensor, v_stop: torch.Tensor, scale: float, **override
) -> State:
    """See quantised.attend_quantised. Float32 out and lse; no host synchronisation. Keys in groups of tokens and values in groups of channels,
    or both symmetric in groups of a whole row. ``override``: see ``tuning``."""
    keys, values = cache.keys(layer), cache.values(layer)
    check(q, cache, layer)
    batch, heads, dim = q.shape
    kv_heads, _, page, _ = keys.shape
    symmetric, bits = k.scheme.symmetric, k.scheme.bits
    shapes = (k.scheme.tokens, k.scheme.channels, v.scheme.tokens, v.scheme.channels)
    wanted = (1, dim, 1, dim) if symmetric else (k.scheme.tokens, 1, 1, v.scheme.channels)
    if shapes != wanted or (v.scheme.bits, v.scheme.symmetric) != (bits, symmetric) or symmetric != (bits == 8):
        raise UnsupportedError(
            f"{k.scheme} and {v.scheme}: triton kernels take 2 or 4 bits in groups of n x 1 and 1 x n, or symmetric 8 bits in groups of 1 x {dim}"
        )
    units, group = batch * kv_heads, heads // kv_heads
    half = q.element_size() == 2
    knobs = tuning(symmetric, half, group, dim) | override
    block = max(knobs["block"], k.scheme.tokens)
    slots = 1 if symmetric else block // k.scheme.tokens
    wide = max(triton.next_power_of_2(group), 16 // slots)
    programs = max(1, min(processors(q.device) * knobs["occupancy"], units * triton.cdiv(cache.block_table.shape[1] * page, block)))
    part = torch.empty((programs + units) * slots, group, dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty((programs + units) * slots, group, dtype=torch.float32, device=q.device)
    before = torch.empty(units + 1, dtype=torch.int32, device=q.device)
    out = torch.empty(batch, heads, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, heads, dtype=torch.float32, device=q.device)
    k_asm, v_asm = ((None, None), (None, None))
    if half and not INTERPRETED:
        k_asm, v_asm = _assembly(bits, "signed" if symmetric else "raw"), _assembly(bits, "signed" if symmetric else "scaled")
    early = dependent_launch(q.device)
    chunk = max(16, min(triton.next_power_of_2(units), _PROLOGUE_UNITS))
    k_words, v_words = k.words.view(torch.uint8), v.words.view(torch.uint8)
    with on_device(q):
        _attend_codes[(programs,)](
            q.contiguous(), keys, values, cache.block_table, cache.lengths, k_stop, v_stop,
            k_words, k.scale, k.scale if symmetric else k.zero, v_words, v.scale, v.scale if symmetric else v.zero,
            part, part_lse, before, scale * LOG2E.value, units,
            cache.block_table.stride(0), keys.stride(0), k_words.stride(1), k.scale.stride(1), v_words.stride(1), v.scale.stride(1),
            heads=heads, group=group, dim=dim, page=page, BITS=bits, SYMMETRIC=symmetric, KT=k.scheme.tokens, VC=v.scheme.channels,
            SLOTS=slots, HEADS=wide, DIM=triton.next_power_of_2(dim), BLOCK=block, PLAIN=32 if half else 16,
            CHUNK=chunk, CHUNKS=triton.cdiv(units, chunk), STAGES=knobs["stages"], EARLY=early, HALF=k_asm[0] is not None,
            K_ASM=k_asm[0], K_CONSTRAINTS=k_asm[1], V_ASM=v_asm[0], V_CONSTRAINTS=v_asm[1],
            num_warps=knobs["warps"], maxnreg=knobs.get("registers"), **launch_options(early),
        )  # fmt: skip
        slices, tile = merging(dim, batch * heads)
        _merge_pieces[(batch * heads, slices, 1)](
            part, part_lse, before, out, lse, batch * heads, units, programs, programs, 1,
            group=group, dim=dim, COUNT=1, SLOTS=slots, EARLY=early, **tile, **launch_options(early),
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
