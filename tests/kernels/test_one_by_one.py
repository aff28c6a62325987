"""Request by request: every request of a batch gets, bit for bit, what it gets alone, which a launch for the whole batch does not give."""

from dataclasses import replace

import pytest
import torch
from macbench_kernels import MacParams, PagedKVCache, Ring, UnsupportedError, kernels, one_by_one

from tests.conftest import DEVICE, filled_cache

pytestmark = pytest.mark.usefixtures("seed")
# A GPU has as many programs as a short text has tiles, each with one of its own: only long texts are cut elsewhere in a batch.
TIMES = 1 if DEVICE == "cpu" else 1000
LENGTHS, HEADS, KV_HEADS, DIM, CAPACITY = [70 * TIMES, 21 * TIMES], 2, 1, 16, 24


def problem(dtype: torch.dtype):
    """Queries [2, Hq, d], and caches and rings: of both requests, and of each alone."""
    k, v = (torch.randn(2, KV_HEADS, max(LENGTHS), DIM, device=DEVICE, dtype=dtype) for _ in range(2))
    ring = Ring.create(2, HEADS, CAPACITY, DIM, dtype, DEVICE)
    for part in (ring.q, ring.out, ring.lse):
        part.copy_(torch.randn(part.shape))
    q = torch.randn(2, HEADS, DIM, device=DEVICE, dtype=dtype)
    q_pre = ring.q[:, :, 12] + 0.01 * q
    q_pre[:, 1] += 5  # which matches nothing
    alone = [(slice(i, i + 1), length) for i, length in enumerate(LENGTHS)]
    rings = [Ring(*(part[row].clone() for part in (ring.q, ring.out, ring.lse, ring.depth))) for row, _ in alone]
    return q_pre, q, cached(k, v, LENGTHS), ring, [cached(k[row], v[row], [length]) for row, length in alone], rings


def cached(k, v, lengths) -> PagedKVCache:
    cache = filled_cache(k, v, shuffle=True)
    cache.lengths.copy_(torch.tensor(lengths))
    cache.host_lengths = list(lengths)
    return cache


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_a_request_gets_what_it_gets_alone(name, dtype):
    plain = kernels(name, DEVICE)
    separate, scale = one_by_one(plain), DIM**-0.5
    q_pre, q, cache, ring, caches, rings = problem(dtype)
    spans = TIMES * torch.tensor([[0, 15], [9, 21]], dtype=torch.int32, device=DEVICE)[:, :, None, None].expand(2, 2, 2, HEADS).contiguous()
    params = MacParams(4.0, 8)
    before = plain.full(q, cache, 0, scale)
    full, states = separate.full(q, cache, 0, scale), separate.attend(q, cache, 0, spans, scale)
    step = separate.mac_step(q_pre, q, cache, 0, ring, params, scale)
    assert step.hit[:, 0].all() and not step.hit[:, 1].any()
    for i, (own, own_ring) in enumerate(zip(caches, rings, strict=True)):
        row = slice(i, i + 1)
        assert torch.equal(full[row], plain.full(q[row], own, 0, scale))
        want = plain.attend(q[row], own, 0, spans[:, :, row], scale)
        assert torch.equal(states.out[:, row], want.out) and torch.equal(states.lse[:, row], want.lse)
        want = plain.mac_step(q_pre[row], q[row], own, 0, own_ring, params, scale)
        for field in want._fields:
            got = getattr(step, field)
            assert torch.equal(got[:, :, row] if field == "spans" else got[row], getattr(want, field)), field
        for got, expected in zip((ring.q, ring.out, ring.lse, ring.depth), (own_ring.q, own_ring.out, own_ring.lse, own_ring.depth), strict=True):
            assert torch.equal(got[row], expected)
    if name == "triton" and dtype == torch.float32:  # half precision rounds it away
        assert not torch.equal(before, full), "a launch for all requests cuts their keys elsewhere"
    torch.testing.assert_close(before.float(), full.float(), atol=1e-5 if DEVICE == "cpu" else 1e-2, rtol=1e-2)


def test_what_does_not_go_request_by_request_is_refused():
    plain = kernels("torch", DEVICE)
    with pytest.raises(UnsupportedError, match="go only full attention, attention over spans"):
        one_by_one(plain).attend_selected(None, None)
    with pytest.raises(UnsupportedError, match="plans a step"):
        one_by_one(replace(plain, plan=lambda *args: None))
