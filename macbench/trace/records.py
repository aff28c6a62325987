"""What a trace writes: a parquet file per table in its run folder, rows by text or by text and layer; commit and machine in the metadata."""

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from macbench import parts
from macbench.errors import ConfigError, one_line
from macbench.files import make_folder, write_whole
from macbench.redact import redact

_TEXT, _REAL = pa.string(), pa.float64()
_KEY = [("task", _TEXT), ("subtask", _TEXT), ("example_id", _TEXT)]
KEY = [name for name, _ in _KEY]
_LAYER = [*_KEY, ("layer", pa.int32())]


def _whole(*names: str) -> list:
    return [(name, pa.int32()) for name in names]


def _reals(*names: str) -> list:
    return [(name, _REAL) for name in names]


def _spread(name: str) -> list:
    """Columns of ``matching.spread``."""
    return _reals(*(f"{name}_{part}" for part in ("mean", "p10", "p50", "p90", "p99")))


SCHEMAS = {
    "texts": [*_KEY, *_whole("ctx", "prompt_tokens", "new_tokens", "steps"), ("text", _TEXT), ("note", _TEXT)],
    "gaps": [*_KEY, ("pairs", _TEXT), *_whole("gap_low", "gap_high", "count"), *_spread("pre"), *_spread("post")],
    "acceptance": [*_LAYER, *_whole("head", "window"), *_reals("tau"), *_whole("steps", "hits")],
    "groups": [*_LAYER, *_whole("kv_head", "steps", "hit_all", "hit_none"), *_spread("spread"), *_reals("spread_max", "read_own", "read_group")],
    "amend": [*_KEY, *_reals("tau"), *_whole("band", "count"), *_spread("error"), *_reals("rounding_mean")],
    "chains": [*_KEY, *_whole("depth_low", "depth_high", "count"), *_spread("error")],
}


def write(folder: Path, frames: dict[str, pd.DataFrame], facts: dict) -> None:
    """All tables of a trace, each file whole; the one that says which texts there are comes last. Columns that a frame lacks become null."""
    make_folder(folder)
    for name, fields in sorted(SCHEMAS.items(), key=lambda table: table[0] == "texts"):
        schema = pa.schema(fields, metadata={"macbench": redact(json.dumps(facts, default=str))})
        frame = frames.get(name, pd.DataFrame()).reindex(columns=schema.names)
        table = pa.Table.from_pandas(frame, schema=schema, preserve_index=False).replace_schema_metadata(schema.metadata)
        write_whole(folder / f"{name}.parquet", lambda file, table=table: pq.write_table(table, file, compression="zstd"))


def read(folder: Path) -> dict[str, pd.DataFrame]:
    """The tables of the texts that are finished there; nothing if there are none. A damaged one is a ConfigError that names it."""
    if not (folder / "texts.parquet").exists():
        return {}
    found = {name: _table(folder / f"{name}.parquet") for name in SCHEMAS}
    whole = found["texts"][KEY]
    return {name: frame.merge(whole, on=KEY) for name, frame in found.items()}


def _table(path: Path) -> pd.DataFrame:
    try:
        return parts.read(path).to_pandas()
    except (OSError, pa.ArrowException) as error:
        raise ConfigError("runs_dir", path, f"cannot be read ({one_line(error)}); delete its folder to have the trace made again") from error
