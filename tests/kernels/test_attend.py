"""Decode attention over spans against the float64 definition, on both backends."""

import pytest
import torch
from macbench_kernels import UnsupportedError, kernels

from tests.conftest import assert_near, exact_state, filled_cache

SCALE = 0.25

pytestmark = pytest.mark.usefixtures("seed")


def check(backend, device, dtype, group, dim, length, spans_of, page_size=16, kv_heads=2, batch=2):
    heads = kv_heads * group
    k, v = (torch.randn(batch, kv_heads, length, dim, device=device).to(dtype) for _ in range(2))
    q = torch.randn(batch, heads, dim, device=device).to(dtype)
    cache = filled_cache(k, v, page_size, shuffle=True)
    spans = torch.tensor(spans_of(batch, heads, length), dtype=torch.int32, device=device)
    out, lse = kernels(backend, device).attend(q, cache, 0, spans, SCALE)
    assert out.shape == (*spans.shape[:1], batch, heads, dim)
    bounds, wanted = spans.tolist(), []
    for s in range(len(bounds)):
        for b in range(batch):
            for h in range(heads):
                start, stop = bounds[s][0][b][h], bounds[s][1][b][h]
                if stop <= start:
                    assert lse[s, b, h] == float("-inf")
                    assert not out[s, b, h].any()
                    continue
                exact = exact_state(q[b, h], k[b, h // group, start:stop], v[b, h // group, start:stop], SCALE)
                wanted.append((out[s, b, h], lse[s, b, h], *exact))
    got_out, got_lse, want_out, want_lse = (torch.stack(x) for x in zip(*wanted, strict=True))
    assert_near(got_out, want_out, dtype)
    assert_near(got_lse, want_lse, dtype)


def everything(batch, heads, length):
    return [[[[0] * heads] * batch, [[length] * heads] * batch]]


GROUPS = [1, 3, 4, 7, 8]


@pytest.mark.parametrize(
    ("group", "length", "dim"),
    [(group, length, (64, 128)[(i + j) % 2]) for i, group in enumerate(GROUPS) for j, length in enumerate((1, 15, 16, 17))],
)
def test_whole_range(backend, device, dtype, group, dim, length):
    check(backend, device, dtype, group, dim, length, everything)


@pytest.mark.parametrize(("group", "dim"), list(zip(GROUPS, (64, 128, 64, 64, 128), strict=True)))
def test_long_range_is_split_over_keys(backend, device, dtype, group, dim):
    check(backend, device, dtype, group, dim, 1000, everything, kv_heads=1)


@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
def test_spans_cross_pages_and_differ_per_head(backend, device, dtype, page_size):
    def spans(batch, heads, length):
        starts = [[(7 * h + 31 * b) % 150 for h in range(heads)] for b in range(batch)]
        edge = [[170] * heads] * batch
        return [[starts, edge], [edge, [[length] * heads] * batch]]

    check(backend, device, dtype, 3, 64, 203, spans, page_size)


def test_heads_of_a_group_that_leave_a_gap(backend, device, dtype):
    """Heads that neither start nor stop together, with keys in between that none of them reads."""

    def spans(batch, heads, length):
        starts = [[5 + 90 * (h % 2) + h for h in range(heads)]] * batch
        return [[starts, [[start + 20 + h for h, start in enumerate(starts[0])]] * batch]]

    check(backend, device, dtype, 3, 96, 140, spans)


def test_empty_and_one_key_spans(backend, device, dtype):
    def spans(batch, heads, length):
        empty = [[5] * heads] * batch
        one = [[9] * heads] * batch
        mixed = [[h if h % 2 else 40 for h in range(heads)] for _ in range(batch)]
        return [[empty, empty], [one, [[10] * heads] * batch], [mixed, [[20] * heads] * batch]]

    check(backend, device, dtype, 4, 64, 48, spans)


def test_requests_of_different_lengths(backend, device, dtype):
    def spans(batch, heads, length):
        return [[[[0] * heads] * batch, [[17] * heads, [100] * heads, [0] * heads]]]

    check(backend, device, dtype, 3, 64, 100, spans, batch=3)


def test_extreme_scores_do_not_overflow(backend, device, dtype):
    k, v = (torch.randn(1, 1, 70, 64, device=device).to(dtype) for _ in range(2))
    q = (300 * torch.randn(1, 2, 64, device=device)).to(dtype)
    cache = filled_cache(k, v)
    spans = torch.tensor([[[[0, 0]], [[70, 70]]]], dtype=torch.int32, device=device)
    out, lse = kernels(backend, device).attend(q, cache, 0, spans, 1.0)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-2
    for h in range(2):
        want, want_lse = exact_state(q[0, h], k[0, 0], v[0, 0], 1.0)
        assert (out[0, 0, h].double() - want).norm() <= tolerance * want.norm()
        torch.testing.assert_close(lse[0, 0, h].double(), want_lse, atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "dim", "message"), [(torch.float64, 64, "float16, bfloat16 or float32"), (torch.float32, 264, "head_dim=264")])
def test_unsupported_input_is_refused_before_launch(device, dtype, dim, message):
    k = torch.zeros(1, 1, 4, dim, dtype=dtype, device=device)
    spans = torch.zeros(1, 2, 1, 1, dtype=torch.int32, device=device)
    with pytest.raises(UnsupportedError, match=message) as error:
        kernels("triton", device).attend(torch.zeros(1, 1, dim, dtype=dtype, device=device), filled_cache(k, k), 0, spans, 1.0)
    assert "\n" not in str(error.value)
