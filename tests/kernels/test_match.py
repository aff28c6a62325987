"""Ring match against a brute-force search in float64, on both backends."""

import pytest
import torch
from macbench_kernels import Ring, kernels

pytestmark = pytest.mark.usefixtures("seed")


def make_ring(batch, heads, capacity, dim, device, dtype) -> Ring:
    ring = Ring.create(batch, heads, capacity, dim, dtype, device)
    ring.q.normal_()
    ring.depth.random_(0, 5)
    return ring


def brute_force(q, ring, position, oldest, max_chain, min_context):
    """(slot, source, distance) per head by looking at every position that the ring can hold."""
    found = {}
    for b in range(q.shape[0]):
        t = int(position[b])
        for h in range(q.shape[1]):
            best = (float("inf"), None, None)
            held = range(max(0, t - ring.capacity), t) if t + 1 >= min_context else ()
            for p in sorted(held, key=lambda p: p % ring.capacity):
                slot = p % ring.capacity
                if p < oldest or (max_chain is not None and int(ring.depth[b, h, slot]) >= max_chain):
                    continue
                distance = float((q[b, h].double() - ring.q[b, h, slot].double()).norm())
                if distance < best[0] - 1e-9:
                    best = (distance, slot, p)
            found[b, h] = best
    return found


@pytest.mark.parametrize(
    ("positions", "oldest", "max_chain", "min_context"),
    [
        ([1, 40], 0, None, 0),
        ([39, 41], 3, None, 0),
        ([517, 800], 500, None, 0),
        ([100, 120], 0, 2, 0),
        ([100, 99], 0, None, 101),
        ([0, 5], 9, None, 0),
    ],
)
@pytest.mark.parametrize("dim", [64, 96])
def test_nearest_eligible_entry(backend, device, dtype, positions, oldest, max_chain, min_context, dim):
    ring = make_ring(2, 3, 40, dim, device, dtype)
    q = (ring.q[:, :, 7] + 0.5 * torch.randn(2, 3, dim, device=device)).to(dtype)
    position = torch.tensor(positions, dtype=torch.int32, device=device)
    radius = 0.4 * (2 * dim) ** 0.5
    match = kernels(backend, device).match(q, ring, position, radius, oldest, max_chain, min_context)
    for (b, h), (distance, slot, source) in brute_force(q, ring, position, oldest, max_chain, min_context).items():
        if slot is None:
            assert match.distance[b, h] == float("inf")
            assert not match.hit[b, h]
            continue
        assert int(match.slot[b, h]) == slot
        assert int(match.source[b, h]) == source
        assert float(match.distance[b, h]) == pytest.approx(distance, rel=1e-5)
        assert bool(match.hit[b, h]) == (distance < radius)


def test_ties_go_to_the_lowest_row(backend, device, dtype):
    ring = make_ring(1, 2, 150, 64, device, dtype)
    ring.q[:, :, [11, 70, 149]] = 1.0
    q = torch.ones(1, 2, 64, device=device, dtype=dtype)
    match = kernels(backend, device).match(q, ring, torch.tensor([400], dtype=torch.int32, device=device), 1.0, 0)
    assert match.slot.tolist() == [[11, 11]]
    assert match.distance.tolist() == [[0.0, 0.0]]
    # Row 11 was last written at position 311 (= 2 * 150 + 11).
    assert match.source.tolist() == [[311, 311]]


def test_radius_zero_never_hits(backend, device, dtype):
    ring = make_ring(1, 2, 16, 64, device, dtype)
    match = kernels(backend, device).match(ring.q[:, :, 3].clone(), ring, torch.tensor([16], dtype=torch.int32, device=device), 0.0, 0)
    assert not match.hit.any()
