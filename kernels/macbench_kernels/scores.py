"""Attention probabilities themselves, which evicting methods rank tokens by: recomputed from keys and lse, never kept from an attention call."""

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


def probabilities(
    q: torch.Tensor, cache: PagedKVCache, layer: int, ids: torch.Tensor, counts: torch.Tensor, lse: torch.Tensor, scale: float
) -> torch.Tensor:
    """The softmax probability of every selected token: exp(q . k * scale - lse).

    q: [B, Hq, d] after RoPE. ids: int32 [B, R, n], counts: int32 [B, R], R sets per request as in ``attend_selected``, tokens that are
    visible. lse: [B, Hq], as ``attend_selected`` returns it. Result: float32 (float64 for float64) [B, Hq, n], 0 from ``counts`` on.
    """
    batch, heads, dim = q.shape
    sets, n = ids.shape[1:]
    dtype = torch.promote_types(q.dtype, torch.float32)
    listed = torch.arange(n, device=q.device) < counts[..., None]
    token = torch.where(listed, ids, 0).long()
    page = cache.block_table.gather(1, (token // cache.page_size).flatten(1)).view_as(token).long()
    head = torch.arange(sets, device=q.device) * cache.pool.kv_heads // sets
    k = cache.keys(layer).flatten(1, 2)[head[None, :, None], page * cache.page_size + token % cache.page_size]  # [B, R, n, d]
    scores = torch.einsum("brgd,brnd->brgn", q.view(batch, sets, -1, dim).to(dtype) * scale, k.to(dtype))
    scores = scores - lse.view(batch, sets, -1, 1)
    return scores.exp().masked_fill(~listed[:, :, None], 0).view(batch, heads, n)
