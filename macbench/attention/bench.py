"""The attention benchmark: correctness against float32 first, then time, for full attention and MAC at chosen hit rates.

Every number is of one attention call (one layer, one decode step). A round makes one call for every ring (or, of full attention, every
cache) of a problem, lengths then grow by one. Bytes and hit rates are means over the very calls whose times are reported.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from statistics import mean

import torch
from macbench_kernels import kernels, torch_backend
from macbench_kernels.mac import compose

from macbench.attention import peers
from macbench.attention.problem import Cell, Problem, Stream, rotation, some_requests, some_rows
from macbench.attention.reads import Reads
from macbench.attention.timing import copy_bandwidth, rounds, timed
from macbench.errors import one_line

# Largest relative L2 error against float32 that counts as correct.
TOLERANCE = 1e-2
# What a step at a hit rate between 0 and 1 shall take at most on an H100: 1.2 * (bytes / 2.75 TB/s) + 8 us.
BOUND_FACTOR, BOUND_BANDWIDTH, BOUND_LAUNCHES_MS = 1.2, 2.75e12, 0.008
_WARM = 3
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
NO_GPU = (
    "task=attention times GPU kernels and finds no CUDA device; "
    "device=cpu backend=torch runs the CPU reference instead (correctness and bytes, host-clock times)"
)


class NoGPU(RuntimeError):
    """There is no CUDA device."""


def measure(
    heads: Iterable[str] = ("32/8",),
    batch: Iterable[int] = (1,),
    ctx: Iterable[int] = (32768,),
    hit_rate: Iterable[float] = (0.0, 0.5, 0.9, 0.97, 1.0),
    misses: Iterable[str] = ("random", "clustered"),
    backends: Iterable[str] = ("flashinfer", "triton"),
    modes: Iterable[str] = ("graph",),
    window: Iterable[int] = (512,),
    band: int = 256,
    tau: float = 0.45,
    sink: int = 0,
    min_context: int = 0,
    max_chain: int | None = None,
    head_dim: int = 128,
    page_size: int = 16,
    max_gap: int = 64,
    dtype: str = "bfloat16",
    scattered: bool = False,
    mac: bool = True,
    match: bool = False,
    steps: int = 30,
    device: str = "cuda",
    seed: int = 42,
    say=lambda row: None,
) -> list[dict]:
    """All rows of a benchmark, one flat dict each (see ``_row``); ``say`` gets each row as soon as it exists.

    ``heads``: 'Hq/Hkv'. ``backends``: of full attention, out of peers.FULL_BACKENDS. ``misses``: see problem.Stream. ``modes``: graph, eager.
    ``window`` (several are tried) to ``max_chain``: MAC's own.
    ``mac=False`` leaves MAC out; ``match`` adds rows of its match alone. ``steps``: rounds per measurement.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise NoGPU(NO_GPU)
    if device != "cuda":
        modes = ("cpu",)
    ceiling = copy_bandwidth(device)
    rows: list[dict] = []
    for pair in heads:
        q_heads, kv_heads = map(int, str(pair).split("/"))
        for size in batch:
            for length in ctx:
                windows = tuple(window)
                cell = Cell(
                    q_heads, kv_heads, size, length, head_dim, page_size, windows[0], band, tau, sink, min_context, max_chain, max_gap,
                    _DTYPES[dtype], scattered,
                )  # fmt: skip
                for row in _cell(cell, windows, tuple(hit_rate), tuple(misses), tuple(backends), tuple(modes), mac, match, steps, device, seed):
                    row |= _derived(row, ceiling)
                    rows.append(row)
                    say(row)
    compare(rows)
    return rows


def _cell(cell, windows, hit_rates, misses, backends, modes, mac, match, steps, device, seed) -> Iterator[dict]:
    """Rows of one (heads, batch, ctx): one problem, all methods on it."""
    try:
        layers, count = _rotation(cell, windows, device)
        problem = Problem(cell, device, layers, steps, seed, count)
    except (RuntimeError, MemoryError) as error:
        yield _row(cell, "all", "", "", 0) | {"error": one_line(error)}
        return
    for backend in backends:
        for mode in modes:
            yield _row(cell, "full", backend, mode, problem.layers) | _guard(_full, problem, backend, mode)
    for window in windows if mac or match else ():
        problem.cell = replace(cell, window=window)
        stream = rings = None
        if match:
            problem.rewind()
            stream = Stream(problem, 1.0, "none")
            rings = stream.rings
            for mode in modes:
                key = _row(problem.cell, "match", "torch" if device == "cpu" else "triton", mode, problem.layers, problem.rings)
                yield key | {"synthetic": True} | _guard(_match, problem, stream, mode)
        if not mac:
            continue
        for rate in hit_rates:
            for pattern in misses if 0 < rate < 1 else ("none",):
                problem.rewind()
                stream = Stream(problem, rate, pattern, rings)
                rings = stream.rings
                for mode in modes:
                    if mode != modes[0]:
                        problem.rewind()
                        stream = Stream(problem, rate, pattern, rings)
                    label = {"hit_rate": rate, "misses": pattern, "synthetic": True}
                    key = _row(problem.cell, "mac", "torch" if device == "cpu" else "triton", mode, problem.layers, problem.rings)
                    yield key | label | _guard(_mac, problem, stream, mode)


def _rotation(cell: Cell, windows: tuple[int, ...], device: str) -> tuple[int, int]:
    """(caches, rings) of a round. The CPU's times are no result, so there one of each will do."""
    if device != "cuda":
        return 1, 1
    torch.cuda.empty_cache()
    return rotation(cell, windows, torch.cuda.get_device_properties(0).L2_cache_size, torch.cuda.mem_get_info()[0])


def _guard(function, *args) -> dict:
    """A failed measurement is a row with one line of error; the run goes on."""
    try:
        return function(*args)
    except peers.Unavailable as error:
        return {"error": one_line(error)}
    except (RuntimeError, NotImplementedError, ValueError, MemoryError) as error:
        return {"error": f"{type(error).__name__}: {one_line(error)}"}


def _full(problem: Problem, backend: str, mode: str) -> dict:
    cell = problem.cell
    problem.rewind()
    run = peers.make(backend, problem)
    chosen = sorted({0, cell.batch - 1})
    cache = some_requests(problem.cache, chosen)
    stop = cache.lengths[:, None].expand(-1, cell.q_heads)
    worst = 0.0
    for layer in sorted({0, problem.layers - 1}):
        want = torch_backend.attend(problem.q[layer][chosen], cache, layer, torch.stack([torch.zeros_like(stop), stop])[None], cell.scale)
        worst = max(worst, _distance(run(layer)[chosen], want.out[0]))
    _check(worst)

    def everything():
        for layer in range(problem.layers):
            run(layer)
        problem.advance()

    spread = rounds(everything, lambda i: None, problem.steps, problem.layers, mode, _WARM)
    grown = mean(timed(problem.steps, _WARM)) if backend in peers.GROWING else 0
    tokens = cell.batch * cell.kv_heads * (cell.ctx + grown)
    return spread | {"relative_error": worst, "bytes_read": round(tokens * 2 * cell.head_dim * cell.itemsize), "kv_tokens": round(tokens)}


def _mac(problem: Problem, stream: Stream, mode: str) -> dict:
    cell, cache = problem.cell, problem.cache
    mac_step = kernels("torch" if mode == "cpu" else "triton", problem.device).mac_step
    worst = _check_mac(problem, stream, mac_step)

    inputs = stream.queries[0].clone()

    def call(i):
        return mac_step(inputs[i], problem.q[i], cache, problem.layer(i), stream.rings[i], cell.params, cell.scale)

    def everything():
        steps = [call(i)._replace(out=None) for i in range(problem.rings)]  # ``reads`` needs no outputs: their memory may be used again
        problem.advance()
        return steps

    if mode != "cpu":  # compile and warm up without touching what is measured
        spare = stream.rings[0]
        saved = some_rows(spare, list(range(cell.batch)))
        call(0)
        for target, source in zip((spare.q, spare.out, spare.lse, spare.depth), (saved.q, saved.out, saved.lse, saved.depth), strict=True):
            target.copy_(source)
        del saved
    reads = Reads()
    spread = rounds(everything, lambda i: inputs.copy_(stream.queries[i]), problem.steps, problem.rings, mode, _WARM, reads.keep)
    return spread | {"relative_error": worst} | reads.counts(cell, stream.hits)


def _match(problem: Problem, stream: Stream, mode: str) -> dict:
    """The ring match by itself: its time depends on the ring's size, not on what it finds."""
    cell, cache = problem.cell, problem.cache
    match = kernels("torch" if mode == "cpu" else "triton", problem.device).match
    inputs = stream.queries[0].clone()
    oldest = cell.sink + cell.band

    def call(i):
        return match(inputs[i], stream.rings[i], cache.lengths - 1, cell.params.radius, oldest, cell.max_chain, cell.min_context)

    chosen = sorted({0, cell.batch - 1})
    for i in sorted({0, problem.rings - 1}):
        ring, position = some_rows(stream.rings[i], chosen), cache.lengths[chosen] - 1
        want = torch_backend.match(inputs[i, chosen], ring, position, cell.params.radius, oldest, cell.max_chain, cell.min_context)
        got = call(i)
        if not torch.equal(got.slot[chosen], want.slot) or not torch.equal(got.hit[chosen], want.hit):
            raise RuntimeError("matches other entries than the float32 reference")

    def everything():
        for i in range(problem.rings):
            call(i)

    spread = rounds(everything, lambda i: inputs.copy_(stream.queries[i]), problem.steps, problem.rings, mode, _WARM)
    row = cell.head_dim * cell.itemsize + (4 if cell.max_chain is not None else 0)
    read = cell.batch * cell.q_heads * cell.window * row
    return spread | {"bytes_read": read, "bytes_state": read, "bytes_kv": 0, "kv_tokens": 0}


def _check_mac(problem: Problem, stream: Stream, mac_step) -> float:
    """Two chained steps of the first and last call on copies of the rings, a few requests of which a float32 reference repeats.

    Spans (sinks included) and hits must be the same. Returns the worst error: relative of outputs and of the new ring entries (those alone,
    not the ring around them), absolute of their lse.
    """
    cell, cache = problem.cell, problem.cache
    chosen = sorted({0, cell.batch - 1})
    reference = compose(torch_backend.match, torch_backend.attend)
    worst = 0.0
    for call in sorted({0, problem.rings - 1}):
        layer = problem.layer(call)
        problem.rewind()
        own = some_rows(stream.rings[call], list(range(cell.batch)))
        exact = some_rows(stream.rings[call], chosen)
        for step in range(2):
            q_pre, q = stream.queries[step, call], problem.q[call]
            got = mac_step(q_pre, q, cache, layer, own, cell.params, cell.scale)
            want = reference(q_pre[chosen], q[chosen], some_requests(cache, chosen), layer, exact, cell.params, cell.scale)
            if not torch.equal(got.spans[:, :, chosen], want.spans) or not torch.equal(got.hit[chosen], want.hit):
                raise RuntimeError("reads other keys than the float32 reference")
            row = (cell.ctx + step - 1) % cell.window
            entries = own.out[chosen, :, row], exact.out[:, :, row]
            lse = (own.lse[chosen, :, row] - exact.lse[:, :, row]).abs().max()
            worst = max(worst, _distance(got.out[chosen], want.out), _distance(*entries), float(lse))
            problem.advance()
    problem.rewind()
    _check(worst)
    return worst


def _distance(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.float(), want.float()
    return float((got - want).norm() / want.norm())


def _check(error: float) -> None:
    if not error <= TOLERANCE:
        raise RuntimeError(f"relative error {error:.2e} against float32 exceeds {TOLERANCE:.0e}")


def _row(cell: Cell, method: str, backend: str, mode: str, layers: int, rings: int | None = None) -> dict:
    """A row's key; the rest is None until measured."""
    knobs = ("window", "band", "tau", "sink", "min_context", "max_chain", "max_gap")
    own = {name: getattr(cell, name) if method != "full" else None for name in knobs}
    unknown = (
        "hit_rate", "hit_rate_measured", "misses", "time_ms", "time_p10_ms", "time_p90_ms", "rounds", "relative_error", "kv_tokens",
        "bytes_read", "bytes_kv", "bytes_state", "bandwidth", "floor_ms", "over_floor", "bound_ms", "over_bound", "over_flashinfer", "over_triton",
        "break_even_flashinfer", "break_even_triton", "copy_bandwidth", "error",
    )  # fmt: skip
    return {
        "method": method, "backend": backend, "mode": mode, "q_heads": cell.q_heads, "kv_heads": cell.kv_heads, "batch": cell.batch, "ctx": cell.ctx,
        "head_dim": cell.head_dim, "dtype": str(cell.dtype).removeprefix("torch."), "page_size": cell.page_size, "scattered": cell.scattered,
        **own, "synthetic": False, "layers": layers, "rings": rings,
    } | dict.fromkeys(unknown)  # fmt: skip


def _derived(row: dict, ceiling: float | None) -> dict:
    """Bandwidth in bytes per second; the floor (bytes over the measured copy bandwidth) and, of mixed rows, the bound, with the ratios to them."""
    if row["time_ms"] is None or ceiling is None:
        return {"copy_bandwidth": ceiling}
    floor = row["bytes_read"] / ceiling * 1e3
    bound = None
    if row["hit_rate"] and row["hit_rate"] < 1:
        bound = BOUND_FACTOR * row["bytes_read"] / BOUND_BANDWIDTH * 1e3 + BOUND_LAUNCHES_MS
    return {
        "bound_ms": bound, "over_bound": bound and row["time_ms"] / bound,
        "bandwidth": row["bytes_read"] / row["time_ms"] * 1e3, "floor_ms": floor, "over_floor": row["time_ms"] / floor, "copy_bandwidth": ceiling,
    }  # fmt: skip


def compare(rows: list[dict]) -> None:
    """Fill in the ratios to full attention and the break-even hit rates. FlashInfer counts with the faster of its kernels."""
    cells = defaultdict(list)
    for row in rows:
        if row["time_ms"] is not None:
            cells[row["q_heads"], row["kv_heads"], row["batch"], row["ctx"], row["mode"]].append(row)
    for members in cells.values():
        for peer in ("flashinfer", "triton"):
            full = min((r["time_ms"] for r in members if r["method"] == "full" and r["backend"].startswith(peer)), default=None)
            if full is None:
                continue
            for row in members:
                row[f"over_{peer}"] = row["time_ms"] / full
                if row["method"] == "mac":
                    same = [r for r in members if r["method"] == "mac" and r["window"] == row["window"] and r["misses"] in (row["misses"], "none")]
                    row[f"break_even_{peer}"] = _break_even([(r["hit_rate"], r["time_ms"]) for r in same], full)


def _break_even(points: list[tuple[float, float]], full: float) -> float | None:
    """Lowest hit rate from which on MAC is no slower than full attention, between measured rates by straight lines.

    None: never, or a line from 0 to 1 would be all there is to tell it by.
    """
    points = sorted(points)
    if points[-1][1] > full or (len(points) < 3 and points[0][1] > full):
        return None
    for (low, slow), (high, fast) in reversed(list(zip(points, points[1:], strict=False))):
        if slow > full:
            return high - (full - fast) / (slow - fast) * (high - low)
    return points[0][0]
