"""A step of every method at one context: time per layer of the captured attention, beside the bytes that the method itself counts.

No model: K, V and queries are random, so choices are arbitrary, but sizes are what they are. ``target_ms`` = 1.3 * counted bytes / 2.75 TB/s
+ 15 us. Bookkeeping that a method does once per step is spread over ``layers``, of which a model has more.
"""

import gc
from collections.abc import Iterable
from time import perf_counter

import pyarrow as pa
import torch
from macbench_kernels import Kernels, PagedKVCache, PagePool, kernels

from macbench.attention.phases import NAMES, phases
from macbench.attention.table import show
from macbench.attention.timing import copy_bandwidth, rounds
from macbench.counting import READ_CATEGORIES, Ledger, Shape
from macbench.errors import ConfigError, one_line
from macbench.methods.base import Method, PromptQueries
from macbench.methods.full import Full
from macbench.methods.h2o import H2O
from macbench.methods.int8 import INT8
from macbench.methods.kivi import KIVI
from macbench.methods.kivi_2bit import KIVI2Bit
from macbench.methods.multipole import Multipole
from macbench.methods.oracle_topk import OracleTopK
from macbench.methods.pyramidkv import PyramidKV
from macbench.methods.quest import Quest
from macbench.methods.rocketkv import RocketKV
from macbench.methods.snapkv import SnapKV
from macbench.methods.streaming_llm import StreamingLLM
from macbench.methods.tidaldecode import TidalDecode
from macbench.methods.tova import TOVA

# Dense layers are left out: with few layers they would be most of the step.
METHODS = {
    "full": Full, "quest": lambda: Quest(dense_layers=()), "rocketkv": RocketKV, "multipole": Multipole, "snapkv": SnapKV, "pyramidkv": PyramidKV,
    "h2o": H2O, "streaming_llm": StreamingLLM, "tova": TOVA, "kivi": KIVI, "kivi_2bit": KIVI2Bit, "int8": INT8,
    "tidaldecode": TidalDecode, "oracle_topk": OracleTopK,
}  # fmt: skip
BANDWIDTH, SLACK, CONSTANT_MS = 2.75e12, 1.3, 0.015
# Budgets that are tried in turn where a method cannot read as little as was asked.
LARGER = (0.07, 0.1, 0.25, 0.55, 0.8)
SCHEMA = pa.schema(
    [("method", pa.string()), ("knobs", pa.string())]
    + [(name, pa.int64()) for name in ("q_heads", "kv_heads", "head_dim", "batch", "ctx", "layers")]
    + [(name, pa.float64()) for name in ("budget", "time_ms", "bytes_counted", "rho_bytes", "target_ms", "over_target", "setup_s", "copy_bandwidth")]
    + [(name, pa.float64()) for name in (*NAMES, "launches")]
    + [("slowest", pa.string()), ("floor", pa.string()), ("error", pa.string())]
)


def measure(
    budget: float = 0.05, ctx: int = 127 << 10, batch: int = 16, heads: str = "32/8", head_dim: int = 128, layers: int = 4, page_size: int = 16,
    methods: Iterable[str] = tuple(METHODS), replays: int = 20, device: str = "cuda", backend: str = "auto", seed: int = 42, say=lambda row: None,
) -> list[dict]:  # fmt: skip
    """One row per method, see SCHEMA; times and bytes are per layer. A method that cannot read so little runs at the least of ``LARGER`` that it
    can, with its ``floor`` in the row, or as it is if it has no knob; what fails has an ``error`` instead of times."""
    q_heads, kv_heads = map(int, heads.split("/"))
    cuda = device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    shape = Shape(layers, q_heads, kv_heads, head_dim, head_dim**-0.5, dtype, device, batch, ctx + page_size, rotation(head_dim))
    generator = torch.Generator(device).manual_seed(seed)
    pool = PagePool(layers, kv_heads, head_dim, batch * (-(-shape.max_tokens // page_size) + 2), page_size, dtype, device)
    for storage in (pool.k, pool.v):
        for one in storage:
            one.normal_(generator=generator)
    facts = {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim, "batch": batch, "ctx": ctx, "layers": layers, "budget": budget}
    rows = []
    for name in methods:
        row = dict.fromkeys(SCHEMA.names) | facts | {"method": name, "copy_bandwidth": copy_bandwidth(device)}
        try:
            method, row["budget"], row["floor"] = _fitted(METHODS[name](), budget, ctx, shape)
            row |= _step(method, pool, shape, kernels(backend, device), ctx, generator, replays)
        except Exception as error:  # a kernel that does not compile costs no other method's row
            row["error"] = one_line(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {one_line(error)}"
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
        rows.append(row)
        say(row)
    return rows


def rotation(dim: int):
    """RoPE of base 10000 as ``Shape.rotate`` wants it."""

    def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angle = positions.float()[:, None] * 10000.0 ** (-torch.arange(dim // 2, device=x.device) / (dim // 2))
        cos, sin = angle.cos(), angle.sin()
        low, high = x.float().chunk(2, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype)

    return rotate


def _fitted(method: Method, budget: float, ctx: int, shape: Shape) -> tuple[Method, float | None, str | None]:
    """The method at ``budget``, or at the first of ``LARGER`` that it reaches; the budget that it got; and why it is another one."""
    if isinstance(method, Full | KIVI | INT8):
        return method, None, None
    floor: ConfigError | None = None
    for rho in (budget, *(larger for larger in LARGER if larger > budget)):
        try:
            return method.fit(rho, ctx, shape), rho, floor and one_line(floor)
        except ConfigError as error:
            floor = floor or error
    raise floor


@torch.inference_mode()
def _step(method: Method, pool: PagePool, shape: Shape, layer: Kernels, ctx: int, generator: torch.Generator, replays: int) -> dict:
    cache, ledger = PagedKVCache(pool, shape.batch), Ledger(shape)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=shape.device, dtype=shape.dtype)

    try:
        cache.extend(ctx - 1)
        method.begin(shape, layer, ledger)
        n = min(ctx - 1, method.prompt_queries)
        places = torch.arange(ctx - 1 - n, ctx - 1, device=shape.device)
        began = _now(shape.device)
        for request in range(shape.batch):
            queries = []
            for _ in range(shape.layers):
                q_pre = normal(1, shape.q_heads, n, shape.head_dim)
                sums = torch.rand(shape.kv_heads, ctx - 1, device=shape.device) if method.prompt_column_sums else None
                queries.append(PromptQueries(q_pre, shape.rotate(q_pre, places), ctx - 1 - n, sums))
            method.after_prompt(request, queries, cache)
        setup = _now(shape.device) - began
        q_pre = normal(shape.layers, shape.batch, shape.q_heads, shape.head_dim)
        q = shape.rotate(q_pre[..., None, :], torch.tensor([ctx - 1], device=shape.device))[..., 0, :].contiguous()
        method.between_steps(cache)
        cache.extend(1)

        def attend() -> None:
            for index in range(shape.layers):
                method.attend(index, q_pre[index], q[index], cache)

        for _ in range(3):  # the first ones compile
            ledger.begin_step(cache.host_lengths)
            attend()
            ledger.end_step()
        counts = ledger.counts()
        counted = {key: int(values[-1].sum()) for key, values in counts.items()}
        method.ledger = _Muted()
        times = rounds(attend, lambda i: None, replays, shape.layers, "graph" if shape.device == "cuda" else "cpu", 4)
        parts = phases(attend, shape.layers) if shape.device == "cuda" else {}
    finally:
        method.forget()
        cache.free()
    read = sum(counted[f"bytes_{c}"] for c in READ_CATEGORIES) / shape.layers
    target = SLACK * read / BANDWIDTH * 1e3 + CONSTANT_MS
    knobs = " ".join(f"{k}={getattr(method, k)}" for k in method.__dataclass_fields__)
    return parts | {
        "knobs": knobs, "time_ms": times["time_ms"], "bytes_counted": read, "rho_bytes": read * shape.layers / counted["bytes_full"],
        "target_ms": target, "over_target": times["time_ms"] / target, "setup_s": setup,
    }  # fmt: skip


class _Muted:
    """Stands in for the ledger of a captured step, which is replayed without books."""

    def __getattr__(self, name: str):
        return lambda *args, **options: None


def _now(device) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


HEADER = (
    f"{'method':<14} {'budget':>6} {'ms/layer':>9} {'MB counted':>11} {'rho_bytes':>9} {'target':>8} {'/target':>8} "
    f"{'attention':>9} {'choice':>7} {'torch':>7} {'launches':>8}  knobs"
)


def line(row: dict) -> str:
    """One row; below it what its kernels say, and why it is not at the budget that was asked for."""
    if row["error"]:
        return f"{row['method']:<14} {row['error']}"
    parts = " ".join(show(row[name], form) for name, form in zip((*NAMES, "launches"), ("9.4f", "7.4f", "7.4f", "8.1f"), strict=True))
    return "\n    ".join(
        [
            f"{row['method']:<14} {show(row['budget'], '6.2f')} {row['time_ms']:>9.4f} {row['bytes_counted'] / 1e6:>11.1f} {row['rho_bytes']:>9.4f} "
            f"{row['target_ms']:>8.4f} {row['over_target']:>8.2f} {parts}  {row['knobs']}",
            *(row[name] for name in ("slowest", "floor") if row[name]),
        ]
    )
