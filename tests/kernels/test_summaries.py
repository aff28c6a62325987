"""Bounds, their scores, scores of tokens and the choice of the best, on both backends against plain definitions."""

import itertools

import pytest
import torch
from macbench_kernels import build_bounds, kernels, kmeans, present

from tests.conftest import DEVICE, filled_cache


def test_ties_go_to_the_lowest_index_and_invalid_ones_to_nobody(backend):
    top = kernels(backend, DEVICE).top
    scores = torch.tensor([[1.0, 3, 3, -0.0, 0.0, 3, -2], [float("-inf")] * 7], device=DEVICE)
    ids, counts = top(scores, 5, torch.ones_like(scores, dtype=torch.bool))
    assert ids.tolist() == [[1, 2, 5, 0, 3], [0, 1, 2, 3, 4]]
    assert counts.tolist() == [5, 5]
    valid = torch.tensor([True, False, True, True, False, False, True], device=DEVICE)
    ids, counts = top(scores, 9, valid)
    assert ids.shape == (2, 7)
    assert counts.tolist() == [4, 4]
    assert [row[:4] for row in ids.tolist()] == [[2, 0, 3, 6], [0, 2, 3, 6]]
    assert present(ids, torch.arange(7, device=DEVICE).expand(2, 7) < 2, 7).nonzero()[:, 1].tolist() == [0, 2, 0, 2]


@pytest.mark.parametrize(("n", "k"), [(200, 50), (128, 128), (300, 1), (20_000, 900)])  # the last one is longer than a program holds
def test_random_scores_are_ranked_like_a_stable_sort(backend, n, k):
    torch.manual_seed(0)
    top = kernels(backend, DEVICE).top
    heads = 3 if n < 1000 else 1
    scores = torch.randn(2, heads, n, device=DEVICE).round(decimals=1 if n < 1000 else 3)
    scores[1, -1, n // 2 :] = -0.0
    valid = torch.rand(2, 1, n, device=DEVICE) < 0.9
    valid[1, 0, k // 2 :] = False
    for every, allowed in ((torch.ones((), dtype=torch.bool, device=DEVICE), False), (valid, True)):
        ids, counts = top(scores, k, every)
        unordered, same = top(scores, k, every, ordered=False)
        ranked = scores.masked_fill(~valid, float("-inf")) if allowed else scores
        want = torch.sort(ranked, dim=-1, descending=True, stable=True).indices
        assert torch.equal(counts, every.expand_as(scores).sum(-1).clamp(max=k)) and torch.equal(counts, same)
        for i in itertools.product(range(2), range(heads)):
            count = int(counts[i])
            assert torch.equal(ids[i][:count].long(), want[i][:count])
            assert torch.equal(unordered[i][:count].sort().values.long(), want[i][:count].sort().values)


@pytest.mark.parametrize(("size", "dim", "both"), [(16, 64, True), (3, 96, True), (1, 64, False)])
def test_bounds_follow_the_keys_token_by_token(backend, size, dim, both):
    torch.manual_seed(0)
    prompt, more, width = 37, 16, 60
    k = torch.randn(2, 2, prompt + more, dim, device=DEVICE)
    layer = kernels(backend, DEVICE)
    cache = filled_cache(k[:, :, :prompt], k[:, :, :prompt], 8, shuffle=True)
    skipped = torch.tensor([0, 5], dtype=torch.int32, device=DEVICE)  # request 1 has lost its first 5 tokens
    bounds = torch.full((2, 2, dim * (1 + both), width), float("nan"), device=DEVICE)
    for b in range(2):
        build_bounds(bounds[b], k[b, :, int(skipped[b]) : prompt], size)
    for t in range(prompt, prompt + more):
        cache.extend(1)
        cache.append(0, k[:, :, t : t + 1], k[:, :, t : t + 1])
        layer.extend_bounds(bounds, cache, 0, size, skipped)
        if t % 4:  # a second time changes nothing
            layer.extend_bounds(bounds, cache, 0, size, skipped)
    for b in range(2):
        rows = k[b, :, int(skipped[b]) :]
        for unit in range(-(-rows.shape[1] // size)):
            piece = rows[:, unit * size : (unit + 1) * size]
            assert torch.equal(bounds[b, :, :dim, unit], piece.amax(1))
            if both:
                assert torch.equal(bounds[b, :, dim:, unit], piece.amin(1))


@pytest.mark.parametrize(("members", "rows", "listed"), [(1, 128, None), (4, 64, 20), (3, 96, 7), (40, 64, None)])
def test_row_scores(backend, members, rows, listed):
    torch.manual_seed(0)
    table = torch.randn(2, 2, rows, 150, device=DEVICE)
    units = torch.tensor([140, 33], dtype=torch.int32, device=DEVICE)
    chosen = None if listed is None else torch.stack([torch.randperm(rows)[:listed] for _ in range(4)]).view(2, 2, listed).int().to(DEVICE)
    weights = torch.randn(2, 2, members, listed or rows, device=DEVICE)
    poisoned = table.clone()
    for b in range(2):
        poisoned[b, :, :, int(units[b]) :] = float("nan")
        if listed:
            for g in range(2):
                poisoned[b, g, [i for i in range(rows) if i not in chosen[b, g].tolist()]] = float("nan")
    got = kernels(backend, DEVICE).row_scores(weights, poisoned, units, chosen)
    for b in range(2):
        for g in range(2):
            taken = table[b, g] if listed is None else table[b, g, chosen[b, g].long()]
            n = int(units[b])
            torch.testing.assert_close(got[b, g, :, :n].double(), (weights[b, g].double() @ taken.double())[:, :n], atol=2e-5, rtol=2e-5)
            assert (got[b, g, :, n:] == float("-inf")).all()


@pytest.mark.parametrize(("group", "dim"), [(3, 64), (1, 96), (8, 128)])
def test_token_scores(backend, group, dim):
    torch.manual_seed(0)
    lengths = [70, 21]
    k, q = torch.randn(2, 2, 70, dim, device=DEVICE), torch.randn(2, 2 * group, dim, device=DEVICE)
    cache = filled_cache(k, k, shuffle=True)
    cache.lengths.copy_(torch.tensor(lengths))
    cache.host_lengths = lengths
    cache.pool.v.fill_(float("nan"))  # values play no part
    got = kernels(backend, DEVICE).token_scores(q, cache, 0, 0.3, 90)
    for b, n in enumerate(lengths):
        for h in range(2 * group):
            torch.testing.assert_close(got[b, h, :n].double(), 0.3 * k[b, h // group, :n].double() @ q[b, h].double(), atol=2e-5, rtol=2e-5)
        assert (got[b, :, n:] == float("-inf")).all()


@pytest.mark.parametrize(("members", "dim"), [(1, 64), (4, 96), (20, 128)])
def test_weigh_rows_reads_no_row_without_weight(backend, members, dim):
    torch.manual_seed(0)
    table, weights = torch.randn(2, 2, 150, dim, device=DEVICE), torch.rand(2, 2, members, 150, device=DEVICE)
    weights[:, :, :, 40:90] = 0
    weights[1, 0] = 0
    want = weights.double() @ table.double()
    table.masked_fill_((weights == 0).all(2)[..., None], float("nan"))
    got = kernels(backend, DEVICE).weigh_rows(weights, table)
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-5)


def test_kmeans_finds_separate_groups():
    torch.manual_seed(0)
    centres = 10 * torch.randn(2, 4, 8, device=DEVICE)
    truth = torch.randint(0, 4, (2, 200), device=DEVICE)
    points = kmeans.take(centres, truth) + 0.1 * torch.randn(2, 200, 8, device=DEVICE)
    found = kmeans.lloyd(
        points,
        kmeans.take(points, torch.stack([(row == i).nonzero()[0, 0] for row in truth for i in range(4)]).view(2, 4)),
        torch.zeros(2, 2, 4, dtype=torch.int64),
    )
    labels = kmeans.nearest(points, found)
    assert torch.equal(labels, truth)
    average, count = kmeans.means(points, labels, 6)
    assert torch.equal(count[:, :4], torch.stack([row.bincount(minlength=4) for row in truth]))
    assert not count[:, 4:].any()
    assert not average[:, 4:].any()
    torch.testing.assert_close(average[:, :4], found, atol=1e-4, rtol=1e-4)


def test_kmeans_draws_distinct_points_and_fills_empty_clusters():
    points = torch.randn(3, 50, 4, device=DEVICE)
    generator = torch.Generator().manual_seed(1)
    chosen = kmeans.draw(3, 50, 50, generator).to(DEVICE)
    assert all(sorted(row.tolist()) == list(range(50)) for row in chosen)
    far = torch.full((3, 5, 4), 1e3, device=DEVICE)
    assert kmeans.means(points, kmeans.nearest(points, far), 5)[1].tolist() == [[50, 0, 0, 0, 0]] * 3
    found = kmeans.lloyd(points, far, torch.randint(50, (3, 3, 5), generator=generator))
    assert (kmeans.means(points, kmeans.nearest(points, found), 5)[1] > 0).float().mean() > 0.7
