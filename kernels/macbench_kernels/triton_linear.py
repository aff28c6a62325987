"""Products of a few rows with a large weight matrix: what a decode step does between its attentions, bound by the reading of the weights.

Weights are the rows of the matrix product and requests its columns, so that few requests waste little of the matrix units. The sum over K
goes through the same blocks in the same order whatever the number of rows: a request's result does not depend on who decodes beside it.
Norm, bias, SwiGLU and residual are part of the launch that needs or makes the numbers.
"""

import torch
import triton
import triton.language as tl

from macbench_kernels.dispatch import UnsupportedError
from macbench_kernels.triton_common import DTYPES, dependent_launch, follow, launch_options, on_device, processors

MAX_ROWS = 64


@triton.jit
def _linear(
    x_ptr, w_ptr, bias_ptr, residual_ptr, gain_ptr, out_ptr, rows, n, eps,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N outputs of all rows. x [rows, K], w [n, K] (GATED: [2n, K], gates first), out [rows, n]."""
    follow(EARLY)
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, ROWS)
    known = feature < n
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    up = tl.zeros([BLOCK_N, ROWS], tl.float32)
    square = tl.zeros([ROWS], tl.float32)
    weights = w_ptr + feature.to(tl.int64)[:, None] * K
    lift = n.to(tl.int64) * K
    for block in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = block + tl.arange(0, BLOCK_K)
        wanted, present = known[:, None], (row < rows)[None, :]
        if K % BLOCK_K:
            wanted, present = wanted & (k < K)[None, :], present & (k < K)[:, None]
        w = tl.load(weights + k[None, :], mask=wanted, other=0.0)
        x = tl.load(x_ptr + row[None, :] * K + k[:, None], mask=present, other=0.0)
        if NORM:
            exact = x.to(tl.float32)
            square += tl.sum(exact * exact, 0)
            gain = tl.load(gain_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            x = (exact * gain[:, None]).to(x.dtype)
        acc = tl.dot(w, x, acc, input_precision="ieee")
        if GATED:
            v = tl.load(weights + lift + k[None, :], mask=wanted, other=0.0)
            up = tl.dot(v, x, up, input_precision="ieee")
    if NORM:
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
    tl.store(out_ptr + at, acc, mask=inside)


def tuning(n: int, k: int, rows: int, gated: bool, itemsize: int, device: torch.device) -> dict:
    """Tile and pipeline: enough programs to fill the machine, as long as there are outputs for them."""
    block_n = 64
    while block_n > 16 and triton.cdiv(n, block_n) < 2 * processors(device):
        block_n //= 2
    block_k = 256 if rows <= 16 else 128
    while k % block_k and block_k > 64:
        block_k //= 2
    if itemsize > 2:
        block_k = min(block_k, 64)
    stages = 4 if not gated or block_n < 64 else 3
    return {"block_n": block_n, "block_k": block_k, "stages": stages, "warps": 4}


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    dtype: torch.dtype | None = None,
    **override,
) -> torch.Tensor:
    """x [rows, K] times weight [n, K] transposed, plus ``bias`` [n], plus ``residual`` [rows, n]: [rows, n] in ``dtype`` (that of x, if None).

    ``gain`` [K]: x goes through an RMS norm with this gain and ``eps`` first. ``gated``: weight is [2n, K], and the result is
    silu(x W1^T) * (x W2^T). At most 64 rows. Sums are float32. No host synchronisation. ``override``: see ``tuning``.
    """
    rows, k = x.shape
    n = weight.shape[0] // (2 if gated else 1)
    if rows > MAX_ROWS or x.dtype not in DTYPES or x.dtype != weight.dtype or weight.shape[1] != k:
        raise UnsupportedError(
            f"{rows} rows of {k} {x.dtype} times a weight {tuple(weight.shape)} of {weight.dtype}: linear takes at most {MAX_ROWS} rows "
            "of float16, bfloat16 or float32, the same for both"
        )
    out = torch.empty(rows, n, dtype=dtype or x.dtype, device=x.device)
    knobs = tuning(n, k, rows, gated, x.element_size(), x.device) | override
    early = dependent_launch(x.device)
    with on_device(x):
        _linear[(triton.cdiv(n, knobs["block_n"]),)](
            x, weight, bias, residual, gain, out, rows, n, eps,
            K=k, ROWS=max(16, triton.next_power_of_2(rows)), BLOCK_N=knobs["block_n"], BLOCK_K=knobs["block_k"], STAGES=knobs["stages"],
            NORM=gain is not None, GATED=gated, BIAS=bias is not None, RESIDUAL=residual is not None, EARLY=early,
            num_warps=knobs["warps"], **launch_options(early),
        )  # fmt: skip
    return out
