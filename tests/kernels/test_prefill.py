"""Causal prompt attention with lse, with and without a band cut off, against the definition in float64."""

import pytest
import torch
from macbench_kernels import kernels, prefill

from tests.conftest import DEVICE, exact_state, filled_cache

# Relative to a float64 result; half precision has its own kernel on a GPU.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE) if DEVICE == "cuda" else [torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("length", "n", "cut", "lo"),
    [
        (40, 40, 0, 0),
        (300, 120, 0, 0),
        (300, 120, 37, 0),
        (300, 120, 37, 5),
        (50, 50, 16, 0),
        (50, 50, 16, 4),
        (20, 20, 30, 0),
        (30, 8, 1, 29),
        (33, 33, 1, 40),
    ],
)
def test_each_query_sees_exactly_its_keys(device, dtype, length, n, cut, lo):
    torch.manual_seed(0)
    heads, kv_heads, dim = 6, 2, 64
    k, v = (torch.randn(1, kv_heads, length, dim, dtype=dtype, device=device) for _ in range(2))
    q = torch.randn(1, heads, n, dim, dtype=dtype, device=device)
    first = length - n - cut
    out, lse = kernels("torch", device).causal(q, filled_cache(k, v, shuffle=True), 0, first, 0.125, lo)
    tolerance = TOLERANCE[dtype]
    for i in range(n):
        stop = first + i + 1
        for h in range(heads):
            if stop <= lo:
                assert lse[0, h, i] == float("-inf")
                assert not out[0, h, i].any()
                continue
            want, want_lse = exact_state(q[0, h, i], k[0, h // 3, lo:stop], v[0, h // 3, lo:stop], 0.125)
            torch.testing.assert_close(out[0, h, i].double(), want, atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(lse[0, h, i].double(), want_lse, atol=tolerance, rtol=tolerance)


def test_the_flash_attention_package_gets_and_gives_its_own_layout(monkeypatch):
    """A stand-in with the package's interface ([batch, n, heads, d], lse [batch, heads, n]) in place of it, wherever half precision on a GPU goes."""
    torch.manual_seed(0)
    k, v = (torch.randn(1, 2, 70, 16) for _ in range(2))
    q = torch.randn(1, 6, 30, 16)

    def flash_attn_func(q, k, v, softmax_scale, causal, return_attn_probs):
        assert return_attn_probs and q.shape[2] == 6 and k.shape[2] == v.shape[2] == 2
        state = prefill._math(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale, causal)
        return state.out.transpose(1, 2), state.lse, None

    monkeypatch.setattr(prefill, "_flash_package", lambda: flash_attn_func)
    for causal, n in ((True, 30), (False, 70)):
        got = prefill._flash_cuda(q, k[:, :, :n], v[:, :, :n], 0.25, causal)
        want = prefill._math(q, k[:, :, :n], v[:, :, :n], 0.25, causal)
        torch.testing.assert_close(got.out, want.out)
        torch.testing.assert_close(got.lse, want.lse)
