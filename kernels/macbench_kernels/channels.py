"""Choosing tokens by few channels of bounds: which channels, the probability of each unit of tokens, and the tokens of the best units.

The reference in torch; see triton_channels for the GPU. Units are ``size`` consecutive tokens of those that are left, whose number is ``left``.
"""

import torch

from macbench_kernels.select import top
from macbench_kernels.summaries import precise


def strong_channels(q: torch.Tensor, kv_heads: int, taken: int, both: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``taken`` channels of largest mean |q| over each group, ties to the first, for ``row_scores``: q [B, Hq, d].

    Returns weights [B, Hkv, M, taken], q[h] / tau[h] there with tau = sqrt(d * share of |q[h]| in these channels), and rows int32
    [B, Hkv, taken]: the channels, and with ``both`` d more where the sum over the group is not positive (minima lie behind maxima).
    """
    d = q.shape[-1]
    grouped = q.unflatten(1, (kv_heads, -1)).to(precise(q.dtype))
    size_of = grouped.abs()
    rows, _ = top(size_of.mean(2), taken, torch.ones((), dtype=torch.bool, device=q.device))
    at = rows.long()[:, :, None].expand(-1, -1, grouped.shape[2], -1)
    tau = (d * size_of.gather(-1, at).sum(-1) / size_of.sum(-1).clamp(min=1e-30)).sqrt().clamp(min=1e-30)
    if both:
        rows = rows + d * (grouped.sum(2) <= 0).gather(-1, rows.long()).int()
    return grouped.gather(-1, at) / tau[..., None], rows


def mean_probability(scores: torch.Tensor, left: torch.Tensor, size: int) -> torch.Tensor:
    """The probability of a token of each unit, by softmax over all tokens, meaned over M: scores [B, Hkv, M, units], -inf where there is no unit.

    left: int32 [B]. Returns [B, Hkv, units]; 0 everywhere if all scores are -inf.
    """
    first = torch.arange(scores.shape[-1], device=scores.device) * size
    members = (left[:, None] - first).clamp(0, size)[:, None, None]
    weights = (scores - scores.amax(-1, keepdim=True).clamp(min=-1e30)).exp()
    return (weights / (weights * members).sum(-1, keepdim=True).clamp(min=1e-30)).mean(2)


def top_tokens(
    scores: torch.Tensor, left: torch.Tensor, counts: torch.Tensor, size: int, room: int, newest: bool, kept: torch.Tensor, removed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The ``counts`` int32 [B, Hkv] tokens of the units of best scores [B, Hkv, units], ties to the first; the last unit may be cut short.

    ``newest``: the newest token comes first in any case. Beyond it the order is a backend's own. The i-th token that is left is token
    kept[b, g, i] (int32 [B, Hkv, keep]), or i + removed[b] behind those. Returns ids and places i, int32 [B, Hkv, room]; counts <= room, left.
    """
    total, keep = left[:, None, None], kept.shape[-1]
    first = torch.arange(scores.shape[-1], device=scores.device) * size
    # One unit more than fill the room: the last unit may be short.
    units, known = top(scores, -(-room // size) + 1, (first < left[:, None])[:, None])
    places = (units[..., None] * size + torch.arange(size, device=scores.device)).flatten(2)
    exists = (places < total) & (torch.arange(units.shape[-1], device=scores.device) < known[..., None]).repeat_interleave(size, -1)
    if newest:
        places, again = torch.cat([(total - 1).expand(-1, places.shape[1], -1), places], -1), places == total - 1
        exists = torch.cat([torch.ones_like(exists[..., :1]), exists & ~again], -1)
    rank = torch.where(exists, exists.cumsum(-1) - 1, room).clamp(max=room)  # those that do not fit meet in a column of no interest
    places = torch.zeros(*places.shape[:2], room + 1, dtype=places.dtype, device=places.device).scatter(-1, rank, places)[..., :room]
    ids = torch.where(places < keep, kept.gather(-1, places.clamp(0, keep - 1).long()), places + removed[:, None, None])
    return ids.int(), places.int()
