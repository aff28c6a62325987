"""One training step: the loss on the tokens of answers, the distance from the base model on ordinary text, and the update."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from macbench.probe.group import Group
from macbench.probe.mixture import Batch
from macbench.probe.network import Probe
from macbench.probe.regular import Ordinary

LEAN_TOKENS = 98304  # from so many tokens on, feed-forward layers are recomputed: without, a token needs 0.6 MB
CLIP = 1.0  # largest norm of the gradient
Part = tuple[Batch, Ordinary | None]  # of a step: rows with questions and, now and then, ordinary text


@dataclass
class Outcome:
    """``loss``: weighted cross-entropy, nats. ``right``: bool [answers], every token of the answer is the most likely one."""

    loss: torch.Tensor
    right: torch.Tensor


def to_device(x: np.ndarray, device: torch.device) -> torch.Tensor:
    x = torch.from_numpy(x)
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def answer_loss(probe: Probe, batch: Batch) -> Outcome:
    """Logits are made at the tokens before answer tokens alone: [tokens of answers, vocabulary]."""
    device = probe.network.device
    ids, positions, rows, columns, weights, question = (
        to_device(x, device) for x in (batch.ids, batch.positions, batch.rows, batch.columns, batch.weights, batch.question)
    )
    hidden = probe.hidden(ids.long(), positions, lean=torch.is_grad_enabled() and ids.numel() >= LEAN_TOKENS)
    logits, targets = probe.logits(hidden[rows, columns - 1]), ids[rows, columns].long()
    loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
    wrong = torch.zeros(len(batch.first), device=device).index_add_(0, question, (logits.detach().argmax(-1) != targets).float())
    return Outcome(loss, wrong == 0)


def distance(probe: Probe, ordinary: Ordinary) -> torch.Tensor:
    """Mean Kullback-Leibler divergence of the adapted from the base model's next-token distributions, nats."""
    device = probe.network.device
    ids, columns = to_device(ordinary.ids, device).long(), to_device(ordinary.columns, device)
    rows = torch.arange(len(ids), device=device)[:, None]
    positions = torch.arange(ids.shape[1], device=device)[None].expand_as(ids)
    with torch.no_grad(), probe.base():
        wanted = F.log_softmax(probe.logits(probe.hidden(ids, positions)[rows, columns].flatten(0, 1)), -1)
    found = F.log_softmax(probe.logits(probe.hidden(ids, positions)[rows, columns].flatten(0, 1)), -1)
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True)


def update(probe: Probe, optimiser: torch.optim.Optimizer, rate: float, parts: list[Part], weight: float, group: Group) -> dict:
    """One step at learning rate ``rate`` on the mean over this process's ``parts`` and as many of each other process's.

    ``weight``: of the distance. Returns loss, distance (None without) and norm of the whole step, and ``right`` of the own parts.
    """
    for settings in optimiser.param_groups:
        settings["lr"] = rate
    trained = [p for settings in optimiser.param_groups for p in settings["params"]]
    count, means, right = len(parts) * group.size, torch.zeros(2, device=probe.network.device), []
    for batch, ordinary in parts:
        outcome = answer_loss(probe, batch)
        (outcome.loss / count).backward()
        means[0] += outcome.loss.detach() / count
        right.append(outcome.right)
        if ordinary is not None:
            apart = distance(probe, ordinary)
            (weight * apart / count).backward()
            means[1] += apart.detach() / count
    group.add([*(p.grad for p in trained), means])
    norm = torch.nn.utils.clip_grad_norm_(trained, CLIP)
    if math.isfinite(norm_value := float(norm)):  # one bad batch must not end the run
        optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    loss, apart = means.tolist()
    return {"loss": loss, "distance": None if ordinary is None else apart, "norm": norm_value, "right": torch.cat(right).cpu().numpy()}
