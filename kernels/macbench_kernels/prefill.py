"""Causal attention of a block of prompt queries over the paged cache, with lse: torch's own flash kernels, merged by state."""

from functools import lru_cache

import torch

from macbench_kernels.cache import PagedKVCache
from macbench_kernels.state import State, empty_state, merge

# Scores of one block in the fall-back for dtypes without a fused kernel (float64, half precision on a CPU).
_FALLBACK_ROWS = 256


def causal(q: torch.Tensor, cache: PagedKVCache, layer: int, first: int, scale: float, lo: int = 0, request: int = 0) -> State:
    """Query i attends the keys [lo, first + i] of a request, as the token at position ``first + i`` would.

    q: [1, Hq, n, d] after RoPE. ``first`` may lie before the queries' true positions: with first = position - r every query is cut off
    r keys early, which is how MAC's ring entries are made. A query that sees no key has an empty state.
    Returns out [1, Hq, n, d] in q's dtype (at least float32 once merged) and lse [1, Hq, n].
    """
    heads, n, dim = q.shape[1:]
    blank = min(max(lo - first, 0), n)  # leading queries that see nothing
    if blank:
        empty = empty_state((1, heads, blank), dim, torch.promote_types(q.dtype, torch.float32), q.device)
        if blank == n:
            return empty
        rest = causal(q[:, :, blank:], cache, layer, first + blank, scale, lo, request)
        return State(torch.cat([empty.out, rest.out.to(empty.out.dtype)], 2), torch.cat([empty.lse, rest.lse], 2))
    state = _block(q, *_gather(cache, layer, request, first, first + n), scale, True)
    if first > lo:
        state = merge(state, _block(q, *_gather(cache, layer, request, lo, first), scale, False))
    return state


def _gather(cache: PagedKVCache, layer: int, request: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of [start, stop) of a request as [1, Hkv, n, d]: a view if the pages are contiguous."""
    pieces = cache.slice(layer, request, start, stop)
    k, v = pieces[0] if len(pieces) == 1 else (torch.cat(x, 1) for x in zip(*pieces, strict=True))
    return k[None], v[None]


def _block(q, k, v, scale: float, is_causal: bool) -> State:
    aten = torch.ops.aten
    if q.device.type == "cpu" and q.dtype == torch.float32:
        return State(*aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=is_causal, scale=scale))
    if q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16):
        return _flash_cuda(q, k, v, scale, is_causal)
    return _math(q, k, v, scale, is_causal)


def _flash_cuda(q, k, v, scale: float, is_causal: bool) -> State:
    """FlashAttention's own package where it is installed, which takes groups as they are, else torch's copy of its kernel.

    The latter wants as many KV heads as query heads: without a mask a group's queries are stacked instead, so that K and V are not copied.
    """
    heads, n, dim = q.shape[1:]
    kv_heads = k.shape[1]
    packaged = _flash_package()
    if packaged is not None:
        out, lse = packaged(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale, causal=is_causal, return_attn_probs=True)[:2]
        return State(out.transpose(1, 2), lse)
    if is_causal and heads != kv_heads:
        k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    stacked = q if is_causal else q.reshape(1, kv_heads, -1, dim)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(stacked, k, v, 0.0, is_causal, False, scale=scale)[:2]
    return State(out.reshape(1, heads, n, dim), lse.reshape(1, heads, n))


@lru_cache
def _flash_package():
    """flash_attn_func of the package flash-attn (https://github.com/Dao-AILab/flash-attention), or None."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func


def _math(q, k, v, scale: float, is_causal: bool) -> State:
    dtype = torch.promote_types(q.dtype, torch.float32)
    n, (heads, dim), kv_heads = q.shape[2], (q.shape[1], q.shape[3]), k.shape[1]
    k, v = k.to(dtype), v.to(dtype)
    outs, lses = [], []
    for a in range(0, n, _FALLBACK_ROWS):
        rows = q[:, :, a : a + _FALLBACK_ROWS].to(dtype)
        scores = (rows * scale).reshape(1, kv_heads, -1, dim) @ k.mT  # the heads of a group stacked as rows
        scores = scores.view(1, heads, rows.shape[2], -1)
        if is_causal:
            seen = torch.arange(a, a + rows.shape[2], device=q.device)[:, None] >= torch.arange(k.shape[2], device=q.device)
            scores = scores.masked_fill(~seen, float("-inf"))
        lse = scores.logsumexp(-1)
        weights = torch.exp(scores - lse[..., None])
        outs.append((weights.reshape(1, kv_heads, -1, k.shape[2]) @ v).view(1, heads, -1, dim))
        lses.append(lse)
    return State(torch.cat(outs, 2), torch.cat(lses, 2))
