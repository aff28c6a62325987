"""Error against chain depth: MAC replayed over a text, with entries that are built on entries, beside exact full attention."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from macbench_kernels.state import State, empty_state, merge

from macbench.trace.matching import Matches, spread
from macbench.trace.states import relative_error, state
from macbench.trace.text import Layer


class Parts(NamedTuple):
    """What a replay needs of one layer. ``out``, ``lse``: [Hq, ring + steps(, d)], exact entries of the ring, then each step's own fresh part.
    ``tail_*``: [Hq, steps(, d)], over the band of each step's own token. ``entry`` int64, ``hit`` bool [Hq, steps]: which of them is reused."""

    out: torch.Tensor
    lse: torch.Tensor
    tail_out: torch.Tensor
    tail_lse: torch.Tensor
    exact: torch.Tensor
    entry: torch.Tensor
    hit: torch.Tensor


def parts(layer: Layer, matches: Matches, tau: float, band: int) -> Parts:
    """All attention of a replay, the same whatever is reused: keys [p+1-r, t+1-r) of a hit, [0, t+1-r) of a miss, and the band of t."""
    now = layer.positions.expand(len(layer.q), -1)
    q, nothing, hit = layer.at(layer.q, now), torch.zeros_like(now), matches.hits(tau)
    first = int(now[0, 0])
    used = matches.source[hit & (matches.source < first)].unique()  # the other entries of the prompt are never read
    earlier = used.expand(len(q), -1)
    known = state(layer, layer.at(layer.q, earlier), torch.zeros_like(earlier), earlier + 1 - band)
    ring = empty_state((len(q), matches.ring), q.shape[-1], q.dtype, q.device)
    ring.out[:, used - first + matches.ring], ring.lse[:, used - first + matches.ring] = known
    own = state(layer, q, torch.where(hit, matches.source + 1 - band, nothing), now + 1 - band)
    tail = state(layer, q, now + 1 - band, now + 1)
    exact = state(layer, q, nothing, now + 1).out
    entry = matches.source - first + matches.ring
    return Parts(torch.cat([ring.out, own.out], 1), torch.cat([ring.lse, own.lse], 1), *tail, exact, entry, hit)


def replay(layers: list[Parts]) -> tuple[torch.Tensor, torch.Tensor]:
    """(depth int64, error float32) of every output, [layers * Hq, steps]; all layers at once, step by step.

    The ring starts exact; then the entry of a hit is merge(entry of its match, fresh keys since), as in ``methods/mac.py``. Depth counts the
    reuses that an output is built on: 0 for a miss, whose output is exact. Queries are full attention's, so errors do not feed back.
    """
    out, lse, tail_out, tail_lse, exact, entry, hit = (torch.cat(x) for x in zip(*layers, strict=True))
    rows, steps = entry.shape
    before, row = out.shape[1] - steps, torch.arange(rows, device=out.device)
    depth = torch.zeros(rows, before + steps, dtype=torch.int64, device=out.device)
    for i in range(steps):
        used, at, here = hit[:, i], entry[:, i].clamp(min=0), before + i
        reused = State(out[row, at], torch.where(used, lse[row, at], float("-inf")))
        out[:, here], lse[:, here] = merge(reused, State(out[:, here], lse[:, here]))
        depth[:, here] = torch.where(used, depth[row, at] + 1, 0)
    result = merge(State(out[:, before:], lse[:, before:]), State(tail_out, tail_lse)).out
    return depth[:, before:], relative_error(result, exact)


def by_depth(depth: torch.Tensor, error: torch.Tensor) -> pd.DataFrame:
    """Errors by depth in doubling classes (0, 1, 2-3, 4-7, ...): depth_low, depth_high, count, error_mean, error_p10 .. error_p99."""
    depths, errors = depth.flatten().cpu().numpy(), error.flatten().cpu().numpy()
    low = np.where(depths > 0, 1 << np.floor(np.log2(np.maximum(depths, 1))).astype(int), 0)
    rows = []
    for value, part in pd.DataFrame({"low": low, "error": errors}).groupby("low"):
        high = 2 * value - 1 if value else 0
        rows.append({"depth_low": value, "depth_high": high, "count": len(part)} | spread(part.error, "error"))
    return pd.DataFrame(rows)
