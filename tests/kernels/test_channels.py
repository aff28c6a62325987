"""Channels, probabilities and tokens of units against their definitions, on both backends."""

import pytest
import torch
from macbench_kernels import kernels, triton_channels

from tests.conftest import DEVICE


@pytest.mark.parametrize(("dim", "group", "taken", "both"), [(64, 3, 20, True), (96, 4, 96, True), (16, 1, 1, False)])
def test_strong_channels(backend, dim, group, taken, both):
    torch.manual_seed(0)
    q = torch.randint(-9, 10, (2, 2 * group, dim), device=DEVICE) / 4.0  # sums are exact, with ties
    weights, rows = kernels(backend, DEVICE).strong_channels(q, 2, taken, both)
    for b in range(2):
        for g in range(2):
            mine = q[b, g * group : (g + 1) * group].double()
            strength = mine.abs().sum(0).tolist()
            want = sorted(range(dim), key=lambda d: (-strength[d], d))[:taken]
            signs = [dim if both and mine[:, d].sum() <= 0 else 0 for d in want]
            order = torch.argsort(rows[b, g] % dim)
            wanted = sorted(range(taken), key=lambda i: want[i])
            assert rows[b, g][order].tolist() == [want[i] + signs[i] for i in wanted]
            tau = (dim * mine[:, want].abs().sum(1) / mine.abs().sum(1)).sqrt()
            expected = mine[:, [want[i] for i in wanted]] / tau[:, None]
            torch.testing.assert_close(weights[b, g][:, order].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("size", "left"), [(3, [100, 37, 0]), (1, [38, 5, 40]), (2, [1030, 2100, 1])])
def test_mean_probability(backend, size, left):
    torch.manual_seed(0)
    units = -(-max(left) // size) + 5
    scores = 3 * torch.randn(3, 2, 3, units, device=DEVICE)
    for b, n in enumerate(left):
        scores[b, ..., -(-n // size) :] = float("-inf")
    got = kernels(backend, DEVICE).mean_probability(scores, torch.tensor(left, dtype=torch.int32, device=DEVICE), size)
    for b, n in enumerate(left):
        used = -(-n // size)
        assert not got[b, :, used:].any()
        if n:
            tokens = scores[b].double().repeat_interleave(size, -1)[..., :n].softmax(-1).mean(1)
            torch.testing.assert_close(got[b, :, :used].double(), tokens[..., ::size], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("newest", [True, False])
@pytest.mark.parametrize(("size", "left", "counts"), [(3, [100, 37, 8], [20, 37, 1]), (1, [140, 5, 1], [50, 4, 1]), (2, [170, 7, 0], [31, 0, 0])])
def test_top_tokens(backend, size, left, counts, newest, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(triton_channels, "MOST", 128)  # longer rows than a program holds
    room, keep, units = 60, 30, -(-max(left) // size) + 2
    scores = torch.rand(3, 2, units, device=DEVICE).round(decimals=1) - 0.5
    kept = torch.stack([torch.randperm(90)[:keep].sort().values for _ in range(6)]).view(3, 2, keep).int().to(DEVICE)
    number = torch.tensor(left, dtype=torch.int32, device=DEVICE)
    amounts = torch.tensor(counts, dtype=torch.int32, device=DEVICE)[:, None].expand(-1, 2)
    removed = torch.tensor([60, 0, 1], dtype=torch.int32, device=DEVICE)
    ids, places = kernels(backend, DEVICE).top_tokens(scores, number, amounts, size, room, newest, kept, removed)
    assert ids.shape == places.shape == (3, 2, room)
    for b, n in enumerate(left):
        for g in range(2):
            order = sorted(range(n), key=lambda i: (-float(scores[b, g, i // size]), i))
            if newest and n:
                order = [n - 1] + [i for i in order if i != n - 1]
            want = order[: counts[b]]
            got = places[b, g, : counts[b]].tolist()
            assert sorted(got) == sorted(want) and (not newest or got[:1] == want[:1])
            assert ids[b, g, : counts[b]].tolist() == [int(kept[b, g, i]) if i < keep else i + int(removed[b]) for i in got]
