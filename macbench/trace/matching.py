"""Nearest earlier queries: how far they are, how far back they lie, and how they spread over the heads of a GQA group."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from macbench.trace.text import Layer

# Steps whose distances to a whole window are held at once; and of which every earlier query is looked at, whether near or not.
_BLOCK, _EVERY = 128, 256
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True)
class Matches:
    """Of the measured steps of a layer, all [Hq, steps].

    ``nearest``: window -> distance to the nearest of the last ``window`` queries, in units of sqrt(2 d) (inf where none is eligible).
    ``source``: int64, position of the nearest in the ring of ``ring`` entries; ties go to the lowest ring row, as in the kernels.
    """

    nearest: dict[int, torch.Tensor]
    source: torch.Tensor
    ring: int

    def hits(self, tau: float) -> torch.Tensor:
        """Strictly nearer than tau * sqrt(2 d), in the ring's window."""
        return self.nearest[self.ring] < tau


def match(layer: Layer, windows: tuple[int, ...], ring: int, oldest: int) -> Matches:
    """Distances without a matrix product, as the kernels compute them. Entries of positions before ``oldest`` are not eligible."""
    reach, n = max(*windows, ring), layer.x.shape[1]
    nearest = {w: [] for w in {*windows, ring}}
    sources = []
    gap = torch.arange(reach, 0, -1, device=layer.x.device)  # of the columns below
    for start in range(n - layer.steps, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        rows = stop - start
        square = torch.cdist(layer.x[:, start:stop], layer.x[:, start - reach : stop - 1], compute_mode="donot_use_mm_for_euclid_dist")
        heads, _, width = square.shape
        # Row i sees the columns i .. i + reach - 1: a view along the diagonal.
        distance = square.as_strided((heads, rows, reach), (rows * width, width + 1, 1)) / layer.unit
        position = torch.arange(start, stop, device=gap.device)[:, None] + layer.first - gap
        distance = distance.masked_fill(position < oldest, float("inf"))
        for window, found in nearest.items():
            found.append(distance[..., reach - window :].amin(-1))
        recent = slice(reach - ring, reach)
        least = distance[..., recent] == nearest[ring][-1][..., None]
        row = (position[:, recent] % ring).expand_as(least).masked_fill(~least, ring).argmin(-1)
        sources.append(position[:, recent].expand_as(least).gather(-1, row[..., None])[..., 0])
    return Matches({w: torch.cat(found, 1) for w, found in nearest.items()}, torch.cat(sources, 1), ring)


def acceptance(matches: Matches, taus: tuple[float, ...]) -> pd.DataFrame:
    """Hits by head, window and tau: columns head, window, tau, steps, hits."""
    rows = []
    for window, nearest in sorted(matches.nearest.items()):
        for tau in taus:
            hits = (nearest < tau).sum(-1).tolist()
            rows += [{"head": h, "window": window, "tau": tau, "steps": nearest.shape[1], "hits": n} for h, n in enumerate(hits)]
    return pd.DataFrame(rows)


def distances(layer: Layer, matches: Matches) -> pd.DataFrame:
    """A row per pair: ``pairs`` (nearest, or every at powers of two back), gap, and the distance of both spaces, pre and post (RoPE)."""
    now = layer.positions.expand(len(layer.q), -1)
    eligible = matches.nearest[matches.ring].isfinite()
    chosen = [("nearest", now, matches.source, eligible)]
    some = now[:, :: max(1, layer.steps // _EVERY)]
    chosen += [("every", some, some - (1 << e), torch.ones_like(some, dtype=torch.bool)) for e in range(matches.ring.bit_length())]
    frames = []
    for kind, position, source, wanted in chosen:
        spaces = {}
        for name, of in (("pre", layer.x), ("post", layer.q)):
            spaces[name] = ((layer.at(of, position) - layer.at(of, source)).norm(dim=-1) / layer.unit)[wanted].cpu().numpy()
        frames.append(pd.DataFrame({"pairs": kind, "gap": (position - source)[wanted].cpu().numpy(), **spaces}))
    return pd.concat(frames, ignore_index=True)


def spread(values: pd.Series, name: str) -> dict[str, float]:
    """Mean and quantiles as columns: name_mean, name_p10, ..."""
    return {f"{name}_mean": values.mean()} | {f"{name}_{key}": x for key, x in zip(QUANTILES, values.quantile([*QUANTILES.values()]), strict=True)}


def by_gap(pairs: pd.DataFrame) -> pd.DataFrame:
    """Quantiles of both distances by gap, in doubling classes: pairs, gap_low, gap_high (inclusive), count, pre_p10 .. post_p99, means."""
    low = 1 << np.floor(np.log2(pairs.gap.to_numpy())).astype(int)
    grouped = pairs.assign(gap_low=low).groupby(["pairs", "gap_low"])
    rows = []
    for (kind, low), part in grouped:
        row = {"pairs": kind, "gap_low": low, "gap_high": low if kind == "every" else 2 * low - 1, "count": len(part)}
        rows.append(row | spread(part.pre, "pre") | spread(part.post, "post"))
    return pd.DataFrame(rows)


def groups(layer: Layer, matches: Matches, tau: float, band: int) -> pd.DataFrame:
    """Match positions inside the GQA groups: a row per KV head.

    steps; hit_all, hit_none: steps in which every or no head of the group hits; spread_*: latest minus earliest match position in tokens,
    of the steps with hit_all; read_own, read_group: tokens that a hit of such a step reads, mean over heads, and once for the whole group.
    """
    kv_heads = len(layer.k)
    hits = matches.hits(tau).view(kv_heads, -1, layer.steps)
    source = matches.source.view(kv_heads, -1, layer.steps)
    gap = layer.positions - source
    rows = []
    for g in range(kv_heads):
        everyone = hits[g].all(0)
        row = {"kv_head": g, "steps": layer.steps, "hit_all": int(everyone.sum()), "hit_none": int((~hits[g]).all(0).sum())}
        if row["hit_all"]:
            apart = pd.Series((source[g].amax(0) - source[g].amin(0))[everyone].cpu().numpy())
            reads = (gap[g] + band)[:, everyone].float()
            row |= spread(apart, "spread") | {"spread_max": apart.max()}
            row |= {"read_own": reads.mean().item(), "read_group": reads.amax(0).mean().item()}
        rows.append(row)
    return pd.DataFrame(rows)
