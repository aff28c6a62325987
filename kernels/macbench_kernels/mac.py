"""One decode step of MAC-Attention as a kernel-layer call, and its composition from match, attend and merge.

A backend either composes the step (below) or fuses it; both return the spans they read, so that counting and reading agree.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from macbench_kernels.cache import PagedKVCache
from macbench_kernels.ring import Ring, scanned_rows
from macbench_kernels.state import State, merge


@dataclass(frozen=True)
class MacParams:
    """``radius``: a hit is strictly nearer (L2). ``band`` r, ``sink`` F and ``min_context`` in tokens. ``max_chain``: None is unbounded."""

    radius: float
    band: int
    sink: int = 0
    min_context: int = 0
    max_chain: int | None = None


class MacStep(NamedTuple):
    """What a step gave and read.

    ``out`` [B, Hq, d] in the query's dtype. ``spans`` int32 [S, 2, B, Hq]: the (start, stop) of the disjoint key ranges that were read:
    before the band of this token, its band, and the sinks if there are any. ``looked_up`` bool [B, Hq]: a ring record was read.
    ``hit`` bool: it was used. ``chain`` int32: reuses that the new ring entry is built on. ``scanned`` int32 [B]: ring rows that a match of
    a head looked at.
    """

    out: torch.Tensor
    spans: torch.Tensor
    looked_up: torch.Tensor
    hit: torch.Tensor
    chain: torch.Tensor
    scanned: torch.Tensor


def compose(match: Callable, attend: Callable) -> Callable[..., MacStep]:
    """The step from a backend's own ``match`` and ``attend``."""

    def mac_step(q_pre: torch.Tensor, q: torch.Tensor, cache: PagedKVCache, layer: int, ring: Ring, params: MacParams, scale: float) -> MacStep:
        """q_pre, q: [B, Hq, d] before and after RoPE; the token's own K and V are in the cache. Writes the token's ring entry."""
        stop = cache.lengths
        position = stop - 1
        oldest = params.sink + params.band  # entries before it cover no key
        found = match(q_pre, ring, position, params.radius, oldest, params.max_chain, params.min_context)
        entry, depth = ring.read(found.slot, found.hit)
        hit = found.hit & (entry.lse > float("-inf"))

        visible = stop[:, None].expand_as(hit)
        front = visible.clamp(max=params.sink)
        edge = torch.maximum(visible - params.band, front)
        start = torch.where(hit, found.source + 1 - params.band, front)
        bounds = [start, edge, edge, visible]
        if params.sink:
            bounds += [torch.zeros_like(front), front]
        spans = torch.stack(bounds).unflatten(0, (-1, 2))
        parts = attend(q, cache, layer, spans, scale)

        stored = State(entry.out, torch.where(hit, entry.lse, float("-inf")))
        amended = merge(stored, State(parts.out[0], parts.lse[0]))
        result = amended
        for fresh in zip(parts.out[1:], parts.lse[1:], strict=True):
            result = merge(result, State(*fresh))
        chain = torch.where(hit, depth + 1, 0)
        ring.write(position, q_pre, amended, chain)
        return MacStep(result.out.to(q.dtype), spans, found.hit, hit, chain, scanned_rows(position, ring.capacity, params.min_context))

    return mac_step
