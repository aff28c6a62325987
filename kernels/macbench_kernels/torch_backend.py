"""The kernel layer in plain torch: the reference for every device and dtype, and what runs on a CPU.

It touches exactly the rows it is asked for. Bounds are read on the host, so on CUDA each call synchronises: there it is a reference only.
"""

import torch

from macbench_kernels.cache import PagedKVCache
from macbench_kernels.ring import Match, Ring, scanned_rows, slot_positions
from macbench_kernels.state import State, empty_state, merge

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _rectangle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, starts: list[int] | None = None) -> State:
    """Every query against every key: q [H, m, d], k and v [H, n, d] -> out [H, m, d], lse [H, m].

    ``starts``: per query row, the first key it may see (for a GQA group whose heads start at different keys).
    """
    if q.dtype == torch.float32 and q.device.type == "cpu" and starts is None:
        # Splitting the keys keeps all cores busy when there are few KV heads.
        cut = k.shape[1] // 2 if k.shape[1] >= 1024 and q.shape[1] < 64 else 0
        if cut:
            even = k[:, : 2 * cut].unflatten(1, (2, cut)), v[:, : 2 * cut].unflatten(1, (2, cut))
            out, lse = _flash_cpu(q[:, None].expand(-1, 2, -1, -1), *even, scale=scale)
            state = merge(State(out[:, 0], lse[:, 0]), State(out[:, 1], lse[:, 1]))
            if k.shape[1] == 2 * cut:
                return state
            out, lse = _flash_cpu(q[None], k[None, :, 2 * cut :], v[None, :, 2 * cut :], scale=scale)
            return merge(state, State(out[0], lse[0]))
        out, lse = _flash_cpu(q[None], k[None], v[None], scale=scale)
        return State(out[0], lse[0])
    dtype = _precise(q.dtype)
    scores = torch.matmul(q.to(dtype) * scale, k.to(dtype).mT)
    if starts is not None:
        columns = torch.arange(k.shape[1], device=q.device)
        scores.masked_fill_(columns < torch.tensor(starts, device=q.device)[:, None], float("-inf"))
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - torch.where(lse == float("-inf"), 0.0, lse)[..., None])
    return State(torch.matmul(weights, v.to(dtype)), lse)


def attend(q: torch.Tensor, cache: PagedKVCache, layer: int, spans: torch.Tensor, scale: float) -> State:
    """Decode attention of one query per head over S disjoint key spans, a state for each.

    q: [B, Hq, d] after RoPE. spans: int32 [S, 2, B, Hq], the (start, stop) of each span of each query head; stop <= start is empty.
    Returns out [S, B, Hq, d] and lse [S, B, Hq] in at least float32. Rows outside the union of a group's spans are never read.
    """
    count, _, batch, heads = spans.shape
    dim = q.shape[-1]
    kv_heads = cache.pool.kv_heads
    group = heads // kv_heads
    result = empty_state((count, batch, heads), dim, _precise(q.dtype), q.device)
    bounds = spans.tolist()
    for s in range(count):
        for b in range(batch):
            starts, stops = bounds[s][0][b], bounds[s][1][b]
            queries = q[b].view(kv_heads, group, dim)
            if len(set(starts)) == len(set(stops)) == 1:
                state = _span(queries, cache, layer, b, slice(None), starts[:1] * group, stops[:1] * group, scale)
                result.out[s, b], result.lse[s, b] = state.out.reshape(heads, dim), state.lse.reshape(heads)
                continue
            for g in range(kv_heads):
                here = slice(g * group, (g + 1) * group)
                state = _span(queries[g : g + 1], cache, layer, b, slice(g, g + 1), starts[here], stops[here], scale)
                result.out[s, b, here], result.lse[s, b, here] = state.out[0], state.lse[0]
    return result


def attend_selected(
    q: torch.Tensor, cache: PagedKVCache, layer: int, ids: torch.Tensor, counts: torch.Tensor, scale: float, unit: int = 1,
    scores: torch.Tensor | None = None,
) -> State:  # fmt: skip
    """Decode attention of one query per head over selected tokens, which lie anywhere.

    q: [B, Hq, d] after RoPE. ids: int32 [B, R, n], counts: int32 [B, R], R sets per request: one per KV head (R = Hkv, its group shares
    the read) or one per query head (R = Hq). Set r is its first ``counts`` ids, distinct and in any order; id i stands for the tokens
    [i * unit, (i + 1) * unit) that are visible, so that ``unit`` = page size selects pages. Other rows are never read.
    Returns out [B, Hq, d] and lse [B, Hq] in at least float32; an empty set has the empty state.
    ``scores``: float32 [B, Hq, n], for sets of visible tokens (unit 1) gets q . k * scale of every valid id; the rest of it stays as it is.
    """
    batch, heads, dim = q.shape
    sets = ids.shape[1]
    result = empty_state((batch, heads), dim, _precise(q.dtype), q.device)
    offsets = torch.arange(unit, device=ids.device)
    lengths, size = cache.lengths.tolist(), cache.page_size
    k, v = cache.keys(layer).flatten(1, 2), cache.values(layer).flatten(1, 2)
    for b, amounts in enumerate(counts.tolist()):
        for r, amount in enumerate(amounts):
            tokens = (ids[b, r, :amount, None].long() * unit + offsets).flatten()
            tokens = tokens[tokens < lengths[b]]
            if not len(tokens):
                continue
            slots = cache.block_table[b, tokens // size].long() * size + tokens % size
            g, here = r * cache.pool.kv_heads // sets, slice(r * heads // sets, (r + 1) * heads // sets)
            state = _rectangle(q[b, here][None], k[g, slots][None], v[g, slots][None], scale)
            result.out[b, here], result.lse[b, here] = state.out[0], state.lse[0]
            if scores is not None:
                scores[b, here, :amount] = ((q[b, here] * scale) @ k[g, slots].mT).to(scores.dtype)
    return result


def visible_span(cache: PagedKVCache, heads: int) -> torch.Tensor:
    """The one span of full attention, every visible key: int32 [1, 2, B, Hq]."""
    stop = cache.lengths[:, None].expand(-1, heads)
    return torch.stack([torch.zeros_like(stop), stop])[None]


def full(q: torch.Tensor, cache: PagedKVCache, layer: int, scale: float) -> torch.Tensor:
    """Attention of q [B, Hq, d] over every visible key; [B, Hq, d] in q's dtype."""
    return attend(q, cache, layer, visible_span(cache, q.shape[1]), scale).out[0].to(q.dtype)


def _span(q, cache, layer, request, kv_heads, starts, stops, scale) -> State:
    """One span of the query heads of some KV heads: q [H, group, d], starts and stops per row of the group."""
    if len(set(stops)) > 1:  # heads of a group that end at different keys share no read: one by one
        rows = [_span(q[:, i : i + 1], cache, layer, request, kv_heads, [a], [b], scale) for i, (a, b) in enumerate(zip(starts, stops, strict=True))]
        return State(torch.cat([r.out for r in rows], 1), torch.cat([r.lse for r in rows], 1))
    start = max(min(starts), 0)
    offsets = [a - start for a in starts] if len(set(starts)) > 1 else None
    state = None
    for k, v in cache.slice(layer, request, start, stops[0]):
        piece = _rectangle(q, k[kv_heads], v[kv_heads], scale, offsets)
        state = piece if state is None else merge(state, piece)
        offsets = offsets and [a - k.shape[1] for a in offsets]
    return state or empty_state(tuple(q.shape[:2]), q.shape[-1], _precise(q.dtype), q.device)


def match(
    q: torch.Tensor, ring: Ring, position: torch.Tensor, radius: float, oldest: int, max_chain: int | None = None, min_context: int = 0
) -> Match:
    """Nearest ring entry of every query head.

    q: [B, Hq, d] before RoPE. position: int32 [B], of the token being decoded. Entries of positions below ``oldest`` (their state
    is empty) and, if ``max_chain`` is given, of at least that depth are not eligible. A hit is strictly nearer than ``radius``.
    Ties go to the lowest row. Requests that see fewer than ``min_context`` tokens (position + 1) scan no row and match nothing.
    """
    held = slot_positions(position, ring.capacity)
    tried = position + 1 >= min_context
    rows = int(scanned_rows(position, ring.capacity, min_context).max())
    if rows == 0:
        none = torch.zeros(q.shape[:2], dtype=torch.int64, device=q.device)
        return Match(none, none.int() - 1, torch.full(q.shape[:2], float("inf"), dtype=_precise(q.dtype), device=q.device), none.bool())
    dtype = _precise(q.dtype)
    distance = torch.cdist(q[:, :, None].to(dtype), ring.q[:, :, :rows].to(dtype), compute_mode="donot_use_mm_for_euclid_dist")[:, :, 0]
    eligible = ((held[:, :rows] >= max(oldest, 0)) & tried[:, None])[:, None].expand_as(distance)
    if max_chain is not None:
        eligible = eligible & (ring.depth[:, :, :rows] < max_chain)
    distance = distance.masked_fill(~eligible, float("inf"))
    slot = distance.argmin(-1)
    nearest = distance.gather(-1, slot[..., None])[..., 0]
    source = held.gather(1, slot).to(torch.int32)
    return Match(slot, source, nearest, nearest < radius)
