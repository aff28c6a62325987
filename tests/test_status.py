"""What status says of records that are no run of examples; of runs, see tools."""

import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from macbench import status
from macbench.attention import table as attention
from macbench.attention.command import run
from macbench.latency import table as latency
from macbench.latency.bench import COLUMNS, NOT_TIMED
from macbench.trace import records as trace
from tests.attention.test_command import METHOD, task

NUMBERS = ("examples", "done", "failed", "running", "missing")


def numbers(path: Path) -> list:
    found = status.row(path)
    assert found["run"] == str(path) and (found["per hour"], found["left"], found["workers"]) == ("-", "-", "-")
    return [found[name] for name in NUMBERS]


def test_a_table_of_attention(tmp_path, capsys):
    """One row each of torch, MAC and a package that is not there, which is no failure; then one that failed, in a table that grows by parts."""
    assert run(task(backends=["torch", "flashinfer"]), METHOD, [200], "auto", "cpu", 1, str(tmp_path)) == 0
    (path,) = status.found(tmp_path)
    assert numbers(path) == [3, 2, 0, "-", 0]
    rows = pq.read_table(path).to_pylist()
    attention.write([*rows, rows[0] | {"error": "RuntimeError: no"}], tmp_path / "parts.parquet", {"command": "python -m macbench.attention"})
    assert numbers(tmp_path / "parts.parquet") == [4, 2, 1, "-", "-"]


def test_a_table_of_decode(tmp_path):
    row = dict.fromkeys(COLUMNS)
    rows = [row, row | {"error": NOT_TIMED[0]}, row | {"error": "OutOfMemoryError: lower batch"}, row]
    latency.write(rows, tmp_path / "decode" / "m" / "mac-1.parquet", {"task": {"name": "decode"}})
    (path,) = status.found(tmp_path)
    assert numbers(path) == [4, 2, 1, "-", 0]


def test_a_trace_that_grows(tmp_path):
    folder = tmp_path / "trace" / "m" / "512" / "trace-1"
    texts = pd.DataFrame({"task": "ruler", "subtask": "vt", "example_id": ["0", "1"], "steps": 3})
    trace.write(folder, {"texts": texts}, {"texts": 5})
    assert list(status.found(tmp_path)) == [folder]
    assert numbers(folder) == [5, 2, "-", "-", 3]
    trace.write(folder, {"texts": texts}, {})  # as traces were that did not say how many there are
    assert numbers(folder) == ["-", 2, "-", "-", "-"]
    (folder / "config.yaml").write_text("")
    assert numbers(folder) == [2, 2, "-", "-", 0]


def test_what_is_not_ours_is_left_out_and_what_is_damaged_is_named(tmp_path, monkeypatch, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    pq.write_table(pa.table({"error": ["no"]}), one / "theirs.parquet")
    latency.write([dict.fromkeys(COLUMNS)], one / "ours.parquet", {})
    table = pq.read_table(one / "ours.parquet")
    for name, facts in (("list", b"[1]"), ("text", b"{")):
        pq.write_table(table.replace_schema_metadata({"macbench": facts}), two / f"{name}.parquet")
    latency.write([dict.fromkeys(COLUMNS)], one / "ours.parquet", {"device": "cpu"})
    (two / "damaged.parquet").write_bytes((one / "ours.parquet").read_bytes()[:-9])
    monkeypatch.setattr(sys, "argv", ["status", str(one), str(two)])
    status.main()
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 and "ours.parquet" in out
    assert [line.count("macbench: note: ") for line in err.splitlines()] == [1, 1, 1]
    assert all(f"{name}.parquet" in err for name in ("damaged", "list", "text"))


def test_the_records_of_this_repository_are_whole():
    """Runs, traces and benchmarks: nothing failed, nothing is missing."""
    root = Path(__file__).resolve().parents[1] / "runs" / "reference"
    rows = [row for path in status.found(root) if (row := status.row(path))]
    kinds = {Path(row["run"]).relative_to(root).parts[1] for row in rows}
    assert {"ruler", "longbench_v2", "attention", "decode", "trace"} <= kinds
    assert all(row["done"] > 0 and row["failed"] in (0, "-") and row["missing"] in (0, "-") for row in rows)
