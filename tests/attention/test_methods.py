"""Steps of all methods side by side: what is counted follows from their sizes, and who cannot read so little says so."""

import pandas as pd
import pytest

from macbench.attention.__main__ import main
from macbench.attention.methods import METHODS, SCHEMA, measure
from macbench.attention.phases import summed
from macbench.methods.kivi import KIVI

CTX, BATCH, HEADS, KV_HEADS, DIM = 400, 2, 4, 2, 64
ROW = 2 * DIM * 2  # bytes of a token's K and V in a KV head


@pytest.fixture(scope="module")
def rows():
    names = ["full", "streaming_llm", "snapkv", "kivi", "kivi_2bit", "int8", "tidaldecode"]
    made = measure(0.2, CTX, BATCH, f"{HEADS}/{KV_HEADS}", DIM, layers=4, methods=names, replays=3, device="cpu")
    return {row["method"]: row for row in made}


def test_bytes_are_those_of_the_sizes(rows):
    everything = BATCH * KV_HEADS * CTX * ROW
    assert rows["full"]["bytes_counted"] == everything and rows["full"]["rho_bytes"] == 1
    for name in ("streaming_llm", "snapkv"):
        assert rows[name]["bytes_counted"] == BATCH * KV_HEADS * 80 * ROW, name  # 0.2 of 400 rows
    assert rows["int8"]["bytes_counted"] == BATCH * KV_HEADS * CTX * (2 * DIM + 8)
    keys, values = (CTX - 1) // 128 * 128, CTX - 1 - 128
    for name, bits in (("kivi", 4), ("kivi_2bit", 2)):
        codes = bits * DIM // 8 + 4 * DIM // KIVI.group
        assert rows[name]["bytes_counted"] == BATCH * KV_HEADS * ((keys + values) * codes + (2 * CTX - keys - values) * 2 * DIM), name


def test_times_stand_beside_their_targets(rows):
    row = rows["full"]
    assert row["target_ms"] == pytest.approx(1.3 * row["bytes_counted"] / 2.75e12 * 1e3 + 0.015)
    assert row["over_target"] == pytest.approx(row["time_ms"] / row["target_ms"]) and row["time_ms"] > 0
    assert set(row) == set(SCHEMA.names) and set(rows) < set(METHODS)


def test_a_method_that_cannot_read_so_little_runs_at_the_least_it_can(rows):
    row = rows["tidaldecode"]
    assert "floor" in row["floor"] and row["error"] is None
    # Three of four layers are dense.
    assert row["budget"] == 0.8 and row["rho_bytes"] == pytest.approx(0.8, rel=0.02) and row["time_ms"] > 0
    assert rows["snapkv"]["budget"] == 0.2 and rows["snapkv"]["floor"] is None


def test_kernels_are_sorted_by_what_they_do():
    add = "void at::native::elementwise_kernel<AddFunctor<float>>"
    kernels = [("_attend_sets", 300, 6), ("_merge_pieces", 60, 6), ("_select", 120, 6), (add, 30, 12)]
    got = summed(kernels, 6)
    assert (got["attention_ms"], got["choice_ms"], got["torch_ms"]) == pytest.approx((0.06, 0.02, 0.005)) and got["launches"] == 5
    assert got["slowest"].startswith("_attend_sets 50.0 us in 1; _select 20.0 us in 1") and "AddFunctor" in got["slowest"]


def test_a_method_that_fails_is_a_row_and_the_others_are_kept(tmp_path, monkeypatch):
    def broken():
        raise ValueError("no such kernel\nand more")

    monkeypatch.setitem(METHODS, "quest", broken)
    file = tmp_path / "methods.parquet"
    assert main(["methods", str(file), '{"device": "cpu", "ctx": 300, "batch": 1, "heads": "2/1", "replays": 1, "methods": ["quest", "tova"]}']) == 0
    quest, tova = pd.read_parquet(file).to_dict("records")
    assert quest["error"] == "ValueError: no such kernel" and pd.isna(quest["time_ms"])
    assert pd.isna(tova["error"]) and tova["bytes_counted"] == 15 * 4 * 128  # 0.05 of 300 rows
