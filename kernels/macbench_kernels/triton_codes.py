"""Softmax sums over tiles of codes. Heads are rows and tokens are columns, so that codes go to the matrix units in the order in which they lie.

* Four neighbouring codes are one integer of 8, 16 or 32 bits. Field f of all of them is a plane, the channels 4 j + f, with a product of its own;
* codes become half-precision numbers two at a time by byte permutes and bit operations (see ``assembly``);
* a scale per token multiplies scores, or probabilities; a key's scale per channel multiplies the query, one copy of it for each group of tokens
  in a tile: row (slot, head) holds the scores of slot's tokens, its zero points are one number, and slots meet at the end;
* a value's scale and zero are one more instruction for two of them.
"""

from functools import cache

import triton
import triton.language as tl

# Probabilities are kept 2^6 times as large: half precision then holds small ones, and still their product with any scale (at most 65504 / 127).
BOOST: tl.constexpr = tl.constexpr(6.0)
_MULTIPLY_ADD: tl.constexpr = tl.constexpr("fma.rn.f16x2 $0, $1, $2, $3;")


@cache
def assembly(bits: int, bfloat: bool) -> tuple[str, str, int]:
    """PTX that turns elements of four codes into four half-precision numbers each, its constraints, and how many elements it takes at once.

    Codes of 2 and 4 bits become the first bits behind the point of 1, so 1 + code / 2^bits. Those of 8 bits become code - 128: they are put under
    the exponent of 1024, and 1152 is taken away; for bfloat16, which has room for 7 bits only, under that of 128, and 256 is taken away or,
    with the uppermost bit, 128.
    """
    halves = 2 if bits == 2 else 1
    source = 4 * halves
    lines = [".reg .b32 part, high, back, one;"]
    if bits == 8:
        lines += ["mov.b32 back, 0xbf80bf80;"] if bfloat else ["mov.b32 back, 0xe480e480;", "mov.b32 one, 0x3c003c00;"]
    for field in range(4):
        outs = [f"${halves * field + half}" for half in range(halves)]
        if bits == 8:
            lines.append(f"prmt.b32 part, ${source}, ${source + 1}, 0x{0x4400 + 0x1111 * field:04x};")
            if bfloat:
                lines.append("lop3.b32 high, part, 0x00800080, 0x43804380, 0x6a;")  # (a & b) ^ c
                lines.append("lop3.b32 part, part, 0x007f007f, 0x43004300, 0xea;")  # (a & b) | c
                lines.append(f"fma.rn.bf16x2 {outs[0]}, high, back, part;")
            else:
                lines.append("lop3.b32 part, part, 0x00ff00ff, 0x64006400, 0xea;")
                lines.append(f"fma.rn.f16x2 {outs[0]}, part, one, back;")
        elif bits == 4:
            lines.append(f"sh{'l.b32' if field < 2 else 'r.u32'} part, ${source}, {abs(6 - 4 * field)};")
            lines.append(f"lop3.b32 {outs[0]}, part, 0x03c003c0, 0x3c003c00, 0xea;")
        else:
            if field:
                lines.append(f"shr.u32 part, ${source}, {2 * field};")
            lines.append(f"lop3.b32 part, {'part' if field else f'${source}'}, 0x03030303, 0x3c3c3c3c, 0xea;")
            for out, order in zip(outs, ("0x1404", "0x3424"), strict=True):
                lines.append(f"prmt.b32 {out}, part, 0, {order};")
    # Results are written before all operands have been read.
    constraints = ["=&r"] * source + ["r"] * (2 if bits == 8 else 1)
    return "{ " + " ".join(lines) + " }", ",".join(constraints), 4 if bits == 2 else 2


@triton.jit
def _planes(
    codes, DTYPE: tl.constexpr, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, PACK: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
    PURE: tl.constexpr,
):  # fmt: skip
    """What ``assembly`` says of the four codes of each integer: numbers of DTYPE.

    PURE assembly runs behind the exchange that brings codes into the order of the matrix units, which suits whole words. Impure assembly stays
    before it: single bytes would be exchanged one by one.
    """
    if ASM is None:
        most: tl.constexpr = (1 << BITS) - 1
        unit: tl.constexpr = 1.0 if SYMMETRIC else 1.0 / (1 << BITS)
        add: tl.constexpr = -float(1 << (BITS - 1)) if SYMMETRIC else 1.0
        whole = codes.to(tl.int32)
        a, b = (whole & most).to(DTYPE) * unit + add, ((whole >> BITS) & most).to(DTYPE) * unit + add
        c, d = ((whole >> 2 * BITS) & most).to(DTYPE) * unit + add, ((whole >> 3 * BITS) & most).to(DTYPE) * unit + add
    elif tl.bfloat16 == DTYPE:
        a, b, c, d = tl.inline_asm_elementwise(
            ASM, CONSTRAINTS, [codes], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=PURE, pack=PACK
        )  # fmt: skip
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            ASM, CONSTRAINTS, [codes], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=PURE, pack=PACK
        )  # fmt: skip
    return a, b, c, d


@triton.jit
def _scaled(x, step, low, ASM: tl.constexpr):
    """x * step + low in the type of x."""
    if ASM is None:
        y = x * step + low
    else:
        y = tl.inline_asm_elementwise(_MULTIPLY_ADD, "=r,r,r,r", [x, step, low], dtype=tl.float16, is_pure=True, pack=2)
    return y


@triton.jit
def _scores(qa, qb, qc, qd, ka, kb, kc, kd):
    """Queries [ROWS, channels] times keys [BLOCK, channels], summed over the planes."""
    score = tl.dot(qa, tl.trans(ka), input_precision="ieee")
    score = tl.dot(qb, tl.trans(kb), score, input_precision="ieee")
    score = tl.dot(qc, tl.trans(kc), score, input_precision="ieee")
    return tl.dot(qd, tl.trans(kd), score, input_precision="ieee")


@triton.jit
def _widened(x, WIDE: tl.constexpr):
    """Parameters [BLOCK, groups] -> [BLOCK, groups * WIDE]."""
    return tl.reshape(tl.broadcast_to(x[:, :, None], [x.shape[0], x.shape[1], WIDE]), [x.shape[0], x.shape[1] * WIDE])


@triton.jit
def _fields(x, SLOTS: tl.constexpr, FOURS: tl.constexpr):
    """[SLOTS, 4 * FOURS] -> four of [SLOTS, 1, FOURS] in float32: every fourth channel from 0, 1, 2, 3 on."""
    even, odd = tl.split(tl.reshape(x.to(tl.float32), [SLOTS, 1, FOURS, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def code_tiles(
    q_ptr, kw_ptr, ks_ptr, kz_ptr, vw_ptr, vs_ptr, vz_ptr, begin, end, scale,
    group: tl.constexpr, dim: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, KT: tl.constexpr, VC: tl.constexpr,
    SLOTS: tl.constexpr, HEADS: tl.constexpr, FOURS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    DTYPE: tl.constexpr, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, PACK: tl.constexpr, PURE: tl.constexpr,
):  # fmt: skip
    """Softmax sums (top [HEADS], total [HEADS], four planes of acc [HEADS, FOURS]) over the tokens [begin, end) of codes, both multiples of BLOCK.

    Pointers are of one (request, KV head), of codes to integers of four.
    """
    fours: tl.constexpr = dim // 4
    levels: tl.constexpr = 1 << BITS
    four, slot, head, place = tl.arange(0, FOURS), tl.arange(0, SLOTS), tl.arange(0, HEADS), tl.arange(0, BLOCK)
    ROWS: tl.constexpr = SLOTS * HEADS
    real = (head < group)[None, :, None] & (four < fours)[None, None, :]
    at = q_ptr + head[None, :, None] * dim + 4 * four[None, None, :]
    qa, qb = tl.load(at, mask=real, other=0.0), tl.load(at + 1, mask=real, other=0.0)
    qc, qd = tl.load(at + 2, mask=real, other=0.0), tl.load(at + 3, mask=real, other=0.0)
    if SYMMETRIC:
        qa, qb = tl.reshape(qa, [ROWS, FOURS]).to(DTYPE), tl.reshape(qb, [ROWS, FOURS]).to(DTYPE)
        qc, qd = tl.reshape(qc, [ROWS, FOURS]).to(DTYPE), tl.reshape(qd, [ROWS, FOURS]).to(DTYPE)
    else:
        qa, qb, qc, qd = qa.to(tl.float32), qb.to(tl.float32), qc.to(tl.float32), qd.to(tl.float32)
        # Whose scores a row holds.
        other = tl.where((tl.arange(0, ROWS) // HEADS)[:, None] == (place // KT)[None, :], 0.0, float("-inf"))
        channel = tl.arange(0, 4 * FOURS)
        pair = tl.arange(0, 4 * FOURS // VC)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out_a, out_b = tl.zeros([ROWS, FOURS], tl.float32), tl.zeros([ROWS, FOURS], tl.float32)
    out_c, out_d = tl.zeros([ROWS, FOURS], tl.float32), tl.zeros([ROWS, FOURS], tl.float32)
    for block in tl.range(begin, end, BLOCK, num_stages=STAGES):
        token = block + place
        codes = token[:, None] * fours + four[None, :]
        if fours == FOURS:
            k_codes, v_codes = tl.load(kw_ptr + codes), tl.load(vw_ptr + codes)
        else:
            known = (four < fours)[None, :]
            k_codes, v_codes = tl.load(kw_ptr + codes, mask=known, other=0), tl.load(vw_ptr + codes, mask=known, other=0)
        ka, kb, kc, kd = _planes(k_codes, DTYPE, ASM, CONSTRAINTS, PACK, BITS, SYMMETRIC, PURE)
        if SYMMETRIC:
            score = _scores(qa, qb, qc, qd, ka, kb, kc, kd)
            score *= (tl.load(ks_ptr + token) * scale)[None, :]
        else:
            params = (block // KT + slot)[:, None] * dim + channel[None, :]
            if fours == FOURS:
                k_step, k_low = tl.load(ks_ptr + params), tl.load(kz_ptr + params)
            else:
                inside = (channel < dim)[None, :] & (slot < SLOTS)[:, None]
                k_step, k_low = tl.load(ks_ptr + params, mask=inside, other=0.0), tl.load(kz_ptr + params, mask=inside, other=0.0)
            sa, sb, sc, sd = _fields(k_step, SLOTS, FOURS)
            za, zb, zc, zd = _fields(k_low, SLOTS, FOURS)
            sa, sb, sc, sd = (qa * sa * levels).to(DTYPE), (qb * sb * levels).to(DTYPE), (qc * sc * levels).to(DTYPE), (qd * sd * levels).to(DTYPE)
            # Each number is 1 more than the code's share of ``levels``: the sum of the rounded products is taken away again.
            zero = qa * za - sa.to(tl.float32) + qb * zb - sb.to(tl.float32) + qc * zc - sc.to(tl.float32) + qd * zd - sd.to(tl.float32)
            zero = tl.reshape(tl.sum(zero, 2), [ROWS])
            sa, sb = tl.reshape(sa, [ROWS, FOURS]), tl.reshape(sb, [ROWS, FOURS])
            sc, sd = tl.reshape(sc, [ROWS, FOURS]), tl.reshape(sd, [ROWS, FOURS])
            score = _scores(sa, sb, sc, sd, ka, kb, kc, kd)
            score = (score + zero[:, None]) * scale + other
        new_top = tl.maximum(top, tl.max(score, 1))
        p = tl.exp2(score - (new_top - BOOST)[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(p, 1)
        top = new_top
        va, vb, vc, vd = _planes(v_codes, DTYPE, ASM, CONSTRAINTS, PACK, BITS, SYMMETRIC, PURE)
        if SYMMETRIC:
            p *= tl.load(vs_ptr + token)[None, :]
        else:
            params = token[:, None] * (dim // VC) + pair[None, :]
            if fours == FOURS:
                v_step, v_low = tl.load(vs_ptr + params), tl.load(vz_ptr + params)
            else:
                known = (pair < dim // VC)[None, :]
                v_step, v_low = tl.load(vs_ptr + params, mask=known, other=0.0), tl.load(vz_ptr + params, mask=known, other=0.0)
            v_step, v_low = v_step.to(DTYPE) * levels, v_low.to(DTYPE)
            v_step, v_low = _widened(v_step, VC // 4), _widened(v_low - v_step, VC // 4)
            va, vb = _scaled(va, v_step, v_low, ASM), _scaled(vb, v_step, v_low, ASM)
            vc, vd = _scaled(vc, v_step, v_low, ASM), _scaled(vd, v_step, v_low, ASM)
        p, fade = p.to(DTYPE), fade[:, None]
        out_a = tl.dot(p, va, out_a * fade, input_precision="ieee")
        out_b = tl.dot(p, vb, out_b * fade, input_precision="ieee")
        out_c = tl.dot(p, vc, out_c * fade, input_precision="ieee")
        out_d = tl.dot(p, vd, out_d * fade, input_precision="ieee")
    # Slots meet.
    top = tl.reshape(top, [SLOTS, HEADS])
    whole = tl.max(top, 0)
    weight = tl.exp2(top - tl.where(whole == float("-inf"), 0.0, whole)[None, :])
    total = tl.sum(tl.reshape(total, [SLOTS, HEADS]) * weight, 0)
    weight = weight[:, :, None]
    out_a = tl.sum(tl.reshape(out_a, [SLOTS, HEADS, FOURS]) * weight, 0)
    out_b = tl.sum(tl.reshape(out_b, [SLOTS, HEADS, FOURS]) * weight, 0)
    out_c = tl.sum(tl.reshape(out_c, [SLOTS, HEADS, FOURS]) * weight, 0)
    out_d = tl.sum(tl.reshape(out_d, [SLOTS, HEADS, FOURS]) * weight, 0)
    return whole, total, out_a, out_b, out_c, out_d
