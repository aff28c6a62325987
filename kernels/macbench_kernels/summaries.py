"""Summaries of keys that selectors score instead of the keys: bounds per unit of consecutive tokens, and scores of summaries and tokens.

Tables are channel-major, [B, Hkv, rows, units]: one row is one channel of all units. So a scan over units is coalesced whatever
channels it takes, and only the rows that are asked for are read. Bounds are a table of 2d rows, the d maxima and then the d minima,
or of d rows if units are single tokens. The reference in torch; see triton_summaries for the GPU.
"""

import torch

from macbench_kernels.cache import PagedKVCache


def precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def rounded(units: int) -> int:
    """Columns to allocate for a table of so many units: a multiple of what a program of the GPU kernels reads together, at least one of them."""
    return max(128, -(-units // 128) * 128)


def build_bounds(bounds: torch.Tensor, keys: torch.Tensor, size: int) -> None:
    """Bounds of ``keys`` [..., n, d], cut into units of ``size``, into a table [..., d or 2d, units] for as many heads."""
    n, dim = keys.shape[-2:]
    units = -(-n // size)
    if not units:
        return
    padding = keys[..., -1:, :].expand(*keys.shape[:-2], units * size - n, -1)  # copies of a key move no bound of its unit
    low, high = torch.cat([keys, padding], -2).unflatten(-2, (units, size)).aminmax(dim=-2)
    bounds[..., :dim, :units] = high.mT
    if bounds.shape[-2] > dim:
        bounds[..., dim:, :units] = low.mT


def extend_bounds(bounds: torch.Tensor, cache: PagedKVCache, layer: int, size: int, skipped: torch.Tensor | None = None) -> None:
    """Take the key of the newest token of every request into the bounds of its unit. No host synchronisation; doing it twice changes nothing.

    bounds: [B, Hkv, d or 2d, units]. The token of position ``length - 1`` is number ``length - 1 - skipped`` (int32 [B], or none) of those
    that are cut into units of ``size``. A unit's first token replaces whatever the table held.
    """
    position = (cache.lengths - 1).clamp(min=0)
    page = cache.block_table.gather(1, (position // cache.page_size)[:, None].long())[:, 0]
    slot = page * cache.page_size + position % cache.page_size
    key = cache.keys(layer).flatten(1, 2)[:, slot.long()].transpose(0, 1)  # [B, Hkv, d]
    number = position if skipped is None else (position - skipped).clamp(min=0)
    both = torch.cat([key, key], -1) if bounds.shape[2] > key.shape[-1] else key
    at = (number // size).long()[:, None, None, None].expand(*bounds.shape[:3], 1)
    old = bounds.gather(-1, at)[..., 0]
    dim = key.shape[-1]
    new = torch.cat([torch.maximum(old[..., :dim], key), torch.minimum(old[..., dim:], both[..., dim:])], -1)
    fresh = (number % size == 0)[:, None, None]
    bounds.scatter_(-1, at, torch.where(fresh, both, new)[..., None])


def row_scores(weights: torch.Tensor, table: torch.Tensor, units: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """scores[b, g, m, j] = sum_i weights[b, g, m, i] * table[b, g, rows[b, g, i], j] for j < units[b], -inf from there on.

    weights: float [B, Hkv, M, r]. table: [B, Hkv, n, units]. units: int32 [B]. rows: int32 [B, Hkv, r], all n rows if None.
    Returns [B, Hkv, M, units] in at least float32. Columns from units[b] on and rows that are not listed are not read.
    """
    taken = table if rows is None else table.gather(2, rows.long()[..., None].expand(*rows.shape, table.shape[-1]))
    scores = weights.to(precise(table.dtype)) @ taken.to(precise(table.dtype))
    known = torch.arange(table.shape[-1], device=table.device) < units[:, None]
    return scores.masked_fill(~known[:, None, None], float("-inf"))


def token_scores(q: torch.Tensor, cache: PagedKVCache, layer: int, scale: float, width: int) -> torch.Tensor:
    """Scaled scores of every visible key: q [B, Hq, d] -> [B, Hq, width] in at least float32, -inf from a request's length on.

    ``width``: the most that a request ever sees. Bounds are read on the host.
    """
    batch, heads, dim = q.shape
    kv_heads = cache.pool.kv_heads
    out = torch.full((batch, heads, width), float("-inf"), dtype=precise(q.dtype), device=q.device)
    for b, length in enumerate(cache.lengths.tolist()):
        at = 0
        grouped = (q[b].to(out.dtype) * scale).view(kv_heads, heads // kv_heads, dim)
        for k, _ in cache.slice(layer, b, 0, length):
            out[b, :, at : at + k.shape[1]] = (grouped @ k.to(out.dtype).mT).flatten(0, 1)
            at += k.shape[1]
    return out


def weigh_rows(weights: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """sum_j weights[b, g, m, j] * table[b, g, j]: weights float [B, Hkv, M, units], table [B, Hkv, units, d] -> [B, Hkv, M, d].

    In at least float32 (products of half-precision tables in their precision on a GPU). A row is not read if all its weights are 0.
    """
    used = (weights != 0).any(2)[..., None]
    kind = precise(table.dtype)
    return weights.to(kind) @ table.to(kind).masked_fill(~used, 0)
