"""What lies between the matrix products of a step with many rows, where torch's products are the better ones: RMS norm and SwiGLU."""

import torch
import triton
import triton.language as tl

from macbench_kernels.triton_common import dependent_launch, follow, launch_options, on_device


@triton.jit
def _rms_norm(x_ptr, gain_ptr, out_ptr, eps, K: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr):
    follow(EARLY)
    k = tl.arange(0, WIDE)
    at = tl.program_id(0) * K + k
    x = tl.load(x_ptr + at, mask=k < K, other=0.0).to(tl.float32)
    gain = tl.load(gain_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, x * tl.rsqrt(tl.sum(x * x, 0) / K + eps) * gain, mask=k < K)


@triton.jit
def _swiglu(x_ptr, out_ptr, n, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    follow(EARLY)
    row, at = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x_ptr + row * 2 * n + at, mask=at < n, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * n + n + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * n + at, gate * tl.sigmoid(gate) * up, mask=at < n)


def rms_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """x [rows, K] / rms(x) * gain [K], in the dtype of x."""
    out = torch.empty_like(x)
    early = dependent_launch(x.device)
    with on_device(x):
        wide = triton.next_power_of_2(x.shape[1])
        _rms_norm[(x.shape[0],)](x, gain, out, eps, K=x.shape[1], WIDE=wide, EARLY=early, num_warps=8, **launch_options(early))
    return out


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of x [rows, 2n], gates first: [rows, n]."""
    rows, n = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    early = dependent_launch(x.device)
    with on_device(x):
        _swiglu[(rows, triton.cdiv(n, 1024))](x, out, n, BLOCK=1024, EARLY=early, **launch_options(early))
    return out
