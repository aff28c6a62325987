"""Products of few rows against float64, and RoPE with append against its definition."""

import pytest
import torch
from macbench_kernels import PagedKVCache, PagePool, UnsupportedError
from macbench_kernels.triton_linear import linear, scale
from macbench_kernels.triton_rope import rotate_append
from macbench_kernels.triton_rows import rms_norm, swiglu

from tests.conftest import DEVICE

DTYPES = [torch.float32] + ([torch.bfloat16, torch.float16] if DEVICE == "cuda" else [])
CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def distance(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 40, 64), (3, 65, 72), (16, 128, 256), (9, 33, 576)])
@pytest.mark.parametrize("kind", ["plain", "bias", "norm", "norm gated", "norm residual and the next norm"])
def test_products(dtype, rows, n, k, kind):
    torch.manual_seed(rows)
    x, weight, residual = normal(rows, k, dtype=dtype), normal(2 * n, k, dtype=dtype), normal(rows, n, dtype=dtype)
    gain, bias = normal(k, dtype=dtype), normal(n, dtype=dtype)
    exact, w = x.double(), weight.double()
    normed = exact * torch.rsqrt((exact * exact).mean(-1, keepdim=True) + 1e-3) * gain.double()
    if kind == "plain":
        got, want = linear(x, weight[:n], dtype=torch.float32), exact @ w[:n].T
        assert got.dtype == torch.float32
    elif kind == "bias":
        got, want = linear(x, weight[:n], bias), exact @ w[:n].T + bias.double()
    elif kind == "norm":
        got, want = linear(scale(x, gain), weight[:n], eps=1e-3), normed @ w[:n].T
        assert distance(rms_norm(x, gain, 1e-3), normed) < CLOSE[dtype]
    elif kind == "norm gated":
        joint = linear(x, weight, dtype=dtype)
        assert distance(swiglu(joint), torch.nn.functional.silu(joint.double()[:, :n]) * joint.double()[:, n:]) < CLOSE[dtype]
        got = linear(scale(x, gain), weight, eps=1e-3, gated=True)
        want = torch.nn.functional.silu(normed @ w[:n].T) * (normed @ w[n:].T)
    else:
        next_gain, other = normal(n, dtype=dtype), normal(24, n, dtype=dtype)
        first, scaled = linear(x, weight[n:], residual=residual, gain=next_gain)
        assert distance(first, exact @ w[n:].T + residual.double()) < CLOSE[dtype]
        again = first.double() * torch.rsqrt((first.double() ** 2).mean(-1, keepdim=True) + 1e-3) * next_gain.double()
        got, want = linear(scaled, other, eps=1e-3), again @ other.double().T
    assert distance(got, want) < CLOSE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(dtype):
    x, weight, gain = normal(16, 256, dtype=dtype), normal(96, 256, dtype=dtype), normal(256, dtype=dtype)
    whole = linear(scale(x, gain), weight, eps=1e-6)
    for rows in (1, 5):
        assert torch.equal(linear(scale(x[:rows].contiguous(), gain), weight, eps=1e-6), whole[:rows])


def test_wrong_input_is_one_line():
    for x, weight in ((normal(17, 32), normal(8, 32)), (normal(2, 32), normal(8, 16)), (normal(2, 32).double(), normal(8, 32).double())):
        with pytest.raises(UnsupportedError) as error:
            linear(x, weight)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "norm"), [(6, 2, 16, False), (4, 4, 96, True), (7, 1, 64, True)])
def test_rotate_append(dtype, heads, kv_heads, dim, norm):
    """Three requests of different lengths, the last one not active: queries before and after RoPE; new rows where they belong and nowhere else."""
    torch.manual_seed(0)
    pool = PagePool(2, kv_heads, dim, 20, 4, dtype, DEVICE)
    pool.k.zero_()
    pool.v.zero_()
    cache = PagedKVCache(pool, 3, width=5)
    cache.activate([True, False, False])
    cache.extend(7)
    cache.activate([True, True, False])
    cache.extend(4)
    qkv = normal(3, (heads + 2 * kv_heads) * dim, dtype=dtype)
    gains = (normal(dim, dtype=dtype), normal(dim, dtype=dtype)) if norm else None
    angle = torch.arange(30)[:, None] * (0.3 ** torch.arange(dim // 2))
    cos, sin = angle.cos().to(DEVICE), angle.sin().to(DEVICE)
    cache.count(1)
    cache.advance(1)
    q_pre, q = rotate_append(qkv, cos, sin, cache, 1, heads, gains, 1e-3)
    x = qkv.double().view(3, heads + 2 * kv_heads, dim)
    if norm:
        x = torch.cat(
            [
                part * torch.rsqrt((part * part).mean(-1, keepdim=True) + 1e-3) * gain.double()
                for part, gain in ((x[:, :heads], gains[0]), (x[:, heads : heads + kv_heads], gains[1]))
            ]
            + [x[:, heads + kv_heads :]],
            1,
        )
    assert distance(q_pre, x[:, :heads]) < CLOSE[dtype]
    half = dim // 2
    for request, length in enumerate((12, 5, 0)):
        c, s = cos[max(length - 1, 0)].double(), sin[max(length - 1, 0)].double()
        turned = torch.cat([x[request, :, :half] * c - x[request, :, half:] * s, x[request, :, half:] * c + x[request, :, :half] * s], -1)
        assert distance(q[request], turned[:heads]) < CLOSE[dtype]
        if length:
            ((k, v),) = cache.slice(1, request, length - 1, length)
            assert distance(k[:, 0], turned[heads : heads + kv_heads]) < CLOSE[dtype]
            assert distance(v[:, 0], x[request, heads + kv_heads :]) < CLOSE[dtype]
    written = (pool.k[1].float().abs().sum((0, 3)) > 0).sum()
    assert int(written) == 3  # the two active requests' rows, and one row of the spare page
    assert not pool.k[0].any()
