"""Attention states: the pair (o, lse) of a query over a set of keys, and their exact merge."""

from typing import NamedTuple

import torch


class State(NamedTuple):
    """Softmax-normalised output and log-sum-exp of the scaled scores over one set of keys.

    ``out``: [..., d]. ``lse``: [...], natural logarithm. An empty set has out = 0 and lse = -inf.
    """

    out: torch.Tensor
    lse: torch.Tensor


def empty_state(shape: tuple[int, ...], head_dim: int, dtype: torch.dtype, device) -> State:
    """State over no key: out zeros [*shape, head_dim], lse -inf [*shape]."""
    out = torch.zeros(*shape, head_dim, dtype=dtype, device=device)
    return State(out, torch.full(shape, float("-inf"), dtype=dtype, device=device))


def merge(a: State, b: State) -> State:
    """State over the union of two disjoint key sets; exact, associative, and empty states are neutral."""
    top = torch.maximum(a.lse, b.lse)
    # Two empty states would give -inf - -inf; any finite pivot leaves both weights 0.
    pivot = torch.where(top == float("-inf"), torch.zeros_like(top), top)
    wa, wb = torch.exp(a.lse - pivot), torch.exp(b.lse - pivot)
    total = wa + wb
    lse = pivot + torch.log(total)
    norm = torch.where(total == 0, torch.ones_like(total), total)
    out = a.out * (wa / norm)[..., None] + b.out * (wb / norm)[..., None]
    return State(out, lse)
