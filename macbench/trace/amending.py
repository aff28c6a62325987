"""What one reuse costs: the output merged from a match's exact state and a fresh band and tail, against exact full attention."""

import pandas as pd
import torch
from macbench_kernels.state import merge

from macbench.trace.matching import Matches, spread
from macbench.trace.states import relative_error, state
from macbench.trace.text import Layer


def errors(layer: Layer, matches: Matches, bands: tuple[int, ...], samples: int) -> pd.DataFrame:
    """A row per head, sampled step and band r: head, position, distance, band, error, rounding.

    ``samples``: how many steps, evenly spaced. The output is merge(state of the nearest query p over [0, p+1-r), state of q_t over
    [p+1-r, t]); ``error`` is its relative L2 distance to full attention, ``rounding`` that of full attention's own output in bf16.
    Only pairs with p >= the widest band count, so that every band has the same ones.
    """
    chosen = torch.linspace(0, layer.steps - 1, min(samples, layer.steps), device=layer.q.device).round().long()
    now = layer.positions[chosen].expand(len(layer.q), -1)
    source, distance = matches.source[:, chosen], matches.nearest[matches.ring][:, chosen]
    wanted = distance.isfinite() & (source >= max(bands))
    source = torch.where(wanted, source, now)  # a query is its own neighbour where it has none: dropped below
    q, old = layer.at(layer.q, now), layer.at(layer.q, source)
    nothing = torch.zeros_like(now)
    exact = state(layer, q, nothing, now + 1).out
    rounding = relative_error(exact.bfloat16().float(), exact)
    head = torch.arange(len(q), device=q.device)[:, None].expand_as(now)
    frames, stored, reached = [], None, nothing
    for band in sorted(bands, reverse=True):
        edge = (source + 1 - band).clamp(min=0)
        more = state(layer, old, reached, edge)
        stored, reached = more if stored is None else merge(stored, more), edge
        merged = merge(stored, state(layer, q, edge, now + 1)).out
        columns = {"head": head, "position": now, "distance": distance, "error": relative_error(merged, exact), "rounding": rounding}
        frames.append(pd.DataFrame({name: values[wanted].cpu().numpy() for name, values in columns.items()}).assign(band=band))
    return pd.concat(frames, ignore_index=True)


def by_band(found: pd.DataFrame, taus: tuple[float, ...]) -> pd.DataFrame:
    """Errors of the pairs that hit at each tau, by band: tau, band, count, error_mean, error_p10 .. error_p99, rounding_mean."""
    rows = []
    for tau in taus:
        for band, part in found[found.distance < tau].groupby("band"):
            row = {"tau": tau, "band": band, "count": len(part), "rounding_mean": part.rounding.mean()}
            rows.append(row | spread(part.error, "error"))
    return pd.DataFrame(rows)
