"""What a decode step reads and writes, counted from the very tensors that the kernels were given.

Definitions (per request, decode step and layer; L visible tokens, the current one included):

* ``tokens_log``: KV tokens read, summed over query heads. Full attention: Hq * L.
* ``tokens_phys``: KV rows read from memory, per KV head the union over its group of query heads. Full attention: Hkv * L.
* ``bytes_*``: unique bytes by category: kv, meta (page bounds, centroids), state (rings, stored results), idx (index lists),
  write, maint (re-clustering, flushes). Stored K, V and query elements count as 2 bytes (bf16) whatever the arithmetic of the run,
  so that a float32 run on a CPU and a bf16 run on a GPU give the same numbers; float32 statistics count as 4.
* rho_log = sum tokens_log / sum Hq*L, rho_phys = sum tokens_phys / sum Hkv*L,
  rho_bytes = sum (kv + meta + state + idx) / sum Hkv*L*2*d*2: ratios of sums over steps and layers.
"""

from dataclasses import dataclass

import numpy as np
import torch

ELEMENT_BYTES = 2
CATEGORIES = ("kv", "meta", "state", "idx", "write", "maint")
READ_CATEGORIES = ("kv", "meta", "state", "idx")
# Device buffers are reduced on the host after this many steps; nothing is read back in between.
_WINDOW = 256


@dataclass(frozen=True)
class Shape:
    """Sizes of the attention that a method serves. ``scale`` multiplies q.k; ``dtype`` is that of queries and cache."""

    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    dtype: torch.dtype = torch.float32
    device: str | torch.device = "cpu"
    batch: int = 1

    @property
    def group(self) -> int:
        return self.q_heads // self.kv_heads

    @property
    def kv_row_bytes(self) -> int:
        """Bytes of one token's K and V of one KV head (the token equivalent, TE)."""
        return 2 * self.head_dim * ELEMENT_BYTES


def span_tokens(spans: np.ndarray, kv_heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Logical and physical tokens of spans int [..., S, 2, B, Hq]: sum over heads, and union over each group; both int64 [..., B]."""
    start, stop = np.moveaxis(spans, -3, 0).astype(np.int64)  # each [..., S, B, Hq]
    start = np.maximum(start, 0)
    logical = np.maximum(stop - start, 0).sum(axis=(-3, -1))
    # Union of intervals: sorted by start, each adds what lies beyond the furthest stop so far.
    *lead, count, batch, heads = start.shape
    grouped = (*lead, count, batch, kv_heads, heads // kv_heads)
    start, stop = (np.moveaxis(x.reshape(grouped), -4, -1).reshape(*lead, batch, kv_heads, -1) for x in (start, np.maximum(start, stop)))
    order = np.argsort(start, axis=-1)
    start, stop = np.take_along_axis(start, order, -1), np.take_along_axis(stop, order, -1)
    reach = np.maximum.accumulate(stop, axis=-1)
    before = np.concatenate([np.zeros_like(reach[..., :1]), reach[..., :-1]], axis=-1)
    physical = np.maximum(stop - np.maximum(start, before), 0).sum(axis=(-2, -1))
    return logical, physical


class Ledger:
    """Collects the reads of one generation. Methods report in ``attend``; nothing here synchronises with the device before ``counts``."""

    def __init__(self, shape: Shape):
        self.shape = shape
        self.step = -1
        self._done: list[dict[str, np.ndarray]] = []
        self._lengths: list[list[int]] = []
        self._clear()

    def _clear(self) -> None:
        s = self.shape
        self._spans: torch.Tensor | None = None
        self._bytes = {c: torch.zeros(_WINDOW, s.layers, s.batch, dtype=torch.int64, device=s.device) for c in CATEGORIES}
        self._hits = torch.zeros(_WINDOW, s.layers, s.batch, s.q_heads, dtype=torch.bool, device=s.device)
        self._depth = torch.zeros(_WINDOW, s.layers, s.batch, s.q_heads, dtype=torch.int32, device=s.device)
        self._matching = False

    def begin_step(self, lengths: list[int]) -> None:
        """Open the accounts of a step in which request b sees ``lengths[b]`` tokens, the current one included."""
        if self.step == _WINDOW - 1:
            self._flush()
        self.step += 1
        self._lengths.append(list(lengths))

    def read(self, layer: int, spans: torch.Tensor) -> None:
        """K and V rows: the same spans int32 [S, 2, B, Hq] that ``kernels.attend`` gets."""
        if self._spans is None:
            s = self.shape
            self._spans = torch.zeros(_WINDOW, s.layers, *spans.shape, dtype=torch.int32, device=spans.device)
        self._spans[self.step, layer] = spans

    def add(self, layer: int, category: str, bytes_: torch.Tensor | int) -> None:
        """Bytes of a category of ``CATEGORIES`` per request: int or int tensor [B]."""
        self._bytes[category][self.step, layer] += bytes_

    def matched(self, layer: int, hit: torch.Tensor, depth: torch.Tensor) -> None:
        """Reuse: hit bool [B, Hq], and chain depth int32 [B, Hq] of the entry that this step leaves behind."""
        self._matching = True
        self._hits[self.step, layer] = hit
        self._depth[self.step, layer] = depth

    def _flush(self) -> None:
        s, steps = self.shape, self.step + 1
        if not steps:
            return
        part = {f"bytes_{c}": v[:steps].cpu().numpy() for c, v in self._bytes.items()}
        if self._spans is None:
            logical = physical = np.zeros((steps, s.layers, s.batch), np.int64)
        else:
            logical, physical = span_tokens(self._spans[:steps].cpu().numpy(), s.kv_heads)
        part["tokens_log"], part["tokens_phys"] = logical, physical
        part["bytes_kv"] = part["bytes_kv"] + physical * s.kv_row_bytes
        part["bytes_write"] = part["bytes_write"] + s.kv_heads * s.kv_row_bytes  # the new K/V row, whatever the method
        lengths = np.array(self._lengths[-steps:], np.int64)[:, None, :].repeat(s.layers, 1)
        part["tokens_log_full"], part["tokens_phys_full"] = lengths * s.q_heads, lengths * s.kv_heads
        part["bytes_full"] = part["tokens_phys_full"] * 2 * s.head_dim * 2  # always bf16 full attention
        hits = self._hits[:steps].cpu().numpy()
        depth = self._depth[:steps].cpu().numpy()
        part["hits"] = hits.sum(-1)
        part["match_heads"] = np.full_like(part["hits"], s.q_heads if self._matching else 0)
        part["chain_sum"], part["chain_max"] = depth.sum(-1, dtype=np.int64), depth.max(-1)
        self._done.append(part)
        self.step = -1
        self._clear()

    def counts(self) -> dict[str, np.ndarray]:
        """All counts so far, each int64 [steps, layers, B]."""
        self._flush()
        if not self._done:
            empty = np.zeros((0, self.shape.layers, self.shape.batch), np.int64)
            return {name: empty for name in COUNTS}
        return {name: np.concatenate([part[name] for part in self._done]).astype(np.int64) for name in COUNTS}


FULL = ("tokens_log_full", "tokens_phys_full", "bytes_full")
TOTALS = ("tokens_log", "tokens_phys", *(f"bytes_{c}" for c in CATEGORIES), *FULL)
COUNTS = (*TOTALS, "hits", "match_heads", "chain_sum", "chain_max")


def ratios(totals: dict[str, float]) -> dict[str, float | None]:
    """The headline triple and the hit rate from summed counts; None where nothing was counted."""

    def over(a: float, b: float) -> float | None:
        return float(a) / float(b) if b else None

    return {
        "rho_log": over(totals["tokens_log"], totals["tokens_log_full"]),
        "rho_phys": over(totals["tokens_phys"], totals["tokens_phys_full"]),
        "rho_bytes": over(sum(totals[f"bytes_{c}"] for c in READ_CATEGORIES), totals["bytes_full"]),
        "hit_rate": over(totals["hits"], totals["match_heads"]),
    }
