"""Attention probabilities on both backends against the float64 definition."""

import pytest
import torch
from macbench_kernels import kernels

from tests.conftest import DEVICE, filled_cache

SCALE = 0.125
CLOSE = {"atol": 3e-5, "rtol": 3e-5}


def normal(*shape):
    return torch.randn(*shape, device=DEVICE)


@pytest.mark.parametrize(("first", "n"), [(0, 1), (0, 50), (37, 21), (96, 1)])
def test_column_sums(backend, first, n, monkeypatch):
    monkeypatch.setattr("macbench_kernels.scores._BLOCK_KEYS", 16)
    monkeypatch.setattr("macbench_kernels.scores._BLOCK_SCORES", 6 * 16 * 7)
    torch.manual_seed(0)
    layer = kernels(backend, DEVICE)
    k = normal(2, 2, 130, 64)
    q = normal(1, 6, n, 64)
    cache = filled_cache(k, k, shuffle=True)
    lse = layer.causal(q, cache, 0, first, SCALE, request=1).lse
    sums = layer.column_sums(q, cache, 0, first, lse, SCALE, request=1)
    assert sums.shape == (6, first + n)
    for h in range(6):
        want = torch.zeros(first + n, dtype=torch.float64, device=DEVICE)
        for i in range(n):
            seen = first + i + 1
            want[:seen] += torch.softmax((k[1, h // 3, :seen].double() @ q[0, h, i].double()) * SCALE, 0)
        torch.testing.assert_close(sums[h].double(), want, **CLOSE)
    torch.testing.assert_close(sums.sum(1), torch.full_like(sums[:, 0], n), **CLOSE)


@pytest.mark.parametrize("per_query_head", [False, True])
def test_scores_of_selected_tokens(backend, per_query_head):
    torch.manual_seed(0)
    k, q = normal(2, 2, 70, 64), normal(2, 6, 64)
    sets = 6 if per_query_head else 2
    ids, counts = drawn(2, sets, 70, 40)
    scores = torch.full((2, 6, 40), 7.0, device=DEVICE)
    kernels(backend, DEVICE).attend_selected(q, filled_cache(k, k, shuffle=True), 0, ids, counts, SCALE, scores=scores)
    for b in range(2):
        for h in range(6):
            r, count = h * sets // 6, int(counts[b, h * sets // 6])
            want = k[b, h // 3, ids[b, r, :count].long()].double() @ q[b, h].double() * SCALE
            torch.testing.assert_close(scores[b, h, :count].double(), want, **CLOSE)
            assert (scores[b, h, count:] == 7).all()


def drawn(batch, sets, length, n):
    """Random ids and counts; what is not valid names nothing."""
    ids = torch.stack([torch.stack([torch.randperm(length)[:n] for _ in range(sets)]) for _ in range(batch)]).int()
    counts = torch.tensor([[n - 5 * r for r in range(sets)], [0] + [1 + r for r in range(1, sets)]], dtype=torch.int32)
    ids[torch.arange(n) >= counts[..., None]] = 10**6
    return ids.to(DEVICE), counts.to(DEVICE)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("n", [40, 2500])
def test_least_attended(backend, shared, accumulate, n):
    """Against plain lists; equal scores occur, since they are rounded, and some sets have no candidate."""
    torch.manual_seed(0)
    ids, counts = drawn(2, 2, 2600, n)
    if shared:
        ids, counts = ids[:, :1].repeat(1, 2, 1), counts[:, :1].repeat(1, 2)
    scores = (2 * normal(2, 6, n)).round() / 2 - 7
    scores[:, :, 2 * n // 3 :] += 1
    lse = torch.zeros(2, 6, device=DEVICE)
    lengths = torch.tensor([2600, 2600], dtype=torch.int32, device=DEVICE)
    place = torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)
    total = normal(2, 2, n).abs().round() if accumulate else None
    before = total.clone() if accumulate else None
    kernels(backend, DEVICE).least_attended(scores, lse, ids, counts, lengths, 100, place, total, shared)
    for b in range(2):
        for g in range(2):
            count = int(counts[b, g])
            heads = slice(0, 6) if shared else slice(3 * g, 3 * g + 3)
            received = scores[b, heads, :count].double().exp().sum(0)
            if accumulate:
                received = received + before[b, g, :count].double()
                torch.testing.assert_close(total[b, g, :count].double(), received, **CLOSE)
                assert torch.equal(total[b, g, count:], before[b, g, count:])
            tokens = ids[b, g, :count].tolist()
            free = [i for i in range(count) if tokens[i] < 2500]
            if not free:
                assert place[b, g] == 0
                continue
            least = min(float(received[i]) for i in free)
            tied = [i for i in free if float(received[i]) < least * (1 + 1e-5)]  # float32 sums of equal terms may differ by their order
            assert int(place[b, g]) in tied
            if len({tuple(scores[b, heads, i].tolist()) for i in tied}) == 1:
                assert int(place[b, g]) == max(tied, key=lambda i: tokens[i])
