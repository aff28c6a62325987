"""Parquet files, which somebody else may have written: what one takes in memory is judged by its footer before any row is read.

Dictionaries and runs make a text of a megabyte, repeated for millions of rows, a file of two. A file may become ``FREE`` bytes and ``RATIO``
times its own size: a million rows of any table of ours pass whatever is in them (0.4 GB), as do ten million that were measured (8 times
their file).
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

FREE, RATIO = 512 << 20, 64

# Bytes of a value in memory by its physical type; of a text, that is where it ends.
_WIDTH = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 8, "FLOAT": 4, "DOUBLE": 8, "BYTE_ARRAY": 8}


def read(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Some columns of a parquet file, in this order, or all; checksums of pages are compared. OSError or ArrowException: it cannot be read, is
    no file, lacks a column, or would take too much memory."""
    with opened(path) as file:
        _judge(path, file, columns)
        data = file.read(columns)
    if absent := [name for name in columns or () if name not in data.schema.names]:
        raise pa.ArrowInvalid(f"it has no column {absent[0]}")
    return data.select(columns) if columns is not None else data


def opened(path: Path, texts: list[str] | None = None) -> pq.ParquetFile:
    """A file of which the footer has been read. ``texts``: paths of columns that are to stay dictionaries. Errors are those of ``read``."""
    if path.exists() and not path.is_file():  # a pipe waits for who writes into it
        raise pa.ArrowInvalid("it is no file")
    return pq.ParquetFile(path, read_dictionary=texts, page_checksum_verification=True)


def _judge(path: Path, file: pq.ParquetFile, columns: list[str] | None) -> None:
    """Raise ArrowInvalid if rows would take more memory than the file may."""
    size = path.stat().st_size
    limit = FREE + RATIO * size
    sure, texts, worst = 0, [], 0
    for i in range(file.metadata.num_columns):
        column = file.schema.column(i)
        if columns is not None and column.path.partition(".")[0] not in columns:
            continue
        width = _WIDTH.get(column.physical_type) or column.length
        for g in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(g)
            chunk = group.column(i)
            values = max(chunk.num_values, group.num_rows)
            sure += values * width + chunk.total_uncompressed_size
            worst += values * chunk.total_uncompressed_size * (column.physical_type == "BYTE_ARRAY")
        if column.physical_type == "BYTE_ARRAY":
            texts.append(column.path)
    said = f"with {file.metadata.num_rows} rows it would take {{:.1f}} MB of memory, and a file of {size / 1e6:.1f} MB may take {limit / 1e6:.1f} MB"
    if sure > limit:
        raise pa.ArrowInvalid(said.format(sure / 1e6))
    if sure + worst > limit:  # only what the rows refer to tells
        with opened(path, texts) as file:
            repeated = sum(_bytes(chunk) for column in file.read(texts).columns for chunk in column.chunks)
        if sure + repeated > limit:
            raise pa.ArrowInvalid(said.format((sure + repeated) / 1e6))


def _bytes(texts: pa.Array) -> int:
    """Of texts, or lists of texts, that are dictionaries: bytes without them."""
    if pa.types.is_list(texts.type):
        return _bytes(texts.flatten())
    if not pa.types.is_dictionary(texts.type):
        raise pa.ArrowInvalid(f"it has a column of {texts.type}")
    lengths = pc.binary_length(texts.dictionary).cast(pa.int64())
    return pc.sum(lengths.take(texts.indices)).as_py() or 0
