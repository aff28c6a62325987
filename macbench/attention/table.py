"""Rows of the benchmark as a text table and as one parquet file."""

import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from macbench.errors import ConfigError
from macbench.files import make_folder, write_whole
from macbench.redact import redact

_TEXT, _INT, _REAL = pa.string(), pa.int64(), pa.float64()
SCHEMA = pa.schema(
    [(name, _TEXT) for name in ("method", "backend", "mode")]
    + [(name, _INT) for name in ("q_heads", "kv_heads", "batch", "ctx", "head_dim")]
    + [("dtype", _TEXT), ("page_size", _INT), ("scattered", pa.bool_()), ("window", _INT), ("band", _INT), ("tau", _REAL)]
    + [(name, _INT) for name in ("sink", "min_context", "max_chain", "max_gap")]
    + [("synthetic", pa.bool_()), ("hit_rate", _REAL), ("hit_rate_measured", _REAL), ("misses", _TEXT)]
    + [(name, _INT) for name in ("layers", "rings", "rounds")]
    + [(name, _REAL) for name in ("time_ms", "time_p10_ms", "time_p90_ms", "relative_error")]
    + [(name, _INT) for name in ("kv_tokens", "bytes_read", "bytes_kv", "bytes_state")]
    + [(name, _REAL) for name in ("bandwidth", "floor_ms", "over_floor", "bound_ms", "over_bound")]
    + [(name, _REAL) for name in ("over_flashinfer", "over_triton")]
    + [(name, _REAL) for name in ("break_even_flashinfer", "break_even_triton", "copy_bandwidth")]
    + [("error", _TEXT)]
)


def write(rows: list[dict], path: Path, facts: dict, schema: pa.Schema = SCHEMA) -> None:
    """One parquet file, in place of an earlier one as a whole; ``facts`` (JSON: device, versions, command) goes into its metadata."""
    make_folder(path.parent)
    table = pa.Table.from_pylist(rows, schema=schema.with_metadata({"macbench": redact(json.dumps(facts))}))
    write_whole(path, lambda file: pq.write_table(table, file, compression="zstd"))


def ready(path: Path) -> Path:
    """The same path, into which a file can be written; a ConfigError before anything is measured if none can be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError("file", path, f"cannot be written: {error.strerror}") from error
    if path.is_dir():
        raise ConfigError("file", path, "is a folder; must be a parquet file to write")
    return path


HEADER = (
    f"{'heads':>6} {'batch':>5} {'ctx':>7} {'method':<20} {'K':>5} {'hit rate':<20} {'ms':>9}  {'MB':>9} {'TB/s':>5} "
    f"{'/floor':>6} {'/FI':>6} {'/ours':>6} {'even FI':>7} {'mode':<5}"
)


def show(value, form: str) -> str:
    """A number in a format such as 9.4f, or as many blanks."""
    return " " * int(form.split(".")[0]) if value is None else format(value, form)


def line(row: dict) -> str:
    """One row; a hit rate made by construction says so, and * marks a time over its bound."""
    label = "" if row["hit_rate"] is None else f"{row['hit_rate']:g} {row['misses'].replace('none', '')}".strip() + " syn." * row["synthetic"]
    name = f"{row['method']}:{row['backend']}"
    key = f"{row['q_heads']:>3}/{row['kv_heads']:<2} {row['batch']:>5} {row['ctx']:>7} {name:<20} {row['window'] or '':>5} {label:<20} "
    if row["error"]:
        return key + row["error"]

    mark = "*" if (row["over_bound"] or 0) > 1 else " "
    scaled = [
        (row["bytes_read"] / 1e6, "9.1f"), (row["bandwidth"] and row["bandwidth"] / 1e12, "5.2f"),
        (row["over_floor"], "6.2f"), (row["over_flashinfer"], "6.2f"), (row["over_triton"], "6.2f"), (row["break_even_flashinfer"], "7.2f"),
    ]  # fmt: skip
    return key + show(row["time_ms"], "9.4f") + mark + " " + " ".join(show(*pair) for pair in scaled) + f" {row['mode']:<5}"
