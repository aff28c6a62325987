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
def test_probabilities_of_selected_tokens(backend, per_query_head):
    torch.manual_seed(0)
    layer = kernels(backend, DEVICE)
    k = normal(2, 2, 70, 64)
    q = normal(2, 6, 64)
    cache = filled_cache(k, k, shuffle=True)
    sets = 6 if per_query_head else 2
    ids = torch.stack([torch.stack([torch.randperm(70)[:40] for _ in range(sets)]) for _ in range(2)]).int().to(DEVICE)
    counts = torch.tensor([[40 - 7 * r for r in range(sets)], [0] + [1 + r for r in range(1, sets)]], dtype=torch.int32, device=DEVICE)
    lse = layer.attend_selected(q, cache, 0, ids, counts, SCALE).lse
    ids[0, 1, counts[0, 1] :] = 10**6  # what is not valid is not looked at
    got = layer.probabilities(q, cache, 0, ids, counts, lse, SCALE)
    assert got.shape == (2, 6, 40)
    for b in range(2):
        for h in range(6):
            r, g = (h, h // 3) if per_query_head else (h // 3, h // 3)
            count = int(counts[b, r])
            want = torch.softmax((k[b, g, ids[b, r, :count].long()].double() @ q[b, h].double()) * SCALE, 0)
            torch.testing.assert_close(got[b, h, :count].double(), want, **CLOSE)
            assert not got[b, h, count:].any()
