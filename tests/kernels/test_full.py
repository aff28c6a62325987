"""Full attention, with mixed lengths and an empty request, against the float64 definition. On a CPU a few cells, on a GPU all of them."""

from itertools import product

import pytest
import torch
from macbench_kernels import kernels
from macbench_kernels.triton_attend import attend_full

from tests.conftest import BACKENDS, DEVICE, DTYPES, assert_near, exact_state, filled_cache

LENGTHS = [70, 0, 1, 37]
# (group, dim, page size)
FEW = [(1, 64, 16), (3, 96, 5), (5, 64, 1), (7, 128, 64), (16, 64, 16), (2, 256, 16)]
ALL = list(product([1, 3, 5, 7, 16], [64, 96, 128, 256], [1, 5, 16, 64]))
CELLS = [(torch.float32, *cell) for cell in FEW] + [(dtype, *cell) for dtype in DTYPES[1:] for cell in ALL]


@pytest.fixture(scope="module", params=CELLS, ids=lambda cell: "-".join(map(str, cell)).removeprefix("torch."))
def cell(request):
    return request.param


def problem(dtype, group, dim, page, lengths):
    """(q, cache, exact out [B, Hq, d], exact lse [B, Hq]); empty requests have out 0 and lse -inf."""
    kv_heads = 1 if group > 5 else 2
    heads = kv_heads * group
    k, v = (torch.randn(len(lengths), kv_heads, max(lengths), dim, device=DEVICE).to(dtype) for _ in range(2))
    q = torch.randn(len(lengths), heads, dim, device=DEVICE).to(dtype)
    cache = filled_cache(k, v, page, shuffle=True)
    cache.lengths.copy_(torch.tensor(lengths))
    cache.host_lengths = list(lengths)
    out = torch.zeros(len(lengths), heads, dim, dtype=torch.float64, device=DEVICE)
    lse = torch.full(out.shape[:2], float("-inf"), dtype=torch.float64, device=DEVICE)
    for b, length in enumerate(lengths):
        for h in range(heads if length else 0):
            out[b, h], lse[b, h] = exact_state(q[b, h], k[b, h // group, :length], v[b, h // group, :length], dim**-0.5)
    return q, cache, out, lse


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_visible_key(seed, backend, cell):
    q, cache, want, _ = problem(*cell, LENGTHS)
    out = kernels(backend, DEVICE).full(q, cache, 0, q.shape[-1] ** -0.5)
    assert out.dtype == q.dtype
    assert_near(out, want, q.dtype)
    assert not out[1].any()


def test_state_over_every_visible_key(seed, cell):
    q, cache, want, want_lse = problem(*cell, LENGTHS)
    out, lse = attend_full(q, cache, 0, q.shape[-1] ** -0.5)
    assert out.dtype == lse.dtype == torch.float32
    assert_near(out, want, q.dtype)
    assert (lse[1] == float("-inf")).all()
    seen = cache.lengths > 0
    assert_near(lse[seen], want_lse[seen], q.dtype)


def test_long_requests_beside_short_ones(seed, dtype):
    """Shares of several programs meet within a request."""
    longest = 5000 if DEVICE == "cuda" else 700
    q, cache, want, want_lse = problem(dtype, 4, 128, 16, [longest, 3, longest - 77])
    out, lse = attend_full(q, cache, 0, 128**-0.5)
    assert_near(out, want, dtype)
    assert_near(lse, want_lse, dtype)
