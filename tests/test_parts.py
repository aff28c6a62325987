"""Files of runs that are small on the disk and large in memory."""

import contextlib
import io
import os
import tracemalloc
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from macbench import parts
from macbench.partial import Partial
from macbench.records import SCHEMAS
from macbench.tasks.base import Example
from macbench.thrift import structure
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


def test_a_footer_that_lies(tmp_path, monkeypatch):
    """Twenty megabytes in a page, a hundred bytes by the footer, which is all that a reader would have to go by before it reads."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x" * 20_000_000]}), path, compression="zstd", use_dictionary=False, write_statistics=False)
    size = pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size
    content = path.read_bytes()
    footer = content[-8 - int.from_bytes(content[-8:-4], "little") :]
    assert footer.count(varint(size)) == 2  # of the column, and of the row group
    lies = footer.replace(varint(size), varint(100, len(varint(size))))
    path.write_bytes(content[: -len(footer)] + lies)
    assert pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size == 100 and pq.read_table(path).nbytes > 20_000_000
    assert parts.read(path).num_rows == 1
    monkeypatch.setattr(parts, "FREE", 1 << 20)
    assert "with 1 rows it would take 20.0 MB" in refused(path)


def groups_of(path, doublings: int):
    """The file with all its row groups 2 to the ``doublings`` times in the footer."""
    known = pq.read_metadata(path)
    for _ in range(doublings):
        again = io.BytesIO()
        known.write_metadata_file(again)
        known.append_row_groups(pq.read_metadata(again))
    footer = io.BytesIO()
    known.write_metadata_file(footer)
    content = path.read_bytes()
    path.write_bytes(content[: -8 - int.from_bytes(content[-8:-4], "little")] + footer.getvalue()[4:])
    assert pq.read_metadata(path).num_row_groups == 1 << doublings


def test_row_groups_of_the_same_bytes(tmp_path):
    """A page of twenty megabytes, as often as the footer says so: it is not read again each time."""
    path, some = tmp_path / "a.parquet", pa.table({"n": np.random.default_rng(0).integers(0, 1 << 60, 2_500_000)})
    for doublings, said in ((2, "columns that overlap"), (13, "8192 row groups, and may have 4096")):
        pq.write_table(some, path, use_dictionary=False, row_group_size=3_000_000)
        assert parts.read(path).num_rows == 2_500_000
        groups_of(path, doublings)
        with within():
            assert said in refused(path)


def varint(value: int, length: int = 0) -> bytes:
    """A positive integer in Thrift's compact protocol, perhaps in more bytes than it needs."""
    value, found = 2 * value, []
    while value > 127 or len(found) + 1 < length:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_headers_are_what_the_reference_implementation_reads(tmp_path, version):
    """Of every column chunk as many values as its metadata says, and, but for the headers themselves, as many bytes."""
    rng, rows, path = np.random.default_rng(0), range(50_000), tmp_path / "a.parquet"
    data = pa.table({"n": rng.integers(0, 1000, len(rows)), "text": [str(n) * 9 for n in rows], "lists": [["a"] * (n % 3) for n in rows]})
    pq.write_table(data, path, data_page_version=version, data_page_size=20_000, row_group_size=30_000, write_page_checksum=True)
    known = pq.read_metadata(path)
    with path.open("rb") as raw:
        groups = parts._footer(raw, path.stat().st_size)[4]
        assert [group[3] for group in groups] == [30_000, 20_000]
        for g, group in enumerate(groups):
            for i, column in enumerate(group[1]):
                chunk, pages = known.row_group(g).column(i), list(parts._pages(raw, column[3]))
                assert len(pages) > 1 and sum(page.get(5, page.get(8, {})).get(1, 0) for page in pages) == chunk.num_values
                assert 0.97 * chunk.total_uncompressed_size < sum(page[2] for page in pages) < chunk.total_uncompressed_size
    assert parts.read(path).equals(data)


@given(st.binary(max_size=60), st.integers(0, 40))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_structures_of_anything(content, cut):
    """An end within what is there; what readers could take in two ways is none."""
    page = bytes.fromhex("1500152815282c15041500150615060000")  # a data page of 20 bytes, 2 values
    assert structure(page) == ({1: 0, 2: 20, 3: 20, 5: {1: 2, 2: 0, 3: 3, 4: 3}}, len(page))
    for twice in ("1500050200", "15000582800800", "15ffffffff7f00"):  # the first field again, its number beyond 16 bits, a value beyond 32
        with pytest.raises(ValueError):
            structure(bytes.fromhex(twice))
    with within():
        for some in (content, page[:cut] + content):
            with contextlib.suppress(ValueError, IndexError):
                assert structure(some)[1] <= len(some)


@given(st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_damaged_headers(tmp_path_factory, data):
    """Bytes of a footer, which has no checksum, or anywhere: read, or refused by an error that readers know."""
    path = tmp_path_factory.getbasetemp() / "damaged.parquet"
    if not test_damaged_headers.content:
        pq.write_table(pa.table({"text": ["a", "b"] * 50, "n": range(100)}), path, write_page_checksum=True)
        test_damaged_headers.content.append(path.read_bytes())
    content = bytearray(test_damaged_headers.content[0])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(4, len(content) - 9))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with within(), contextlib.suppress(OSError, pa.ArrowException):
        parts.read(path)


test_damaged_headers.content = []


def test_columns_come_in_the_order_asked_for_or_are_named(tmp_path):
    pq.write_table(pa.table({"a": [1], "b": [2], "c": [3]}), tmp_path / "a.parquet")
    assert parts.read(tmp_path / "a.parquet", ["c", "a"]).to_pylist() == [{"c": 3, "a": 1}]
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    assert len(parts.read(tmp_path / "empty.parquet")) == 0
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
