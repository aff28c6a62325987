"""Fidelity against closed forms in float64."""

import math

import pytest
import torch

from macbench.fidelity import Fidelity, kl, top1


def test_kl_of_two_outcomes():
    """p log(p/q) + (1-p) log((1-p)/(1-q)) with p = 3/4, q = 1/4: (1/2) log 3; logits are free of a constant."""
    full, other = torch.tensor([math.log(3), 0.0], dtype=torch.float64), torch.tensor([5.0, 5 + math.log(3)], dtype=torch.float64)
    assert kl(full, other).item() == pytest.approx(0.5 * math.log(3), rel=1e-12)
    assert kl(full, full + 7).item() == pytest.approx(0, abs=1e-15)


def test_kl_of_gaussians_on_a_grid():
    """KL of N(0, 1) and N(m, s^2): log s + (1 + m^2) / (2 s^2) - 1/2."""
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    m, s = 0.7, 1.6
    found = kl(-(x**2) / 2, -((x - m) ** 2) / (2 * s * s)).item()
    assert found == pytest.approx(math.log(s) + (1 + m * m) / (2 * s * s) - 0.5, rel=1e-8)


def test_impossible_tokens_add_nothing():
    full = torch.tensor([0.0, 0.0, -math.inf], dtype=torch.float64)
    assert kl(full, torch.zeros(3, dtype=torch.float64)).item() == pytest.approx(math.log(1.5))
    assert kl(torch.zeros(3), full.float()).item() == math.inf


def test_top1_takes_the_lowest_of_equals():
    full = torch.tensor([[1.0, 3.0, 3.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    other = torch.tensor([[0.0, 5.0, 4.0], [1.0, 2.0, 0.0], [0.0, 0.0, 9.0]])
    assert top1(full, other).tolist() == [True, False, True]


def test_steps_add_up_to_the_mean_of_each_request():
    """Requests of 1, 3 and 0 steps in a batch with an idle row."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 3, 0]
    full, near, far = (torch.randn(3, 4, 50, generator=generator, dtype=torch.float64) for _ in range(3))
    near = full + 0.1 * near
    meter = Fidelity(lengths)
    for i in range(3):
        meter.reference(i, full[i])
    for other in (near, far, full):
        for i in range(3):
            meter.compare(i, other[i])
        found = meter.result()
        p, q = full.log_softmax(-1), other.log_softmax(-1)
        for row, n in enumerate(lengths[:2]):
            assert found[row]["kl_mean"] == pytest.approx((p.exp() * (p - q)).sum(-1)[:n, row].mean().item(), rel=1e-9, abs=1e-12)
            assert found[row]["top1_agreement"] == pytest.approx((full.argmax(-1) == other.argmax(-1))[:n, row].double().mean().item())
        assert found[2] == {"top1_agreement": None, "kl_mean": None}
    assert found[1]["top1_agreement"] == 1 and found[1]["kl_mean"] < 1e-12


def test_kept_logits_are_copies_in_float32():
    logits = torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16)
    meter = Fidelity([1])
    meter.reference(0, logits)
    logits += torch.tensor([[5.0, 0.0]], dtype=torch.bfloat16)
    meter.compare(0, logits)
    assert meter.result() == [{"top1_agreement": 0.0, "kl_mean": pytest.approx(kl(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 1.0])).item())}]


def test_steps_come_in_order():
    meter = Fidelity([2])
    with pytest.raises(ValueError):
        meter.reference(1, torch.zeros(1, 3))
    meter.reference(0, torch.zeros(1, 3))
    meter.compare(0, torch.zeros(1, 3))
    for step in (0, 1):
        with pytest.raises(ValueError):
            meter.compare(step, torch.zeros(1, 3))
