"""Files of runs that are small on the disk and large in memory."""

import os
import tracemalloc
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from macbench import parts
from macbench.partial import Partial
from macbench.records import SCHEMAS
from macbench.tasks.base import Example
from tests.within import within


@pytest.fixture(autouse=True)
def _little_memory():
    """Nothing in this file takes more than a part may take; the high-water mark is the process's."""
    before = pa.default_memory_pool().max_memory()
    yield
    assert pa.default_memory_pool().max_memory() < max(before, 2 * parts.FREE)


def refused(path, columns=None) -> str:
    with pytest.raises(pa.ArrowInvalid) as caught:
        parts.read(path, columns)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def repeated(text: str, rows: int) -> pa.DictionaryArray:
    """A text that every row refers to."""
    return pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), rows), [text])


def test_a_million_rows_of_steps(tmp_path):
    """Even where nothing in them differs, so that the file is nothing but its footer."""
    schema, rows = SCHEMAS["steps"], 1_000_000
    texts = [pa.repeat("x" * 20, 1000).dictionary_encode()] * (rows // 1000)
    columns = [pa.chunked_array(texts) if kind == pa.string() else pa.repeat(pa.scalar(1, kind), rows) for kind in schema.types]
    pq.write_table(pa.Table.from_arrays(columns, names=schema.names), tmp_path / "a.parquet", store_schema=False)
    del columns
    assert (tmp_path / "a.parquet").stat().st_size < 300_000
    assert len(parts.read(tmp_path / "a.parquet")) == rows


def test_many_rows(tmp_path):
    """80 million numbers in a few pages."""
    path, some = tmp_path / "a.parquet", pa.table({"n": pa.repeat(7, 1 << 20), "m": pa.repeat(True, 1 << 20)})
    with pq.ParquetWriter(path, some.schema, compression="zstd") as writer:
        for _ in range(80):
            writer.write_table(some)
    assert path.stat().st_size < 1_000_000
    said = refused(path)
    assert f"with {80 << 20} rows it would take" in said and "a file of 0.7 MB may take 5" in said
    assert "would take" in refused(path, ["n"])
    assert parts.read(path, ["m"]).num_rows == 80 << 20


@pytest.mark.parametrize("lists", [False, True])
def test_a_text_that_is_repeated(tmp_path, lists):
    """Half a megabyte, 1,500 times; and as often as there is room for."""
    for rows in (1500, 1000):
        texts = repeated("x" * 500_000, rows)
        column = pa.ListArray.from_arrays(pa.array([0, *range(rows - 5, rows + 1)], pa.int32()), texts) if lists else texts
        pq.write_table(pa.table({"text": column}), tmp_path / f"{rows}.parquet", store_schema=False)
    assert "would take 750." in refused(tmp_path / "1500.parquet")
    assert parts.read(tmp_path / "1000.parquet").nbytes > 500_000_000


def test_texts_that_many_rows_share_but_not_the_long_ones(tmp_path):
    """What rows refer to counts, not what they could: one long text among a million short ones is no bomb."""
    texts = pa.DictionaryArray.from_arrays(pa.array([1, *[0] * 999_999], pa.int32()), ["a", "x" * 500_000])
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", store_schema=False)
    data = parts.read(tmp_path / "a.parquet")
    assert data["text"].type == pa.string() and data["text"][0].as_py() == "x" * 500_000 and data["text"][999_999].as_py() == "a"


def test_columns_come_in_the_order_asked_for_or_are_named(tmp_path):
    pq.write_table(pa.table({"a": [1], "b": [2], "c": [3]}), tmp_path / "a.parquet")
    assert parts.read(tmp_path / "a.parquet", ["c", "a"]).to_pylist() == [{"c": 3, "a": 1}]
    assert refused(tmp_path / "a.parquet", ["a", "d"]) == "it has no column d"


def test_a_pipe_is_no_part(tmp_path):
    os.mkfifo(tmp_path / "a.parquet")
    with within():
        assert refused(tmp_path / "a.parquet") == "it is no file"
    with pytest.raises(FileNotFoundError):
        parts.read(tmp_path / "b.parquet")


# -- generations that were interrupted --------------------------------------------------------------------------------


def test_an_array_that_its_header_makes_large(tmp_path, capsys):
    """Two gigabytes by a header, of which the file has nothing, or all of it as zeros: not read, and one line says so."""
    example = Example("a", "0", "", [1, 2], [], 3)
    for zeros in (0, 32 << 20):
        path = Partial(tmp_path, "full", "", example).folder / "part-00000.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as members, members.open("tokens.npy", "w") as member:
            shape = (zeros // 8 or 1 << 28,)
            np.lib.format.write_array_header_1_0(member, {"descr": "<i8", "fortran_order": False, "shape": shape})
            member.write(bytes(zeros))
        assert path.stat().st_size < 100_000
        tracemalloc.start()
        assert Partial(tmp_path, "full", "", example).earlier is None and not path.exists()
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
        (line,) = capsys.readouterr().err.splitlines()
        assert str(path) in line and f"tokens.npy would take {8 * shape[0] / 1e6:.1f} MB" in line and "may take 16.8 MB" in line
