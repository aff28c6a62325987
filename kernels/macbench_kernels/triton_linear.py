"""Products of a few rows with a large weight matrix: what a decode step does between its attentions, bound by the reading of the weights.

Weights are the rows of the matrix product and requests its columns, so that few requests waste little of the matrix units. The sum over K
goes through the same blocks in the same order whatever the number of rows: a request's result does not depend on who decodes beside it.
Bias, SwiGLU and residual are part of the launch that makes the numbers. An RMS norm is split: whoever makes x also leaves gain * x and
partial sums of x^2, whoever reads it scales its sums by 1 / rms, so that a norm is no launch and weights stream undisturbed.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from macbench_kernels.dispatch import UnsupportedError
from macbench_kernels.triton_common import DTYPES, dependent_launch, follow, launch_options, on_device, processors

MAX_ROWS = 16
# Partial sums of squares that a reader looks at together, at most.
_MAX_PARTS = 1024
_LINE_BYTES: tl.constexpr = tl.constexpr(128)


class Scaled(NamedTuple):
    """Rows on their way through an RMS norm. ``x`` [rows, K]: gain times the rows. ``squares`` float32 [parts, rows]: they add up to sum x^2."""

    x: torch.Tensor
    squares: torch.Tensor


@triton.jit(do_not_specialize=["rows"])  # one layout, and with it one order of the partial sums of squares, for any number of rows
def _linear(
    x_ptr, w_ptr, bias_ptr, residual_ptr, squares_ptr, gain_ptr, out_ptr, scaled_ptr, parts_ptr, rows, n, parts, eps,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    PARTS: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, EMIT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N outputs of all rows. x [rows, K], w [n, K] (GATED: [2n, K], gates first), out [rows, n].

    PARTS > 0: x is scaled, with ``parts`` partial sums. EMIT: also leave gain * out and its partial sum of squares.
    """
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, ROWS)
    known = feature < n
    weights = w_ptr + feature.to(tl.int64)[:, None] * K
    lift = n.to(tl.int64) * K
    if AHEAD > 0:
        # Weights depend on no earlier launch: their first lines come from memory while the predecessor is still at work.
        line: tl.constexpr = _LINE_BYTES // (w_ptr.dtype.element_ty.primitive_bitwidth // 8)
        at = tl.arange(0, AHEAD)[None, :] * line
        first = tl.where(known[:, None] & (at < K), weights + at, weights).to(tl.int64)
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [first], dtype=tl.int32, is_pure=False, pack=1)
        if GATED:
            second = tl.where(known[:, None] & (at < K), weights + lift + at, weights).to(tl.int64)
            tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [second], dtype=tl.int32, is_pure=False, pack=1)
    follow(EARLY)
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    up = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for block in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = block + tl.arange(0, BLOCK_K)
        wanted, present = known[:, None], (row < rows)[None, :]
        if K % BLOCK_K:
            wanted, present = wanted & (k < K)[None, :], present & (k < K)[:, None]
        w = tl.load(weights + k[None, :], mask=wanted, other=0.0)
        x = tl.load(x_ptr + row[None, :] * K + k[:, None], mask=present, other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")
        if GATED:
            v = tl.load(weights + lift + k[None, :], mask=wanted, other=0.0)
            up = tl.dot(v, x, up, input_precision="ieee")
    if PARTS > 0:
        part = tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & (row < rows)[None, :]
        square = tl.sum(tl.load(squares_ptr + part[:, None] * rows + row[None, :], mask=inside, other=0.0), 0)
        spread = tl.rsqrt(square / K + eps)[None, :]
        acc, up = acc * spread, up * spread
    if GATED:
        acc = acc * tl.sigmoid(acc) * up
    if BIAS:
        acc += tl.load(bias_ptr + feature, mask=known, other=0.0).to(tl.float32)[:, None]
    at = row[None, :] * n + feature[:, None]
    inside = known[:, None] & (row < rows)[None, :]
    if RESIDUAL:
        acc += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    result = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, result, mask=inside)
    if EMIT:
        exact = tl.where(inside, result.to(tl.float32), 0.0)
        gain = tl.load(gain_ptr + feature, mask=known, other=0.0).to(tl.float32)[:, None]
        tl.store(scaled_ptr + at, exact * gain, mask=inside)
        tl.store(parts_ptr + tl.program_id(0) * rows + row, tl.sum(exact * exact, 0), mask=row < rows)


@triton.jit
def _scale(x_ptr, gain_ptr, scaled_ptr, squares_ptr, K: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr):
    """One program: one row."""
    follow(EARLY)
    k = tl.arange(0, WIDE)
    at = tl.program_id(0) * K + k
    x = tl.load(x_ptr + at, mask=k < K, other=0.0).to(tl.float32)
    tl.store(scaled_ptr + at, x * tl.load(gain_ptr + k, mask=k < K, other=0.0).to(tl.float32), mask=k < K)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(x * x, 0))


def tuning(n: int, k: int, gated: bool, itemsize: int, device: torch.device) -> dict:
    """Tile and pipeline: enough programs to fill the machine, as long as there are outputs for them; lines of each row to fetch ahead."""
    block_n = 64
    while block_n > 16 and triton.cdiv(n, block_n) < 2 * processors(device):
        block_n //= 2
    thin = block_n == 16
    block_k = 512 if thin and not gated and k <= 8192 else 256
    while k % block_k and block_k > 64:
        block_k //= 2
    stages = 3 if gated or block_k == 512 else 6 if thin else 4
    if itemsize > 2:
        block_k, stages = min(block_k, 64), 2
    return {"block_n": block_n, "block_k": block_k, "stages": stages, "warps": 2 if thin else 4, "ahead": 8}


def linear(
    x: torch.Tensor | Scaled,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    gain: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    **override,
) -> torch.Tensor | tuple[torch.Tensor, Scaled]:
    """x [rows, K] times weight [n, K] transposed, plus ``bias`` [n], plus ``residual`` [rows, n]: [rows, n] in ``dtype`` (that of x, if None).

    A ``Scaled`` x: the rows go through the rest of their RMS norm, with ``eps``. ``gated``: weight is [2n, K], and the result is
    silu(x W1^T) * (x W2^T). ``gain`` [n]: also return the result ``Scaled`` for the norm that follows. At most 16 rows. Sums are
    float32. No host synchronisation. ``override``: see ``tuning``.
    """
    squares = None
    if isinstance(x, Scaled):
        x, squares = x
    rows, k = x.shape
    n = weight.shape[0] // (2 if gated else 1)
    if rows > MAX_ROWS or x.dtype not in DTYPES or x.dtype != weight.dtype or weight.shape[1] != k:
        raise UnsupportedError(
            f"{rows} rows of {k} {x.dtype} times a weight {tuple(weight.shape)} of {weight.dtype}: linear takes at most {MAX_ROWS} rows "
            "of float16, bfloat16 or float32, the same for both"
        )
    knobs = tuning(n, k, gated, x.element_size(), x.device) | override
    programs = triton.cdiv(n, knobs["block_n"])
    out = torch.empty(rows, n, dtype=dtype or x.dtype, device=x.device)
    scaled = torch.empty(rows, n, dtype=x.dtype, device=x.device) if gain is not None else None
    emitted = torch.empty(programs, rows, dtype=torch.float32, device=x.device) if gain is not None else None
    parts = 0 if squares is None else squares.shape[0]
    if parts > _MAX_PARTS or (gain is not None and programs > _MAX_PARTS):
        raise UnsupportedError(f"{max(parts, programs)} partial sums of squares: at most {_MAX_PARTS}")
    early = dependent_launch(x.device)
    with on_device(x):
        _linear[(programs,)](
            x, weight, bias, residual, squares, gain, out, scaled, emitted, rows, n, parts, eps,
            K=k, ROWS=16, BLOCK_N=knobs["block_n"], BLOCK_K=knobs["block_k"], STAGES=knobs["stages"], AHEAD=knobs["ahead"] if early else 0,
            PARTS=triton.next_power_of_2(parts) if parts else 0, GATED=gated, BIAS=bias is not None, RESIDUAL=residual is not None,
            EMIT=gain is not None, EARLY=early, num_warps=knobs["warps"], **launch_options(early),
        )  # fmt: skip
    return (out, Scaled(scaled, emitted)) if gain is not None else out


def scale(x: torch.Tensor, gain: torch.Tensor) -> Scaled:
    """x [rows, K] on its way through an RMS norm with this ``gain`` [K]."""
    rows, k = x.shape
    scaled, squares = torch.empty_like(x), torch.empty(1, rows, dtype=torch.float32, device=x.device)
    early = dependent_launch(x.device)
    with on_device(x):
        _scale[(rows,)](x, gain, scaled, squares, K=k, WIDE=triton.next_power_of_2(k), EARLY=early, num_warps=8, **launch_options(early))
    return Scaled(scaled, squares)
