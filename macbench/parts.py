"""Parquet files, which somebody else may have written: what one takes in memory is judged by its headers before any row is read.

Dictionaries and runs make a text of a megabyte, repeated for millions of rows, a file of two. A file may become ``FREE`` bytes and ``RATIO``
times its own size: a million rows of any table of ours pass whatever is in them (0.4 GB), as do ten million that were measured (8 times
their file). Sums in the footer are not believed: a reader takes memory by the headers of the pages. They are read here and not through
pyarrow, which ends the process over some that are damaged.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from macbench.thrift import structure

FREE, RATIO = 512 << 20, 64
# Of headers, which take longer to read than they are long: a footer of ours has 10,000 bytes, a file of a million rows 2,000 pages.
_LONGEST_FOOTER, _MOST_GROUPS, _MOST_PAGES = 4 << 20, 1 << 12, 1 << 17

# Bytes of a value in memory by its physical type; of a text, that is where it ends.
_WIDTH = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 8, "FLOAT": 4, "DOUBLE": 8, "BYTE_ARRAY": 8}


def read(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Some columns of a parquet file, in this order, or all; checksums of pages are compared. OSError or ArrowException: it cannot be read, is
    no file, lacks a column, or would take too much memory."""
    try:
        with opened(path) as file:
            _judge(path, file, columns)
            data = file.read(columns)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:  # headers that say something else, names that are no text
        raise error if isinstance(error, pa.ArrowException) else pa.ArrowInvalid(f"its headers are damaged ({error})") from None
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
    leaves = [file.schema.column(i) for i in range(file.metadata.num_columns)]
    wanted = [i for i, leaf in enumerate(leaves) if columns is None or leaf.path.partition(".")[0] in columns]
    texts = [leaves[i].path for i in wanted if leaves[i].physical_type == "BYTE_ARRAY"]
    said = f"with {file.metadata.num_rows} rows it would take {{:.1f}} MB of memory or more"
    said += f", and a file of {size / 1e6:.1f} MB may take {limit / 1e6:.1f} MB"
    sure = worst = pages = there = 0
    with path.open("rb") as raw:
        groups = _footer(raw, size).get(4, [])
        if len(groups) > _MOST_GROUPS:
            raise pa.ArrowInvalid(f"it has {len(groups)} row groups, and may have {_MOST_GROUPS}")
        for group in groups:
            for i in wanted:
                inside = values = 0
                there += max(0, group[1][i][3][7])
                if there > size:  # or they would be read, and counted, again and again
                    raise pa.ArrowInvalid("it has columns that overlap")
                for page in _pages(raw, group[1][i][3]):
                    inside += page[2]
                    values += sum(max(0, page.get(kind, {}).get(1, 0)) for kind in (5, 8))
                    pages += 1
                    if pages > _MOST_PAGES:
                        raise pa.ArrowInvalid(f"it has more than {_MOST_PAGES} pages")
                values = max(values, group[3])
                sure += inside + values * (_WIDTH.get(leaves[i].physical_type) or leaves[i].length)
                worst += inside * values * (leaves[i].physical_type == "BYTE_ARRAY")
                if sure > limit:
                    raise pa.ArrowInvalid(said.format(sure / 1e6))
    if sure + worst > limit:  # only what the rows refer to tells
        with opened(path, texts) as file:
            groups = (file.read_row_group(g, texts) for g in range(file.metadata.num_row_groups))  # of all at once, lists would be in pieces
            repeated = sum(_bytes(chunk) for group in groups for column in group.columns for chunk in column.chunks)
        if sure + repeated > limit:
            raise pa.ArrowInvalid(said.format((sure + repeated) / 1e6))


def _footer(raw: BinaryIO, size: int) -> dict:
    """``FileMetaData`` of parquet-format. 4: row groups, of which 3: rows, 1: column chunks, whose 3 is ``ColumnMetaData``."""
    raw.seek(size - 8)
    length = int.from_bytes(raw.read(4), "little")
    if length > _LONGEST_FOOTER:
        raise pa.ArrowInvalid(f"its footer has {length} bytes, and may have {_LONGEST_FOOTER}")
    raw.seek(size - 8 - length)
    return structure(raw.read(length))[0]


def _pages(raw: BinaryIO, column: dict) -> Iterator[dict]:
    """The ``PageHeader`` of every page of a column chunk. 2: bytes without compression, 3: bytes in the file, 5.1 or 8.1: values.

    ``column``: 5: values, 7: bytes in the file, 9 and 11: where data and dictionary begin."""
    if column[5] <= 0:  # a table without rows; where data would begin is anywhere
        return
    raw.seek(min(column[9], column.get(11, 0) or column[9]))
    if column[7] < 0:
        raise pa.ArrowInvalid("it has a column without a size")
    content, at = raw.read(column[7]), 0
    while at < len(content):
        page, at = structure(content, at)
        if not 0 <= page[3] <= len(content) - at or page[2] < 0:
            raise pa.ArrowInvalid("it has a page without a size")
        at += page[3]
        yield page


def _bytes(texts: pa.Array) -> int:
    """Of texts, or lists of texts, that are dictionaries: bytes without them."""
    if pa.types.is_list(texts.type):
        return _bytes(texts.flatten())
    if not pa.types.is_dictionary(texts.type):
        raise pa.ArrowInvalid(f"it has a column of {texts.type}")
    lengths = pc.binary_length(texts.dictionary).cast(pa.int64())
    return pc.sum(lengths.take(texts.indices)).as_py() or 0
