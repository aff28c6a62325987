"""Choosing the best of many scores, in torch operations that neither synchronise nor leave ties to chance. See triton_select for the GPU."""

import torch


def top(scores: torch.Tensor, k: int, valid: torch.Tensor, ordered: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the ``k`` best scores among the valid ones, best first, ties to the lowest index.

    scores: float [..., n], compared in float32. valid: bool, broadcast to it; any score may be -inf and is still better than an invalid one.
    Returns ids int32 [..., min(k, n)], and how many of them are valid: int32 [...]. Ids behind those are any below n.
    ``ordered``: whether the order matters; otherwise a backend may return them in another one.
    """
    n = scores.shape[-1]
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0 makes -0 a 0
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # ordered like the floats
    # One integer per score that no other equals, so that top-k has no ties to break.
    key = (bits.long() << 32) | torch.arange(n - 1, -1, -1, device=scores.device)
    key = key.masked_fill(~valid, torch.iinfo(torch.int64).min)
    ids = (n - 1) - (key.topk(min(k, n), -1).values & 0xFFFFFFFF)
    return ids.int(), valid.expand_as(scores).sum(-1, dtype=torch.int32).clamp(max=k)


def present(ids: torch.Tensor, chosen: torch.Tensor, n: int) -> torch.Tensor:
    """Which of n are among the ids int [..., k] that are ``chosen`` (bool, same shape): bool [..., n]. Others may name anything below n."""
    found = torch.zeros(*ids.shape[:-1], n, dtype=torch.int32, device=ids.device)
    return found.scatter_add(-1, ids.long(), chosen.int()) > 0
