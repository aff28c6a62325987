"""Attention states of a text over chosen key ranges, in float32: the truth that reuse is measured against."""

import torch
from macbench_kernels.state import State, empty_state

from macbench.trace.text import Layer

# Scores that are held at once, 256 MB.
_BLOCK_ELEMENTS = 1 << 26


def state(layer: Layer, q: torch.Tensor, start: torch.Tensor, stop: torch.Tensor) -> State:
    """State of each query over its keys [start, stop): q [Hq, m, d], start and stop int64 [Hq, m] -> out [Hq, m, d], lse [Hq, m]."""
    if not q.shape[1]:
        return empty_state(tuple(start.shape), q.shape[-1], q.dtype, q.device)
    low, high = min(int(start.min()), int(stop.max())), max(1, int(stop.max()))
    k, v, column = layer.k[:, low:high], layer.v[:, low:high], torch.arange(low, high, device=q.device, dtype=torch.int32)
    start, stop = start.int(), stop.int()
    group, rows = len(q) // len(k), max(1, _BLOCK_ELEMENTS // (len(q) * k.shape[1]))
    outs, lses = [], []
    for a in range(0, q.shape[1], rows):
        part = q[:, a : a + rows]
        stacked = part.reshape(len(k), group * part.shape[1], -1)  # heads of a group are rows of one product
        scores = ((stacked * layer.scale) @ k.mT).view(len(q), part.shape[1], -1)
        outside = (column < start[:, a : a + rows, None]) | (column >= stop[:, a : a + rows, None])
        scores.masked_fill_(outside, float("-inf"))
        lse = scores.logsumexp(-1)
        weights = (scores - lse.masked_fill(lse == float("-inf"), 0)[..., None]).exp_()
        outs.append((weights.view(len(layer.k), group * part.shape[1], -1) @ v).view(part.shape))
        lses.append(lse)
    return State(torch.cat(outs, 1), torch.cat(lses, 1))


def relative_error(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """||got - want|| / ||want|| over the last dimension."""
    return (got - want).norm(dim=-1) / want.norm(dim=-1)
