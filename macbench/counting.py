"""What a decode step reads and writes, counted from the very tensors that the kernels were given.

Definitions (per request, decode step and layer; L visible tokens, the current one included):

* ``tokens_log``: KV tokens read, summed over query heads. Full attention: Hq * L.
* ``tokens_phys``: KV rows read from memory, per KV head the union over its group of query heads. Full attention: Hkv * L.
* ``bytes_*``: unique bytes by category: kv, meta (page bounds, centroids), state (rings, stored results), idx (index lists),
  write, maint (re-clustering, flushes). Stored K, V and query elements count as 2 bytes (bf16) whatever the arithmetic of the run,
  so that a float32 run on a CPU and a bf16 run on a GPU give the same numbers; float32 statistics count as 4.
* ``tokens_page``, where asked for: ``tokens_phys`` if whole pages of the method's own store were read, the last one as far as it is filled.
* ``bytes_pre``: unique bytes that a method reads and writes between prefill and the first step (keys for votes, clusters, summaries); in no ratio.
* rho_log = sum tokens_log / sum Hq*L, rho_phys = sum tokens_phys / sum Hkv*L,
  rho_bytes = sum (kv + meta + state + idx) / sum Hkv*L*2*d*2: ratios of sums over steps and layers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

ELEMENT_BYTES = 2
PAGE = 16  # tokens; what rho_page is about, whatever the engine's own pages
CATEGORIES = ("kv", "meta", "state", "idx", "write", "maint")
READ_CATEGORIES = ("kv", "meta", "state", "idx")
# Device buffers are reduced on the host after this many steps (fewer, if one of them grew beyond so many bytes); nothing is read back in between.
_WINDOW = 256
_WINDOW_BYTES = 64 << 20


@dataclass(frozen=True)
class Shape:
    """Sizes of the attention that a method serves. ``scale`` multiplies q.k; ``dtype`` is that of queries and cache.

    ``max_tokens``: the most that a request ever sees, prompt and generated; buffers of a method are sized by it. ``rotate``: the model's
    RoPE, x [..., n, d] and positions int [n] (negative ones undo it) -> [..., n, d]. ``devices``: that of every layer, where not all are on
    ``device``, the first one's. ``first``, ``whole``: of a part of a model's layers the first one, and how many the model has (0: these).
    """

    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    dtype: torch.dtype = torch.float32
    device: str | torch.device = "cpu"
    batch: int = 1
    max_tokens: int = 0
    rotate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = field(default=None, compare=False)
    devices: tuple[torch.device, ...] = ()
    first: int = 0
    whole: int = 0

    def device_of(self, layer: int) -> str | torch.device:
        return self.devices[layer] if self.devices else self.device

    @property
    def model_layers(self) -> int:
        """Layers of the model, of which these may be a part."""
        return self.whole or self.layers

    @property
    def group(self) -> int:
        return self.q_heads // self.kv_heads

    @property
    def key_bytes(self) -> int:
        """Bytes of one token's K (or V) of one KV head."""
        return self.head_dim * ELEMENT_BYTES

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


def span_pages(spans: np.ndarray, lengths: np.ndarray, kv_heads: int, page: int) -> np.ndarray:
    """Physical tokens of ``spans`` rounded out to whole pages, but not beyond ``lengths`` int [..., B]: int64 [..., B]."""
    start, stop = (x.copy() for x in np.moveaxis(spans, -3, 0))
    empty = stop <= start
    start, stop = start // page * page, np.minimum(-(-stop // page) * page, lengths[..., None, :, None])
    return span_tokens(np.stack([start, np.where(empty, start, stop)], axis=-3), kv_heads)[1]


def _per_request(units: np.ndarray) -> np.ndarray:
    """[steps, layers, B, ...] summed to int64 [steps, layers, B]."""
    return units.reshape(*units.shape[:3], -1).sum(-1, dtype=np.int64)


class Ledger:
    """Collects the reads of a batch of generations that decode in step.

    A step is ``begin_step`` (host), any number of reports per layer (device; they only keep references), and ``end_step`` (device: two small
    launches for all reports of a dtype and all layers). Sums are made on the host, once per some hundred steps. Reports and ``end_step``
    never synchronise with the host and use the same memory in every step, so that a CUDA graph may capture them; a replay is then
    ``begin_step`` and the replay. Every step must report the same things in the same order.
    """

    def __init__(self, shape: Shape, page: int = 0):
        self.shape, self.page = shape, page
        self._reports: dict[tuple, dict[int, torch.Tensor]] = {}
        self._reporting: dict[tuple, tuple[int, ...]] = {}  # layers by report, the same in every step
        self._windows: dict[tuple, torch.Tensor] = {}
        self._places: dict[tuple, tuple] = {}  # by report: window, first column, layers that are kept, shape of each
        self._at = torch.zeros(1, dtype=torch.int64, device=shape.device)
        self._size = _WINDOW
        self.reset()

    def reset(self) -> None:
        """Forget all steps; the buffers stay."""
        self._done: list[dict[str, np.ndarray]] = []
        self._lengths: list[list[int]] = []
        self._steps = 0
        self._at.zero_()
        self._reports.clear()
        self.prepared = [0] * self.shape.batch

    def prepare(self, request: int, nbytes: int) -> None:
        """Bytes that a method moves for a request between prefill and the first step."""
        self.prepared[request] += nbytes

    def begin_step(self, lengths: list[int]) -> None:
        """Open the accounts of a step in which request b sees ``lengths[b]`` tokens, the current one included."""
        if self._steps == self._size:
            self._flush()
        self._steps += 1
        self._lengths.append(list(lengths))

    def read(self, layer: int, spans: torch.Tensor) -> None:
        """K and V rows: the same spans int32 [S, 2, B, Hq] that ``kernels.attend`` gets. At most once per layer and step."""
        self._report(("spans",), layer, spans)

    def add(self, layer: int, category: str, per: int, units: torch.Tensor | int = 1) -> None:
        """``per`` bytes of a category of ``CATEGORIES`` for each of ``units``: an int, or an int or bool tensor [B, ...], summed per request."""
        turn = sum(key[:2] == ("bytes", category) and layer in found for key, found in self._reports.items())
        kind = tuple(units.shape) if isinstance(units, torch.Tensor) else units
        self._report(("bytes", category, turn, per, kind), layer, units)

    def tokens(self, layer: int, logical: torch.Tensor, physical: torch.Tensor, plain: bool = True) -> None:
        """K and V rows that are not spans: tokens summed over query heads, rows summed over KV heads (union over a group); int [B, ...] each.

        Not ``plain``: the rows are stored in another precision, and the method adds their bytes itself, to the category kv.
        """
        self._report(("logical", tuple(logical.shape)), layer, logical)
        self._report(("physical" if plain else "rows", tuple(physical.shape)), layer, physical)

    def selected(
        self, layer: int, ids: torch.Tensor, counts: torch.Tensor, unit: int, lengths: torch.Tensor, indexed: bool = True,
        all_keys: bool = False, rows: torch.Tensor | None = None, store: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        """K and V rows of the same sets that ``kernels.attend_selected`` gets: ids int32 [B, R, n], counts int32 [B, R], lengths int32 [B].

        Also 4 bytes of idx per id, unless ``indexed`` is False; a set of everything is dense attention and needs no list. With ``all_keys``
        the K of every visible token was read to choose whose V to read. The tensors must keep their content until the end of the step.
        ``rows`` int32 [B, Hkv], of a method that keeps compact copies of visible tokens (unit 1, no index): the union over each group, which
        it knows, so that nobody needs to look at the ids. ``store``: where the sets lie in a method's own store and how much that holds,
        shaped as ``ids`` and ``lengths``.
        """
        if rows is not None:
            self.tokens(layer, counts * (self.shape.q_heads // counts.shape[1]), rows)
            return
        self._report(("selected", unit, indexed, all_keys, tuple(ids.shape)), layer, (ids, counts, lengths, *(store or (ids, lengths))))

    def matched(self, layer: int, hit: torch.Tensor, depth: torch.Tensor) -> None:
        """Reuse: hit bool [B, Hq], and chain depth int32 [B, Hq] of the entry that this step leaves behind."""
        self._report(("hits",), layer, hit)
        self._report(("depth",), layer, depth)

    def _report(self, key: tuple, layer: int, what) -> None:
        layers = self._reports.setdefault(key, {})
        if layer in layers:
            raise ValueError(f"{key[0]} of layer {layer} reported twice in a step")
        layers[layer] = what

    def end_step(self) -> None:
        """Close the accounts of the step: what was reported goes into windows as it is, all layers at once. Device work only."""
        plain: dict[torch.dtype, list[tuple[tuple, list[torch.Tensor]]]] = {}
        for key, found in self._reports.items():
            values, layers = list(found.values()), tuple(found)
            if key[0] == "selected":  # lists of ids are long: what they amount to is kept instead
                for name, amount in self._selection(key, values).items():
                    self._reporting[(*key, name)] = layers
                    plain.setdefault(amount.dtype, []).append(((*key, name), [*amount]))
                continue
            self._reporting[key] = layers
            if isinstance(values[0], torch.Tensor):
                once = all(value is values[0] for value in values)  # the same for all layers
                plain.setdefault(values[0].dtype, []).append((key, values[:1] if once else values))
        for dtype, reports in plain.items():
            self._keep((dtype, *((key, len(values)) for key, values in reports)), reports)
        self._at += 1
        self._reports.clear()

    def _selection(self, key: tuple, reports: list[tuple[torch.Tensor, ...]]) -> dict[str, torch.Tensor]:
        """What sets amount to, int64 [layers, B] each. Reports: ids [B, R, n], counts [B, R], lengths [B] of each layer."""
        _, unit, indexed, all_keys, (_, sets, n) = key
        s, (counts, lengths) = self.shape, (torch.stack(part) for part in list(zip(*reports, strict=True))[1:3])
        held = counts.long()
        if unit > 1 or sets != s.kv_heads:
            ids = torch.stack([report[0] for report in reports])
            lead, visible = ids.shape[:2], lengths[..., None, None]
            rows = (visible - ids * unit).clamp(0, unit) * (torch.arange(n, device=ids.device) < counts[..., None])  # tokens of each id
            held = rows.sum(-1)
        logical, physical = held.sum(-1) * (s.q_heads // sets), held.sum(-1)
        if sets != s.kv_heads:  # an id that several heads of a group chose is read once: count the first of its kind after sorting
            beyond = torch.iinfo(ids.dtype).max
            order = torch.where(rows > 0, ids, beyond).view(*lead, s.kv_heads, -1).sort(-1).values
            fresh = torch.ones_like(order, dtype=torch.bool)
            fresh[..., 1:] = order[..., 1:] != order[..., :-1]
            fresh &= order != beyond
            physical = ((visible - order.masked_fill(~fresh, 0) * unit).clamp(0, unit) * fresh).sum((-1, -2))
        amounts = {"idx": 4 * (counts * (held < lengths[..., None])).sum(-1)} if indexed else {}
        if all_keys:  # half a token for a key alone; what is left over of an odd number goes to the bytes
            logical = (logical + s.q_heads * lengths.long()) // 2
            physical = physical + s.kv_heads * lengths.long()
            amounts["kv"] = physical % 2 * (s.kv_row_bytes // 2)
            physical = physical // 2
        if self.page:
            amounts["pages"] = torch.stack([self._pages(unit, all_keys, *report[1:]) for report in reports])
        return amounts | {"logical": logical, "physical": physical}

    def _pages(
        self, unit: int, all_keys: bool, counts: torch.Tensor, lengths: torch.Tensor, places: torch.Tensor, held: torch.Tensor
    ) -> torch.Tensor:
        """Rows of the pages that sets of one layer touch, int64 [B]; half a row is lost where keys and values differ by an odd number."""
        heads, size = self.shape.kv_heads, self.page
        first = torch.arange(0, self.shape.max_tokens, size, device=places.device)
        room = len(first) * size
        tokens = (places.long() * unit)[..., None] + torch.arange(unit, device=places.device)
        known = (torch.arange(places.shape[-1], device=places.device) < counts[..., None])[..., None] & (tokens < held[:, None, None, None])
        read = torch.zeros(len(places), heads, room + 1, dtype=torch.bool, device=places.device)
        read.scatter_(-1, torch.where(known, tokens, room).view(len(places), heads, -1), True)
        touched = read[..., :room].unflatten(-1, (-1, size)).any(-1)
        rows = (touched * (held[:, None] - first).clamp(0, size)[:, None]).sum((1, 2))
        return (rows + heads * lengths.long()) // 2 if all_keys else rows

    def _keep(self, window: tuple, reports: list[tuple[tuple, list[torch.Tensor]]]) -> None:
        """Reports of one dtype, with the values of each of their layers, as a row of one window."""
        row = torch.cat([value.reshape(-1) for _, values in reports for value in values])
        if window not in self._windows:
            self._size = max(1, min(self._size, _WINDOW_BYTES // max(1, row.nbytes)))
            self._windows[window] = torch.zeros(self._size, len(row), dtype=row.dtype, device=row.device)
        first = 0
        for key, values in reports:
            self._places[key] = (window, first, len(values), tuple(values[0].shape))
            first += len(values) * values[0].numel()
        self._windows[window].index_copy_(0, self._at, row[None])

    def _kept(self, key: tuple, steps: int) -> np.ndarray | None:
        """[steps, reporting layers, ...] of a report of tensors, from the device."""
        if key not in self._places:
            return None
        window, first, count, shape = self._places[key]
        columns = self._windows[window][:steps, first : first + count * math.prod(shape)].cpu().numpy()
        return np.broadcast_to(columns.reshape(steps, count, *shape), (steps, len(self._reporting[key]), *shape))

    def _flush(self) -> None:
        s, steps = self.shape, self._steps
        if not steps:
            return
        size = (steps, s.layers, s.batch)
        others = ("logical", "physical", "rows", "pages", "hits", "match_heads", "chain_sum", "chain_max")
        lengths = np.array(self._lengths[-steps:], np.int64)[:, None, :].repeat(s.layers, 1)
        sums = {name: np.zeros(size, np.int64) for name in (*CATEGORIES, *others)}
        for key, layers in self._reporting.items():
            kind, here = key[0], (slice(None), list(layers))
            values = self._kept(key, steps)
            if kind == "bytes":
                _, category, _, per, units = key
                sums[category][here] += per * (units if values is None else _per_request(values))
            elif kind == "spans":
                for name, tokens in zip(("logical", "physical"), span_tokens(values, s.kv_heads), strict=True):
                    sums[name][here] += tokens
                if self.page:
                    sums["pages"][here] += span_pages(values, lengths[here], s.kv_heads, self.page)
            elif kind == "hits":
                sums["hits"][here] = values.sum(-1)
                sums["match_heads"][here] = s.q_heads
            elif kind == "depth":
                sums["chain_sum"][here], sums["chain_max"][here] = values.sum(-1, dtype=np.int64), values.max(-1)
            elif kind == "selected":
                sums[key[-1]][here] += values
            else:
                sums[kind][here] += _per_request(values)
                if kind != "logical":  # such rows lie together
                    sums["pages"][here] += _per_request(values)
        part = {f"bytes_{c}": sums[c] for c in CATEGORIES}
        part["tokens_log"], part["tokens_phys"] = sums["logical"], sums["physical"] + sums["rows"]
        part["bytes_kv"] = part["bytes_kv"] + sums["physical"] * s.kv_row_bytes
        part["bytes_write"] = part["bytes_write"] + s.kv_heads * s.kv_row_bytes  # the new K/V row, whatever the method
        part["tokens_log_full"], part["tokens_phys_full"] = lengths * s.q_heads, lengths * s.kv_heads
        part["bytes_full"] = part["tokens_phys_full"] * 2 * s.head_dim * 2  # always bf16 full attention
        part |= {name: sums[name] for name in ("hits", "match_heads", "chain_sum", "chain_max")}
        part |= {"tokens_page": sums["pages"]} if self.page else {}
        self._done.append(part)
        self._steps = 0
        self._at.zero_()

    def counts(self) -> dict[str, np.ndarray]:
        """All counts so far, each int64 [steps, layers, B]."""
        self._flush()
        names = (*COUNTS, "tokens_page") if self.page else COUNTS
        if not self._done:
            empty = np.zeros((0, self.shape.layers, self.shape.batch), np.int64)
            return {name: empty for name in names}
        self._done = [{name: np.concatenate([part[name] for part in self._done]).astype(np.int64) for name in names}]
        return self._done[0]


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
