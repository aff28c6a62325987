"""The attention benchmark on a small problem: synthetic hits hit, bytes follow from the spans, failures are rows."""

import json
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from macbench_kernels import torch_backend

from macbench.attention import __main__ as script
from macbench.attention import bench, peers, table
from macbench.attention.bench import NO_GPU, NoGPU, measure
from macbench.attention.problem import Cell, Problem, Stream, rotation
from tests.conftest import DEVICE

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


def test_bytes_are_the_mean_over_the_timed_rounds(rows):
    """Of 5 rounds the last two are timed: 303 and 304 visible tokens."""
    kv_row, scan = 2 * 64 * 4, 2 * 6 * 32 * 64 * 4
    full, sdpa, none, mixed, clustered, every = rows
    assert [r["rounds"] for r in rows] == [2] * 6
    assert full["bytes_read"] == 2 * 2 * 303.5 * kv_row
    assert sdpa["bytes_read"] == 2 * 2 * 300 * kv_row  # does not see lengths grow
    assert none["kv_tokens"] == 2 * 2 * 303.5
    assert none["bytes_read"] == 2 * 2 * 303.5 * kv_row + scan
    assert every["hit_rate_measured"] == 1
    assert 2 * 2 * 17 * kv_row <= every["bytes_kv"] <= 2 * 2 * (16 + 8) * kv_row
    assert every["bytes_state"] == scan + 12 * (64 * 4 + 8)
    assert clustered["hit_rate_measured"] == mixed["hit_rate_measured"] == 0.5
    assert every["bytes_kv"] < clustered["bytes_kv"] <= mixed["bytes_kv"] <= none["bytes_kv"]


@pytest.fixture
def calls(monkeypatch) -> list:
    """(q_pre, layer, ring, step) of every call of the torch step that a measurement makes, checks first."""
    noted: list = []
    honest = bench.compose(torch_backend.match, torch_backend.attend)

    def mac_step(q_pre, q, cache, layer, ring, params, scale):
        step = honest(q_pre, q, cache, layer, ring, params, scale)
        noted.append((q_pre, layer, ring, step))
        return step

    monkeypatch.setattr(bench, "kernels", lambda backend, device: SimpleNamespace(mac_step=mac_step))
    return noted


def test_rings_rotate_over_fewer_caches_and_reads_are_theirs(monkeypatch, calls):
    """3 rings on 2 caches, with sinks: what a row counts, by brute force over the sets of keys of the timed calls."""
    monkeypatch.setattr(bench, "_rotation", lambda *args: (2, 3))
    full, row = measure(**SMALL | {"sink": 5, "hit_rate": [0.5], "misses": ["random"], "backends": ["torch"]})
    assert (full["error"], row["error"]) == (None, None)
    assert (full["layers"], full["rings"], row["layers"], row["rings"], row["sink"]) == (2, None, 2, 3, 5)
    del calls[:4]  # two chained steps each of the first and the last ring
    assert len(calls) == 5 * 3
    assert [layer for _, layer, _, _ in calls[:6]] == [0, 1, 0] * 2
    assert len({ring.q.data_ptr() for _, _, ring, _ in calls}) == 3
    assert len({q_pre.data_ptr() for q_pre, *_ in calls}) == 3
    tokens = hits = 0
    for *_, step in calls[3 * 3 :]:
        spans = step.spans.tolist()
        assert spans[2] == [[[0] * 6] * 2, [[5] * 6] * 2]
        for b in range(2):
            for group in (range(3), range(3, 6)):
                tokens += len({key for start, stop in spans for h in group for key in range(start[b][h], stop[b][h])})
        hits += int(step.hit.sum())
    assert row["kv_tokens"] == round(tokens / 6)
    assert row["bytes_kv"] == round(tokens / 6 * 2 * 64 * 4)
    assert row["hit_rate_measured"] == hits / (6 * 12) == 0.5


def test_every_way_of_launching_counts_the_same_rounds():
    """On a GPU by graph replay and by eager launches of the fused step, with sinks and bounded chains."""
    here = {"device": "cuda", "dtype": "bfloat16", "modes": ["graph", "eager"], "backends": ["triton"]} if DEVICE == "cuda" else {}
    rows = measure(**SMALL | {"hit_rate": [0, 0.5], "sink": 3, "max_chain": 4} | here)
    itemsize = 2 if here else 4
    for row in rows:
        assert row["error"] is None
        assert row["rounds"] == 2
        if row["hit_rate"] == 0.5:
            assert row["hit_rate_measured"] == 0.5
        elif row["backend"] != "sdpa":
            assert row["kv_tokens"] == 2 * 2 * 303.5
        if row["method"] == "mac":
            hits = 12 * row["hit_rate"]
            assert row["bytes_state"] == 12 * 32 * (64 * itemsize + 4) + hits * (64 * 4 + 8)
            assert row["bytes_kv"] == pytest.approx(row["kv_tokens"] * 2 * 64 * itemsize, abs=64 * itemsize)


@pytest.mark.parametrize(("wrong_round", "noticed"), [(2, False), (3, True), (4, True)])
def test_hits_other_than_intended_in_a_timed_round_are_an_error(monkeypatch, wrong_round, noticed):
    honest, made = Stream.__init__, []

    def init(self, *args):
        honest(self, *args)
        self.hits[wrong_round, 0, 1, 2] ^= True
        made.append(self)

    monkeypatch.setattr(Stream, "__init__", init)
    (row,) = measure(**SMALL | {"hit_rate": [0.5], "misses": ["random"], "backends": []})
    assert len(made) == 1
    if noticed:
        assert row["error"].startswith("RuntimeError: 1 of 24 heads of the timed rounds")
        assert row["time_ms"] is None
    else:
        assert row["error"] is None


@pytest.mark.parametrize(("knobs", "scan_row"), [({"max_chain": 3}, 64 * 4 + 4), ({"min_context": 300}, 64 * 4), ({"tau": 0.6}, 64 * 4)])
def test_the_method_s_knobs_are_honoured_and_recorded(calls, knobs, scan_row):
    (row,) = measure(**SMALL | {"hit_rate": [1], "backends": []} | knobs)
    assert row["error"] is None
    assert {key: row[key] for key in knobs} == knobs
    assert row["bytes_state"] == 2 * 6 * 32 * scan_row + 12 * (64 * 4 + 8)
    if "max_chain" in knobs:
        assert max(int(step.chain.max()) for *_, step in calls) <= 3


def test_a_rate_that_cannot_be_reached_is_an_error():
    rows = measure(**SMALL | {"hit_rate": [0, 1], "backends": [], "min_context": 400})
    assert rows[0]["error"] is None
    assert rows[0]["bytes_state"] == 0  # nothing was scanned
    assert "than the synthetic stream intends" in rows[1]["error"]


def test_wrong_results_and_missing_packages_are_rows(monkeypatch):
    honest = torch_backend.match

    def careless(*args, **kwargs):
        found = honest(*args, **kwargs)
        return found._replace(source=found.source - 1)

    def missing(problem):
        raise peers.Unavailable("not installed (No module named 'flashinfer')")

    monkeypatch.setattr(bench, "kernels", lambda *args: SimpleNamespace(mac_step=bench.compose(careless, torch_backend.attend)))
    monkeypatch.setattr(peers, "_sdpa", missing)
    rows = measure(**SMALL | {"hit_rate": [1], "backends": ["sdpa", "torch"]})
    assert rows[0]["error"].startswith("not installed")
    assert rows[1]["error"] is None
    assert "reads other keys" in rows[2]["error"]
    assert rows[2]["time_ms"] is None
    assert all(table.line(row) for row in rows)


@pytest.mark.parametrize("spoil", ["out", "sign", "lse", "query"])
def test_wrong_ring_entries_are_seen(monkeypatch, spoil):
    """A step with the right output that leaves a wrong entry behind, at a ctx where an entry is small beside the ring."""
    honest = bench.compose(torch_backend.match, torch_backend.attend)

    def careless(q_pre, q, cache, layer, ring, params, scale):
        step = honest(q_pre, q, cache, layer, ring, params, scale)
        row = int(cache.lengths[0] - 1) % ring.capacity
        if spoil == "out":
            ring.out[:, :, row] = 0
        elif spoil == "sign":
            ring.out[:, :, row] *= -1
        elif spoil == "lse":
            ring.lse[:, :, row] += 0.02
        else:
            ring.q[:, :, row] = 0
        return step

    real = bench.kernels("torch", "cpu")
    monkeypatch.setattr(bench, "kernels", lambda backend, device: type("K", (), {"mac_step": staticmethod(careless), "captures": real.captures}))
    rates = [0, 1] if spoil != "query" else [1]
    rows = measure(**SMALL | {"ctx": [2000], "hit_rate": rates, "backends": [], "max_gap": 1})
    assert all(row["error"] for row in rows), [row["relative_error"] for row in rows]


def test_no_gpu_is_one_line_that_offers_the_reference(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
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


def test_rotation_outgrows_the_cache_but_not_the_memory():
    l2, free = 50 << 20, 78 << 30
    small = Cell(32, 8, 1, 32768)
    layers, rings = rotation(small, (512,), l2, free)
    assert layers == rings
    assert rings * small.hit_bytes >= 4 * l2
    assert rotation(Cell(32, 8, 16, 130048), (512,), l2, free) == (3, 3)
    assert rotation(Cell(32, 4, 64, 130048), (512,), l2, free) == (3, 3)
    assert rotation(Cell(32, 8, 64, 130048), (512,), l2, free) == (1, 3)  # 34 GB a cache
    assert rotation(small, (512,), l2, 10 * small.cache_bytes)[0] < 10
    assert rotation(Cell(32, 8, 64, 32768), (1024, 2048), l2, 20 << 30)[1] < 3  # 3.3 GB a ring


def test_break_even_is_where_the_last_crossing_lies():
    assert bench._break_even([(0, 3.0), (0.5, 2.0), (1, 1.0)], 1.5) == pytest.approx(0.75)
    assert bench._break_even([(0, 3.0), (1, 2.0)], 1.5) is None
    assert bench._break_even([(0, 1.0), (1, 0.5)], 1.5) == 0
    assert bench._break_even([(0, 3.0), (1, 1.0)], 1.5) is None  # nothing was measured in between


def test_bound_of_mixed_rows():
    row = dict.fromkeys(table.SCHEMA.names) | {"hit_rate": 0.9, "time_ms": 0.05, "bytes_read": 55 * 10**6}
    derived = bench._derived(row, 3e12)
    assert derived["bound_ms"] == pytest.approx(1.2 * 0.02 + 0.008)
    assert derived["over_bound"] == pytest.approx(0.05 / 0.032)
    assert bench._derived(row | {"hit_rate": 1.0}, 3e12)["bound_ms"] is None
    key = {"method": "mac", "backend": "triton", "mode": "graph", "q_heads": 32, "kv_heads": 8, "batch": 1, "ctx": 1, "misses": "random"}
    row |= {"window": 512, "synthetic": True} | key
    assert "0.0500* " in table.line(row | derived)
    assert "0.0300  " in table.line(row | {"time_ms": 0.03} | bench._derived(row | {"time_ms": 0.03}, 3e12))


def test_table_and_parquet_hold_every_row(rows, tmp_path):
    table.write(rows, tmp_path / "deep" / "attention.parquet", {"device": "cpu"})
    assert all(set(row) == set(table.SCHEMA.names) for row in rows)
    back = pq.read_table(tmp_path / "deep" / "attention.parquet")
    assert back.num_rows == len(rows)
    assert b"cpu" in back.schema.metadata[b"macbench"]
    assert "syn." in table.line(rows[-1])


def test_presets_are_one_table_and_one_file(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(script.PRESETS, "reach", [SMALL | {"hit_rate": [1], "backends": ["torch"]}, SMALL | {"window": [64], "backends": []}])
    monkeypatch.setattr(script.sys, "argv", ["", "reach", "a file"])
    assert script.main(["reach", str(tmp_path / "reach.parquet")]) == 0
    back = pq.read_table(tmp_path / "reach.parquet")
    assert back.column("window").to_pylist() == [None, 32, 64, 64, 64, 64]
    facts = json.loads(back.schema.metadata[b"macbench"])
    assert facts["git"] == script.environment.commit()
    assert facts["command"] == "python -m macbench.attention reach 'a file'"
    assert facts["packages"]["torch"] == torch.__version__
    assert capsys.readouterr().out.count("mac:torch") == 2 * 5


def test_reach_holds_every_cell_once():
    cells = set()
    for config in script.PRESETS["reach"]:
        heads, rates, windows = config.get("heads", ["32/8"]), config.get("hit_rate", [0, 0.5, 0.9, 0.97, 1]), config.get("window", [512])
        new = {(h, b, c, w, r) for h in heads for b in config["batch"] for c in config["ctx"] for w in windows for r in rates}
        assert not cells & new
        cells |= new
    assert {w for *_, w, _ in cells} == {512, 1024, 2048}
    assert {c for _, _, c, *_ in cells} == {32768, 65536, 130048, 131072}
