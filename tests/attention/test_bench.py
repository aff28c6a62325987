"""The attention benchmark on a small problem: synthetic hits hit, bytes follow from the spans, failures are rows."""

import pyarrow.parquet as pq
import pytest
import torch
from macbench_kernels import torch_backend

from macbench.attention import bench, peers, table
from macbench.attention.bench import NO_GPU, NoGPU, measure
from macbench.attention.problem import Cell, Problem, Stream, layers_for

SMALL = dict(
    heads=["6/2"], batch=[2], ctx=[300], window=[32], band=16, head_dim=64, dtype="float32", device="cpu", backends=["torch", "sdpa"],
    hit_rate=[0, 0.5, 1], steps=5, max_gap=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return measure(**SMALL)


def test_every_measurement_is_checked_and_timed(rows):
    assert [(r["method"], r["hit_rate"], r["misses"]) for r in rows] == [
        ("full", None, None), ("full", None, None), ("mac", 0, "none"), ("mac", 0.5, "random"), ("mac", 0.5, "clustered"), ("mac", 1, "none"),
    ]  # fmt: skip
    for row in rows:
        assert row["error"] is None
        assert row["time_ms"] > 0
        assert row["relative_error"] < 1e-4
        assert row["synthetic"] == (row["method"] == "mac")


def test_bytes_are_those_of_the_keys_that_were_read(rows):
    kv_row, scan = 2 * 64 * 4, 2 * 6 * 32 * 64 * 4
    full, none, mixed, clustered, every = (rows[i] for i in (0, 2, 3, 4, 5))
    assert full["bytes_read"] == 2 * 2 * 300 * kv_row
    assert none["bytes_read"] == 2 * 2 * 301 * kv_row + scan  # the second step is counted, one token later
    assert every["hit_rate_measured"] == 1
    assert 2 * 2 * 17 * kv_row <= every["bytes_kv"] <= 2 * 2 * (16 + 8) * kv_row
    assert every["bytes_state"] == scan + 12 * (64 * 4 + 8)
    assert clustered["hit_rate_measured"] == mixed["hit_rate_measured"] == 0.5
    assert every["bytes_kv"] < clustered["bytes_kv"] <= mixed["bytes_kv"] <= none["bytes_kv"]


def test_wrong_results_and_missing_packages_are_rows(monkeypatch):
    honest = torch_backend.match

    def careless(*args, **kwargs):
        found = honest(*args, **kwargs)
        return found._replace(source=found.source - 1)

    def missing(problem):
        raise peers.NotInstalled("not installed (No module named 'flashinfer')")

    monkeypatch.setattr(bench, "kernels", lambda backend, device: type("K", (), {"mac_step": bench.compose(careless, torch_backend.attend)}))
    monkeypatch.setattr(peers, "_sdpa", missing)
    rows = measure(**SMALL | {"hit_rate": [1], "backends": ["sdpa", "torch"]})
    assert rows[0]["error"].startswith("not installed")
    assert rows[1]["error"] is None
    assert "reads other keys" in rows[2]["error"]
    assert rows[2]["time_ms"] is None
    assert all(table.line(row) for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line_that_offers_the_reference():
    with pytest.raises(NoGPU) as error:
        measure()
    assert str(error.value) == NO_GPU
    assert "\n" not in NO_GPU


@pytest.mark.parametrize("misses", ["random", "clustered"])
def test_exactly_the_wanted_share_misses(misses):
    cell = Cell(8, 2, 3, 200, head_dim=64, window=32, band=8, dtype=torch.float32, max_gap=4)
    problem = Problem(cell, "cpu", 2, 4, 0)
    stream = Stream(problem, 0.75, misses)
    ring = stream.rings[1]
    found = torch_backend.match(stream.queries[0, 1], ring, problem.cache.lengths - 1, cell.tau * (2 * 64) ** 0.5, cell.band)
    assert int(found.hit.sum()) == 18
    if misses == "clustered":
        assert sorted(found.hit.view(3, 2, 4).sum(-1).flatten().tolist()) == [0, 2, 4, 4, 4, 4]


def test_layers_outgrow_the_cache_but_not_the_memory():
    cell = Cell(32, 8, 1, 32768)
    assert layers_for(cell, 50 << 20, 70 << 30) * cell.hit_bytes >= 4 * 50 << 20
    assert layers_for(cell, 50 << 20, 10 * cell.cache_bytes) < 10
    assert layers_for(Cell(32, 8, 64, 130048), 50 << 20, 70 << 30) == 1


def test_break_even_is_where_the_last_crossing_lies():
    assert bench._break_even([(0, 3.0), (0.5, 2.0), (1, 1.0)], 1.5) == pytest.approx(0.75)
    assert bench._break_even([(0, 3.0), (1, 2.0)], 1.5) is None
    assert bench._break_even([(0, 1.0), (1, 0.5)], 1.5) == 0


def test_table_and_parquet_hold_every_row(rows, tmp_path):
    table.write(rows, tmp_path / "deep" / "attention.parquet", {"device": "cpu"})
    back = pq.read_table(tmp_path / "deep" / "attention.parquet")
    assert back.num_rows == len(rows)
    assert b"cpu" in back.schema.metadata[b"macbench"]
    assert "syn." in table.line(rows[-1])
