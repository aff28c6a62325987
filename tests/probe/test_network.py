"""The trained network against transformers' own forward pass and against peft."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from macbench.models import lora
from macbench.probe.mixture import Mixture, collate
from macbench.probe.network import PROJECTIONS, Probe
from macbench.probe.regular import Ordinary
from macbench.probe.steps import answer_loss, distance
from tests import real
from tests.probe.made import background, tiny_llama

THETA = 1e6
IDS = torch.randint(0, 49152, (2, 40), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.arange(40)[None].expand(2, -1)


def trained(network) -> Probe:
    """A probe whose low-rank terms do something."""
    probe = Probe(network, THETA, torch.float32, rank=4, scale=2.0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for a, b in probe.factors().values():
            a.normal_(std=0.2, generator=generator)
            b.normal_(std=0.2, generator=generator)
    return probe


def with_theta(network, theta: float):
    """The same weights under another RoPE base, by way of the configuration alone."""
    config = deepcopy(network.config)
    lora.extend(config, lora.Header("", theta, 131072, 1.0))
    other = type(network)(config).eval()
    other.load_state_dict(network.state_dict())
    return other


@torch.no_grad()
def test_merging_is_what_the_probe_computes_and_what_peft_computes():
    plain = tiny_llama()
    probe = trained(deepcopy(plain))
    got = probe.logits(probe.hidden(IDS, POSITIONS))

    merged = with_theta(plain, THETA)
    lora.merge(merged, probe.factors(), probe.scale)
    torch.testing.assert_close(got, merged(IDS).logits, atol=2e-4, rtol=2e-4)

    theirs = get_peft_model(with_theta(plain, THETA), LoraConfig(r=4, lora_alpha=8, target_modules=list(PROJECTIONS)))
    factors = probe.factors()
    for name, module in theirs.base_model.model.named_modules():
        if name in factors:
            module.lora_A["default"].weight.copy_(factors[name][0])
            module.lora_B["default"].weight.copy_(factors[name][1])
    torch.testing.assert_close(got, theirs(IDS).logits, atol=2e-4, rtol=2e-4)
    whole = theirs.merge_and_unload()
    for name, weight in whole.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), weight, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_the_base_is_the_plain_network():
    plain = tiny_llama()
    probe = trained(deepcopy(plain))
    with probe.base():
        torch.testing.assert_close(probe.logits(probe.hidden(IDS, POSITIONS)), plain(IDS).logits, atol=1e-4, rtol=1e-4)
    assert (probe.logits(probe.hidden(IDS, POSITIONS)) - plain(IDS).logits).abs().max() > 0.1


def test_gradients_reach_all_low_rank_terms_and_nothing_else_and_do_not_depend_on_recomputing():
    gradients = []
    for lean in (False, True):
        probe = trained(tiny_llama())
        probe.logits(probe.hidden(IDS, POSITIONS, lean)[:, -1]).logsumexp(-1).sum().backward()
        gradients.append({name: weight.grad for name, weight in probe.named_parameters() if weight.grad is not None})
        assert set(gradients[-1]) == set(probe.trained()) and len(gradients[-1]) == 2 * 2 * len(PROJECTIONS)
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, gradients[1][name])


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    mixture = Mixture(real.chat(), background(tmp_path_factory.mktemp("text")), 0)
    sequences = [mixture.sequence(family, 600, np.random.default_rng(0)) for family in ("text", "needles_uuids")]
    return collate(sequences, np.stack([np.arange(600)] * 2), 600, mixture.dialogue.eos)


@torch.no_grad()
def test_the_loss_is_that_of_the_answer_tokens_alone(batch):
    probe = trained(tiny_llama())
    outcome = answer_loss(probe, batch)
    merged = with_theta(tiny_llama(), THETA)
    lora.merge(merged, probe.factors(), probe.scale)
    ids = torch.from_numpy(batch.ids).long()
    predicted = merged(ids).logits[:, :-1]
    losses = F.cross_entropy(predicted.transpose(1, 2), ids[:, 1:], reduction="none")
    wanted, exact = 0.0, [True] * len(batch.first)
    for row, column, weight, question in zip(batch.rows, batch.columns, batch.weights, batch.question, strict=True):
        wanted += weight * float(losses[row, column - 1])
        exact[question] &= bool(predicted[row, column - 1].argmax() == ids[row, column])
    assert float(outcome.loss) == pytest.approx(wanted, rel=1e-4)
    assert outcome.right.tolist() == exact


def test_an_answer_is_right_only_if_all_its_tokens_are(batch, monkeypatch):
    probe = trained(tiny_llama())
    targets = torch.from_numpy(batch.ids[batch.rows, batch.columns]).long()
    said = targets.clone()
    said[np.flatnonzero(batch.question == 1)[-1]] += 1
    monkeypatch.setattr(probe, "logits", lambda hidden: F.one_hot(said, 49152).float() + 0 * hidden.sum())
    assert answer_loss(probe, batch).right.tolist() == [i != 1 for i in range(len(batch.first))]


def test_distance_is_the_divergence_from_the_base():
    plain = tiny_llama()
    probe = trained(deepcopy(plain))
    ordinary = Ordinary(IDS.numpy().astype(np.int32), np.array([[3, 20, 39], [0, 1, 2]]))
    merged = with_theta(plain, THETA)
    lora.merge(merged, probe.factors(), probe.scale)
    rows, columns = torch.arange(2)[:, None], torch.from_numpy(ordinary.columns)
    with torch.no_grad():
        p, q = (torch.softmax(net(IDS).logits[rows, columns].double(), -1) for net in (plain, merged))
    wanted = (p * (p / q).log()).sum(-1).mean()
    found = distance(probe, ordinary)
    assert float(found.detach()) == pytest.approx(float(wanted), rel=1e-3)
    found.backward()
    assert all(weight.grad is not None for weight in probe.trained().values())
