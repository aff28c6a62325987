"""How much attention prompt tokens get from the prompt's last queries: what evicting methods choose by, for all layers of a request at once."""

from collections.abc import Callable

import torch
from macbench_kernels import PagedKVCache

from macbench.methods.base import PromptQueries

# Scores that are held at once.
_MOST_SCORES = 1 << 25

REDUCE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda votes: votes.sum(-2, keepdim=True),
    "max": lambda votes: votes.amax(-2, keepdim=True),
    "mean": lambda votes: votes.mean(-2, keepdim=True),
    "per_q_head": lambda votes: votes,
}


def window_votes(queries: list[PromptQueries], cache: PagedKVCache, request: int, scale: float, reduce: str) -> torch.Tensor:
    """Sum over the given queries w of softmax_j(q_hw . k_j * scale)_i, j up to w, then ``reduce`` over the G heads of each KV head.

    queries: of every layer, [1, Hq, W, d] each, the last of the prompt. Returns [layers, R, n], float32 (float64 for float64 queries): R is
    Hkv, or Hq for reduce = per_q_head.
    """
    kv_heads = cache.pool.kv_heads
    q = torch.cat([own.q for own in queries]).unflatten(1, (kv_heads, -1))  # [layers, Hkv, G, W, d]
    layers, _, group, window, _ = q.shape
    n, kind = cache.host_lengths[request], torch.promote_types(q.dtype, torch.float32)
    index = torch.arange(n, device=q.device)
    unseen = index > index[n - window :, None]
    found = []
    together = max(1, _MOST_SCORES // (kv_heads * group * window * n))
    heads = max(1, _MOST_SCORES // (group * window * n))
    for first in range(0, layers, together):
        here = slice(first, min(first + together, layers))
        keys = cache.stacked(here, request, 0, n, 0)
        parts = []
        for head in range(0, kv_heads, heads):
            some = slice(head, head + heads)
            scores = (q[here, some].to(kind) * scale).flatten(2, 3) @ keys[:, some].to(kind).mT  # [., ., G * W, n]
            weights = scores.unflatten(2, (group, window)).masked_fill_(unseen, float("-inf")).softmax(-1)
            parts.append(REDUCE[reduce](weights.sum(3)).flatten(1, 2))
        found.append(torch.cat(parts, 1))
    return torch.cat(found)
