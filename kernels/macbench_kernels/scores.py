"""Attention probabilities themselves, which evicting methods rank tokens by."""

import torch

from macbench_kernels.cache import PagedKVCache

# Scores in memory at once.
_BLOCK_KEYS = 2048
_BLOCK_SCORES = 1 << 23


def column_sums(q: torch.Tensor, cache: PagedKVCache, layer: int, first: int, lse: torch.Tensor, scale: float, request: int = 0) -> torch.Tensor:
    """How much attention the tokens get from consecutive prompt queries: sum over queries i of softmax_j(q_i . k_j * scale), j <= first + i.

    q: [1, Hq, n, d] after RoPE, of positions first .. first + n - 1. lse: [1, Hq, n], of every query over all keys that it sees, as
    ``causal`` returns it. Result: float32 (float64 for float64 queries) [Hq, first + n]. Memory is bounded whatever n and ``first``.
    """
    heads, n, dim = q.shape[1:]
    kv_heads = cache.pool.kv_heads
    dtype = torch.promote_types(q.dtype, torch.float32)
    queries = q[0].view(kv_heads, -1, n, dim)
    norm = lse[0].view(kv_heads, -1, n).to(dtype)
    sums = torch.zeros(heads, first + n, dtype=dtype, device=q.device)
    rows = max(1, _BLOCK_SCORES // (heads * min(_BLOCK_KEYS, first + n)))
    for start in range(0, first + n, _BLOCK_KEYS):
        stop = min(start + _BLOCK_KEYS, first + n)
        k = torch.cat([k for k, _ in cache.slice(layer, request, start, stop)], 1).to(dtype)
        for row in range(max(0, start - first), n, rows):
            part = slice(row, min(row + rows, n))
            scores = torch.einsum("hgnd,hkd->hgnk", queries[:, :, part].to(dtype) * scale, k) - norm[:, :, part, None]
            position = first + torch.arange(part.start, part.stop, device=q.device)
            unseen = torch.arange(start, stop, device=q.device) > position[:, None]
            sums[:, start:stop] += scores.masked_fill_(unseen, float("-inf")).exp_().sum(2).view(heads, -1)
    return sums


def least_attended(
    scores: torch.Tensor, lse: torch.Tensor, ids: torch.Tensor, counts: torch.Tensor, lengths: torch.Tensor, newest: int,
    place: torch.Tensor, total: torch.Tensor | None = None, shared: bool = False,
) -> None:  # fmt: skip
    """Which token of every KV head's set got least attention: its place goes to ``place`` int64 [B, Hkv]. No host synchronisation.

    Attention is exp(scores - lse), from ``attend_selected``: scores [B, Hq, n], lse [B, Hq], ids int32 [B, Hkv, n], counts int32 [B, Hkv].
    It is summed over a KV head's group, or with ``shared`` (all KV heads hold the same lists) over all query heads, and added to
    ``total`` float32 [B, Hkv, n] if given: then the least of the totals is meant.
    The ``newest`` of the lengths int32 [B] tokens are left out; ties go to the latest token; without a candidate the place is 0.
    """
    kv_heads, n = ids.shape[1:]
    listed = torch.arange(n, device=ids.device) < counts[..., None]
    received = torch.exp(scores - lse[..., None]).unflatten(1, (kv_heads, -1)).masked_fill(~listed[:, :, None], 0).sum(2)
    if shared:
        received = received.sum(1, keepdim=True).expand_as(received)
    if total is not None:
        received = total.add_(received)
    free = listed & (ids < lengths[:, None, None] - newest)
    received = received.masked_fill(~free, float("inf"))
    least = free & (received == received.amin(-1, keepdim=True))
    place.copy_(torch.where(least, ids, -1).argmax(-1))
