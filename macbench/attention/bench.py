"""The attention benchmark: correctness against float32 first, then time, for full attention and MAC at chosen hit rates.

Every number is of one attention call (one layer, one decode step). A round calls all layers of a problem once, lengths then grow by one.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from macbench_kernels import MacParams, kernels, torch_backend
from macbench_kernels.mac import compose

from macbench.attention import peers
from macbench.attention.problem import Cell, Problem, Stream, layers_for, some_requests, some_rows
from macbench.attention.timing import copy_bandwidth, rounds
from macbench.counting import span_tokens

# Largest relative L2 error against float32 that counts as correct.
TOLERANCE = 1e-2
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
    head_dim: int = 128,
    page_size: int = 16,
    max_gap: int = 64,
    dtype: str = "bfloat16",
    scattered: bool = False,
    mac: bool = True,
    steps: int = 30,
    device: str = "cuda",
    seed: int = 42,
    say=lambda row: None,
) -> list[dict]:
    """All rows of a benchmark, one flat dict each (see ``_row``); ``say`` gets each row as soon as it exists.

    ``heads``: 'Hq/Hkv'. ``backends``: of full attention, out of peers.FULL_BACKENDS. ``misses``: see problem.Stream. ``modes``: graph, eager.
    ``mac=False`` leaves MAC out. ``steps``: rounds per measurement. ctx in tokens.
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
                cell = Cell(q_heads, kv_heads, size, length, head_dim, page_size, windows[0], band, tau, max_gap, _DTYPES[dtype], scattered)
                for row in _cell(cell, windows, tuple(hit_rate), tuple(misses), tuple(backends), tuple(modes), mac, steps, device, seed):
                    row |= _derived(row, ceiling)
                    rows.append(row)
                    say(row)
    _compare(rows)
    return rows


def _cell(cell, windows, hit_rates, misses, backends, modes, mac, steps, device, seed) -> Iterator[dict]:
    """Rows of one (heads, batch, ctx): one problem, all methods on it."""
    l2, free = 0, 1 << 62
    if device == "cuda":
        torch.cuda.empty_cache()
        l2, free = torch.cuda.get_device_properties(0).L2_cache_size, torch.cuda.mem_get_info()[0]
    try:
        problem = Problem(cell, device, layers_for(cell, l2, free), steps, seed)
    except (RuntimeError, MemoryError) as error:
        yield _row(cell, "all", "", "", 0) | {"error": _one_line(error)}
        return
    for backend in backends:
        for mode in modes:
            yield _row(cell, "full", backend, mode, problem.layers) | _guard(_full, problem, backend, mode)
    for window in windows if mac else ():
        problem.cell = replace(cell, window=window)
        rings = None
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
                    key = _row(problem.cell, "mac", "torch" if device == "cpu" else "triton", mode, problem.layers)
                    yield key | label | _guard(_mac, problem, stream, mode)


def _guard(function, *args) -> dict:
    """A failed measurement is a row with one line of error; the run goes on."""
    try:
        return function(*args)
    except peers.NotInstalled as error:
        return {"error": _one_line(error)}
    except (RuntimeError, NotImplementedError, ValueError, MemoryError) as error:
        return {"error": f"{type(error).__name__}: {_one_line(error)}"}


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


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
    return spread | {"relative_error": worst, "bytes_read": cell.cache_bytes, "kv_tokens": cell.batch * cell.kv_heads * cell.ctx}


def _mac(problem: Problem, stream: Stream, mode: str) -> dict:
    cell, cache = problem.cell, problem.cache
    layer_kernels = kernels("torch" if mode == "cpu" else "triton", problem.device)
    params = MacParams(cell.tau * (2 * cell.head_dim) ** 0.5, cell.band)
    worst, spans, hit = _check_mac(problem, stream, layer_kernels.mac_step, params)

    inputs = stream.queries[0].clone()
    problem.rewind()

    def everything():
        for layer in range(problem.layers):
            layer_kernels.mac_step(inputs[layer], problem.q[layer], cache, layer, stream.rings[layer], params, cell.scale)
        problem.advance()

    if mode != "cpu":  # compile and warm up without touching what is measured
        spare = stream.rings[0]
        saved = some_rows(spare, list(range(cell.batch)))
        layer_kernels.mac_step(inputs[0], problem.q[0], cache, 0, spare, params, cell.scale)
        for target, source in zip((spare.q, spare.out, spare.lse, spare.depth), (saved.q, saved.out, saved.lse, saved.depth), strict=True):
            target.copy_(source)
        del saved
    spread = rounds(everything, lambda i: inputs.copy_(stream.queries[i]), problem.steps, problem.layers, mode, _WARM)

    tokens = int(span_tokens(spans.cpu().numpy()[None], cell.kv_heads)[1].sum())
    kv = tokens * 2 * cell.head_dim * cell.itemsize
    state = cell.batch * cell.q_heads * cell.window * cell.head_dim * cell.itemsize + int(hit.sum()) * (cell.head_dim * 4 + 8)
    return spread | {
        "relative_error": worst, "hit_rate_measured": float(hit.float().mean()),
        "bytes_read": kv + state, "bytes_kv": kv, "bytes_state": state, "kv_tokens": tokens,
    }  # fmt: skip


def _check_mac(problem: Problem, stream: Stream, mac_step, params: MacParams):
    """Two chained steps of the first and last layer on copies of the rings, a few requests of which a float32 reference repeats.

    Returns the worst relative error (of output and new ring entries), and spans and hits of the last step of the first layer.
    """
    cell, cache = problem.cell, problem.cache
    chosen = sorted({0, cell.batch - 1})
    reference = compose(torch_backend.match, torch_backend.attend)
    worst, kept = 0.0, None
    for layer in sorted({problem.layers - 1, 0}, reverse=True):
        problem.rewind()
        own = some_rows(stream.rings[layer], list(range(cell.batch)))
        exact = some_rows(stream.rings[layer], chosen)
        for step in range(2):
            q_pre, q = stream.queries[step, layer], problem.q[layer]
            got = mac_step(q_pre, q, cache, layer, own, params, cell.scale)
            want = reference(q_pre[chosen], q[chosen], some_requests(cache, chosen), layer, exact, params, cell.scale)
            if not torch.equal(got.spans[:, :, chosen], want.spans) or not torch.equal(got.hit[chosen], want.hit):
                raise RuntimeError("reads other keys than the float32 reference")
            worst = max(worst, _distance(got.out[chosen], want.out))
            problem.advance()
        worst = max(worst, _distance(own.out[chosen], exact.out), _distance(own.lse[chosen], exact.lse))
        kept = got.spans, got.hit
    problem.rewind()
    _check(worst)
    return worst, *kept


def _distance(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.float(), want.float()
    return float((got - want).norm() / want.norm())


def _check(error: float) -> None:
    if not error <= TOLERANCE:
        raise RuntimeError(f"relative error {error:.2e} against float32 exceeds {TOLERANCE:.0e}")


def _row(cell: Cell, method: str, backend: str, mode: str, layers: int) -> dict:
    """A row's key; the rest is None until measured."""
    unknown = (
        "hit_rate", "hit_rate_measured", "misses", "time_ms", "time_p10_ms", "time_p90_ms", "rounds", "relative_error", "kv_tokens",
        "bytes_read", "bytes_kv", "bytes_state", "bandwidth", "floor_ms", "over_floor", "over_flashinfer", "over_triton",
        "break_even_flashinfer", "break_even_triton", "copy_bandwidth", "error",
    )  # fmt: skip
    return {
        "method": method, "backend": backend, "mode": mode, "q_heads": cell.q_heads, "kv_heads": cell.kv_heads, "batch": cell.batch, "ctx": cell.ctx,
        "head_dim": cell.head_dim, "dtype": str(cell.dtype).removeprefix("torch."), "page_size": cell.page_size, "scattered": cell.scattered,
        "window": cell.window if method == "mac" else None, "band": cell.band if method == "mac" else None,
        "max_gap": cell.max_gap if method == "mac" else None, "synthetic": False, "layers": layers,
    } | dict.fromkeys(unknown)  # fmt: skip


def _derived(row: dict, ceiling: float | None) -> dict:
    """Bandwidth in bytes per second, the floor (bytes over the measured copy bandwidth) and the ratio to it."""
    if row["time_ms"] is None or ceiling is None:
        return {"copy_bandwidth": ceiling}
    floor = row["bytes_read"] / ceiling * 1e3
    return {
        "bandwidth": row["bytes_read"] / row["time_ms"] * 1e3, "floor_ms": floor, "over_floor": row["time_ms"] / floor, "copy_bandwidth": ceiling,
    }  # fmt: skip


def _compare(rows: list[dict]) -> None:
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
    """Lowest hit rate from which on MAC is no slower than full attention, between measured rates by straight lines; None: never."""
    points = sorted(points)
    if points[-1][1] > full:
        return None
    for (low, slow), (high, fast) in reversed(list(zip(points, points[1:], strict=False))):
        if slow > full:
            return high - (full - fast) / (slow - fast) * (high - low)
    return points[0][0]
