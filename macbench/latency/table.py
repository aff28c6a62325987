"""Rows of task=decode as text and as one parquet file."""

from pathlib import Path

import pyarrow as pa

from macbench.attention import table
from macbench.attention.table import show
from macbench.latency.bench import COLUMNS

_TEXT = ("model", "method", "backend", "forward", "mode", "misses", "error")
_FLAGS = ("random_weights", "synthetic")
_WHOLE = ("ctx", "batch", "window", "band", "steps", "weight_bytes", "read_bytes", "peak_bytes", "kv_bytes", "state_bytes")


def _type(name: str) -> pa.DataType:
    return pa.string() if name in _TEXT else pa.bool_() if name in _FLAGS else pa.int64() if name in _WHOLE else pa.float64()


SCHEMA = pa.schema([(name, _type(name)) for name in COLUMNS])
HEADER = (
    f"{'model':<22} {'ctx':>6} {'batch':>5} {'method':<24} {'hit rate':<24} {'p50 ms':>8} {'p95 ms':>8} {'tok/s':>8} {'/floor':>6} {'/full':>6} "
    f"{'/FI':>6} {'attn':>7} {'mm':>7} {'rest':>6} {'prefill':>8} {'GB':>6} {'/memory':>7}"
)


def write(rows: list[dict], path: Path, facts: dict) -> None:
    """One parquet file; see attention/table.py."""
    table.write(rows, path, facts, SCHEMA)


def line(row: dict) -> str:
    """One row; random weights and made-up hit rates say so."""
    model = row["model"] + " (random)" * (row["random_weights"] and "random" not in row["model"])
    rate = (
        "" if row["method"] != "mac" else f"{row['hit_rate']:g} {row['misses'].replace('none', '')}".strip() + " syn." if row["synthetic"] else "real"
    )
    if row["method"] == "mac" and row["hit_rate_measured"] is not None and not row["synthetic"]:
        rate = f"{row['hit_rate_measured']:.3f} real"
    elif row["method"] == "mac" and row["hit_rate_measured"] is not None and f"{row['hit_rate_measured']:g}" != f"{row['hit_rate']:g}":
        rate += f" {row['hit_rate_measured']:.3f}"  # what the queries came to: heads and groups are whole
    method = f"{row['method']}:{row['backend']}:{row['mode']}"
    key = f"{model:<22} {row['ctx']:>6} {row['batch']:>5} {method:<24} {rate:<24} "
    if row["error"]:
        return key + row["error"]

    cells = [
        ("tpot_p50_ms", "8.3f", 1), ("tpot_p95_ms", "8.3f", 1), ("tokens_per_s", "8.1f", 1), ("over_floor", "6.2f", 1), ("over_full", "6.2f", 1),
        ("over_flashinfer", "6.2f", 1), ("attention_ms", "7.3f", 1), ("products_ms", "7.3f", 1), ("rest_ms", "6.3f", 1), ("prefill_s", "8.3f", 1),
        ("peak_bytes", "6.1f", 1e-9), ("over_memory_floor", "7.3f", 1),
    ]  # fmt: skip
    return key + " ".join(show(row[name] if row[name] is None else row[name] * scale, form) for name, form, scale in cells)
