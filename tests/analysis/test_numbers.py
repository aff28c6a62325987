"""The numbers of every figure and table, once more from the parquet files in the repository, by a few independent lines."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pytest import approx

from analysis import chains, fig1, fig2, fig4, fig5, fig6, fig7, fig8, long_texts, methods, sweep, table1, table2_3, table5, table6, table7
from analysis.records import Records
from macbench.attention import table as attention_table
from macbench.attention.bench import measure
from macbench.cli import CONF
from macbench.records import SCHEMAS
from macbench.summary import summarise
from tests.test_summary import row

REFERENCE = CONF.parent / "runs" / "reference"


def rows(path: Path) -> list[dict]:
    """A file, or the parts of a table."""
    return [r for part in ([path] if path.is_file() else sorted(path.glob("part-*.parquet"))) for r in pq.read_table(part).to_pylist()]


def traced(records: Records, table: str) -> list[dict]:
    return rows(records.trace.path / f"{table}.parquet")


def test_fig2_is_a_mean_over_texts(records):
    numbers = fig2.numbers(records)
    for kind, space, gap in (("nearest", "pre", 16), ("every", "post", 64)):
        medians = [r[f"{space}_p50"] for r in traced(records, "gaps") if (r["pairs"], r["gap_low"]) == (kind, gap)]
        (found,) = numbers[(numbers.pairs == kind) & (numbers.space == space) & (numbers.gap_low == gap)].itertuples()
        assert (found.mean, found.texts) == (approx(np.mean(medians)), len(medians)) and found.low <= found.mean <= found.high


def test_fig4_is_a_mean_over_texts(records):
    numbers = fig4.numbers(records)
    for tau, band, quantile in ((0.45, 256, "p50"), (0.15, 8, "p99")):
        mine = [r for r in traced(records, "amend") if (r["tau"], r["band"]) == (tau, band)]
        (found,) = numbers[(numbers.tau == tau) & (numbers.band == band) & (numbers["quantile"] == quantile)].itertuples()
        assert found.mean == approx(np.mean([r[f"error_{quantile}"] for r in mine])) and found.count == sum(r["count"] for r in mine)
        assert found.rounding == approx(np.mean([r["rounding_mean"] for r in mine]))


def test_fig5_is_hits_over_steps_of_each_text(records):
    by_layer, by_window = fig5.rates(records, ["tau", "layer"], window=256), fig5.rates(records, ["tau", "window"])
    mine = [r for r in traced(records, "acceptance") if r["tau"] == 0.45 and r["window"] == 256]
    texts = {(r["task"], r["subtask"], r["example_id"]) for r in mine}

    def rate(some: list[dict]) -> float:
        per = [[r for r in some if (r["task"], r["subtask"], r["example_id"]) == text] for text in texts]
        return np.mean([sum(r["hits"] for r in p) / sum(r["steps"] for r in p) for p in per])

    assert by_window[(by_window.tau == 0.45) & (by_window.window == 256)]["mean"].item() == approx(rate(mine))
    assert by_layer[(by_layer.tau == 0.45) & (by_layer.layer == 17)]["mean"].item() == approx(rate([r for r in mine if r["layer"] == 17]))
    assert by_window.texts.eq(len(texts)).all()


def test_the_heat_map_is_a_mean_over_texts_of_each_head(records):
    numbers = fig5.by_head(records, 256)
    mine = [r for r in traced(records, "acceptance") if (r["tau"], r["window"], r["layer"], r["head"]) == (0.45, 256, 18, 7)]
    found = numbers[(numbers.tau == 0.45) & (numbers.layer == 18) & (numbers["head"] == 7)]["mean"].item()
    assert found == approx(np.mean([r["hits"] / r["steps"] for r in mine]))


def test_chain_depths(records):
    numbers = chains.numbers(records)
    mine = [r for r in traced(records, "chains") if r["depth_low"] == 2]
    (found,) = numbers[(numbers.depth_low == 2) & (numbers["quantile"] == "p90")].itertuples()
    assert found.mean == approx(np.mean([r["error_p90"] for r in mine])) and found.count == sum(r["count"] for r in mine)
    assert not (numbers.depth_low == 0).any()


def test_table6_weighs_groups_by_their_steps(records):
    found = table6.numbers(records).set_index("task").loc["all"]
    mine = traced(records, "groups")
    some = [r for r in mine if r["hit_all"]]
    weight = [r["hit_all"] for r in some]
    assert found["all heads hit"] == approx(sum(r["hit_all"] for r in mine) / sum(r["steps"] for r in mine))
    assert found["spread_p90"] == approx(np.average([r["spread_p90"] for r in some], weights=weight))
    assert found["spread_max"] == max(r["spread_max"] for r in some)
    both = [np.average([r[key] for r in some], weights=weight) for key in ("read_group", "read_own")]
    assert found["group reads / head reads"] == approx(both[0] / both[1])


def test_fig6_divides_flashinfer_by_mac(records):
    numbers, (source,) = fig6.numbers(records)
    assert numbers.peer.str.contains("FlashInfer's flashinfer_tc, its one kernel").all()
    mine = [r for r in rows(source.path) if (r["q_heads"], r["kv_heads"], r["error"]) == (32, 8, None)]
    for found in numbers.iloc[:: max(1, len(numbers) // 7)].itertuples():
        cell = [r for r in mine if (r["batch"], r["ctx"]) == (found.batch, found.ctx)]
        full = min(r["time_ms"] for r in cell if r["method"] == "full" and r["backend"].startswith("flashinfer"))
        (mac,) = [
            r for r in cell if r["method"] == "mac" and r["hit_rate"] == found.hit_rate and r["misses"] != "random" and r["window"] == found.window
        ]
        assert (found.speedup, found.low, found.high) == approx((full / mac["time_ms"], full / mac["time_p90_ms"], full / mac["time_p10_ms"]))


def test_without_flashinfer_our_own_full_attention_is_the_peer(timed, monkeypatch):
    read = Records.benchmark

    def layout(self, *args, **options):
        frame, sources = read(self, *args, **options)
        return frame.assign(q_heads=32, kv_heads=8), sources

    monkeypatch.setattr(Records, "benchmark", layout)
    numbers, _ = fig6.numbers(Records(timed))
    made = rows(timed / "attention" / "made.parquet")
    for found in numbers.itertuples():
        (full,) = [r["time_ms"] for r in made if (r["method"], r["batch"], r["ctx"]) == ("full", found.batch, found.ctx)]
        assert found.speedup == approx(full / found.time_ms) and "our own" in found.peer


def test_break_even_is_where_times_are_equal(records, tmp_path):
    """By the rows of the file: MAC's time over FlashInfer's, and where the line through the logarithms of two neighbours crosses 0."""
    numbers, (source,) = fig6.numbers(records)
    frame = pd.read_parquet(source.path).query("q_heads == 32 and kv_heads == 8")
    mac = frame[(frame.method == "mac") & frame.misses.isin(["clustered", "none"])]
    full = frame[frame.backend == "flashinfer_tc"].set_index(["batch", "ctx"]).time_ms
    found, slower = fig6.break_even(numbers).set_index(["batch", "ctx"]), []
    assert len(found) == 12
    for cell, part in mac.groupby(["batch", "ctx"]):
        part = part.sort_values("hit_rate_measured")
        slower.append(part.time_ms.iloc[0] / full[cell])
        for name, column in (("rate", "time_ms"), ("low", "time_p10_ms"), ("high", "time_p90_ms")):
            ratio, rate = np.log(part[column].to_numpy() / full[cell]), part.hit_rate_measured.to_numpy()
            i = int(np.flatnonzero(ratio <= 0)[0])
            assert rate[0] == 0 and ratio[i - 1] > 0 and ratio[:i].min() > 0
            slope = (ratio[i] - ratio[i - 1]) / (rate[i] - rate[i - 1])
            assert found.loc[cell, name] == approx(rate[i - 1] - ratio[i - 1] / slope)
    assert min(slower) > 1 and (found.rate > 0).all() and (found.low <= found.rate).all() and (found.rate <= found.high).all()
    caption = fig6.break_even_map(numbers, [source], tmp_path).caption
    assert f"slower in 12 of 12 cells: {min(slower):.3f} to {max(slower):.3f} times" in caption


def test_no_crossing_is_shown_as_zero_unless_mac_is_never_slower(records, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("analysis.style.save", lambda figure, *_: figures.append(figure))
    numbers, sources = fig6.numbers(records)
    fig6.break_even_map(numbers, sources, tmp_path)
    faster = numbers.assign(**{name: numbers[name] + (numbers.batch == 8) for name in ("speedup", "low", "high")})
    fig6.break_even_map(faster, sources, tmp_path)
    before, after = ([text.get_text() for text in figure.axes[0].texts] for figure in figures)
    assert len(before) == len(after) == 24 and not {"0", "0.00", "0.000"} & set(before) and after.count("0") == 4 and "0.004" in before
    fig6.plt.close("all")


def test_fig7_parts_add_up(records):
    numbers, (source, *_) = fig7.numbers(records)
    mine = [r for r in rows(source.path) if r["backend"] != "generate" and r["products_ms"] is not None]
    numbers = numbers[numbers.file == numbers.file.iloc[0]]
    assert 3 < len(numbers) <= len(mine) and (numbers[fig7.PARTS] >= 0).all(axis=None)
    for r in [r for r in mine if (r["ctx"], r["batch"]) in {(n.ctx, n.batch) for n in numbers.itertuples()}]:
        key = (numbers.ctx == r["ctx"]) & (numbers.batch == r["batch"]) & (numbers.method == r["method"]) & (numbers.tpot_p50_ms == r["tpot_p50_ms"])
        (found,) = numbers[key].itertuples()
        (full,) = [x for x in mine if (x["ctx"], x["batch"], x["backend"]) == (r["ctx"], r["batch"], "flashinfer")]
        assert found.products_ms + found.attention_ms + found.other_ms == approx(r["tpot_p50_ms"])
        assert found.speedup == approx(full["tpot_p50_ms"] / r["tpot_p50_ms"])


def test_table7_is_allocated_bytes(records):
    """Llama-3.1-8B: 32 layers of 32 heads of 128, bf16 queries, float32 states, lse and depth; 8 KV heads in bf16."""
    numbers, _ = table7.numbers(records)
    for found in numbers[numbers.model == "random_llama31_8b"].itertuples():
        ring = 32 * 32 * found.window * (128 * 2 + 128 * 4 + 8)
        assert found.state_bytes == approx(ring, rel=2e-3)  # and the benchmark's own made-up queries of one step
        assert found.kv_bytes == approx(32 * 8 * found.ctx * 128 * 2 * 2, rel=4e-3)
        assert found.share == approx(found.state_bytes / found.kv_bytes)


def test_fig1_is_accuracy_against_bytes_of_every_variant(records):
    run = max(records.runs, key=lambda r: len(set(pq.read_table(r / "samples", columns=["method"])["method"].to_pylist())))
    mine = [r for r in rows(run / "samples") if r["error"] is None]
    places = sorted({(r["subtask"], r["example_id"]) for r in mine})
    score = {(r["method"], r["variant"], r["subtask"], r["example_id"]): r["score"] for r in mine}
    subtasks = sorted({subtask for subtask, _ in places})

    def mean(of) -> float:
        return np.mean([np.mean([of(s, e) for s, e in places if s == subtask]) for subtask in subtasks])

    headline = fig1.in_order(records.headline(run))
    assert len(headline) == len({(r["method"], r["variant"]) for r in mine}) > 3 and headline.method.iloc[0] == "full"
    for found in headline.iloc[:: max(1, len(headline) // 5)].itertuples():
        some = [r for r in mine if (r["method"], r["variant"]) == (found.method, found.variant)]
        read = sum(r[f"bytes_{c}"] for r in some for c in ("kv", "meta", "state", "idx"))
        assert found.rho_bytes == approx(read / sum(r["bytes_full"] for r in some))
        assert found.score == approx(mean(lambda s, e, m=found.method, v=found.variant: score[m, v, s, e]))
        if found.method != "full":
            assert found.difference == approx(mean(lambda s, e, m=found.method, v=found.variant: score[m, v, s, e] - score["full", "", s, e]))
            assert found.difference_low <= found.difference <= found.difference_high


def test_methods_at_one_budget(records):
    numbers, sources = methods.numbers(records)
    mine = rows(sources[0].path)
    assert len(numbers) >= len(mine)
    (full,) = [r for r in mine if r["method"] == "full"]
    for r in mine:
        (found,) = numbers[(numbers.file == 0) & (numbers.method == r["method"])].itertuples()
        assert found.machine in sources[0].device
        if r["error"] is None:
            assert (found.over_full, found.floor_ms) == approx((r["time_ms"] / full["time_ms"], 1e3 * r["bytes_counted"] / r["copy_bandwidth"]))
        else:
            assert np.isnan(found.time_ms) and r["error"] == found.error


@pytest.fixture(scope="module")
def timed(tmp_path_factory) -> Path:
    """A small benchmark of attention with the match apart, on the CPU."""
    made = measure(
        heads=["4/2"], batch=[1, 2], ctx=[200, 300], window=[16, 32], band=16, head_dim=64, dtype="float32", device="cpu", backends=["torch"],
        hit_rate=[0.5, 1], misses=["clustered"], steps=4, max_gap=8, match=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("timed")
    attention_table.write(made, folder / "attention" / "made.parquet", {"device": "cpu", "git": {"commit": "0123456789"}})
    return folder


def test_fig8_and_table5_are_microseconds_of_the_rows(timed, tmp_path):
    made = rows(timed / "attention" / "made.parquet")
    small = Records(timed)
    matches = [r for r in made if r["method"] == "match"]
    assert len(matches) == 2 * 2 * 2 and all(r["error"] is None and r["bytes_read"] == r["batch"] * 4 * r["window"] * 64 * 4 for r in matches)
    numbers, _ = fig8.numbers(small)
    assert sorted(numbers.time_us) == approx(sorted(1e3 * r["time_ms"] for r in matches)) and set(numbers.layout) == {"4/2"}
    latencies, _ = table5.numbers(small)
    alone = latencies[(latencies.part == "full, torch") & (latencies.ctx == 300)].time.item()
    (full,) = [r for r in made if (r["method"], r["ctx"], r["batch"]) == ("full", 300, 1)]
    assert alone == approx(1e3 * full["time_ms"])
    for item in (fig8, table5):
        (drawn,) = item.make(small, tmp_path)
        assert "commit 01234567" in drawn.caption and all(file.stat().st_size > 300 for file in drawn.files)


def test_table2_3_divides_by_full_attentions_time():
    """Times of the run itself, as no others are below this folder."""
    records = Records(REFERENCE / "h100" / "longbench_v2")
    numbers, run = table2_3.numbers(records)
    numbers, none = table2_3.timed(records, numbers, run)
    mine = rows(run / "samples")
    assert not none
    per = {}
    for r in numbers.itertuples():
        some = [x for x in mine if (x["method"], x["variant"]) == (r.method, r.variant) and x["error"] is None]
        per[r.method, r.variant] = 1e3 * sum(x["decode_s"] for x in some) / sum(x["decode_steps"] for x in some)
        assert r.ms == approx(per[r.method, r.variant])
    for r in numbers.itertuples():
        assert r.over_full == approx(per[r.method, r.variant] / per["full", ""])


def test_table2_3_takes_steps_that_had_the_card_to_themselves(tmp_path):
    made = [("full", "", 8192, 2.0), ("full", "", 8192, 3.0), ("full", "", 8192, 9.0), ("full", "", 4096, 1.0), ("rocketkv", "0.1", 8192, 6.0)]
    steps = pd.DataFrame(made, columns=["method", "budget", "ctx", "ms"])
    steps.assign(device="NVIDIA H100 80GB HBM3", batch=7, subtask="vt").to_parquet(tmp_path / "step_times.parquet")
    records = Records(REFERENCE / "h100" / "longbench_v2", tmp_path)
    (drawn,) = table2_3.make(records, tmp_path)
    found = {(r.method, r.variant.split(":")[0]): (r[-3], r[-2]) for r in drawn.frame.itertuples()}
    assert found["full", "–"] == ("3.00", "1.00") and found["rocketkv", "at 0.1"] == ("6.00", "2.00")
    assert found["mac", "–"] == found["rocketkv", "at 0.25"] == ("–", "–") and "RULER's vt at 8K, batch 7" in drawn.caption


def test_times_of_unknown_requests_are_called_so(tmp_path):
    steps = pd.DataFrame([("full", "", 8192, 2.0, "NVIDIA H100 80GB HBM3")], columns=["method", "budget", "ctx", "ms", "device"])
    steps.to_parquet(tmp_path / "step_times.parquet")
    (drawn,) = table2_3.make(Records(REFERENCE / "h100" / "longbench_v2", tmp_path), tmp_path)
    assert "has no column batch, subtask" in drawn.caption and drawn.frame["ms/step"][0] == "2.00"


def test_a_mean_over_fewer_subtasks_is_called_so(records):
    source = records.source(next(r for r in records.runs if r.parts[-4] == "ruler"))
    known = source.facts["protocol"]["subtasks"]
    assert source.part(known) == "" and source.part(known[:10]) == f"10 of {len(known)} subtasks"
    numbers, _, _ = table1.compared(records)
    for found, shown in zip(numbers.itertuples(), table1.shown(numbers).benchmark, strict=True):
        assert ("subtasks" in shown) == bool(found.part)


def test_drift_is_by_windows_of_steps(records):
    (run,) = [r for r in records.runs if r.parts[-4].startswith("longgenbench")][:1]
    numbers = long_texts.numbers(records, run)
    found = numbers[numbers["first"] == 2000].iloc[0]
    subtask, example = found.text.split("/")
    mine = [
        r
        for r in rows(run / "steps")
        if (r["method"], r["subtask"], r["example_id"], r["variant"]) == ("mac", subtask, example, "") and 2000 <= r["step"] < 2250
    ]
    read = sum(r[f"bytes_{c}"] for r in mine for c in ("kv", "meta", "state", "idx"))
    assert len(mine) == 250 and found.rho_bytes == approx(read / sum(r["bytes_full"] for r in mine))
    assert found.hit_rate == approx(np.mean([r["hit_rate"] for r in mine]))


def test_latency_of_single_tokens(records, tmp_path):
    numbers, sources = long_texts.latencies(records)
    assert {s.path.parts[-4] for s in sources} == {"longgenbench_16k"}  # answers are shorter
    run = sources[0].path
    mine = [r for r in rows(run / "steps") if (r["method"], r["variant"]) == ("full", "")]
    batches = {r["step"]: {x["latency_ms"] for x in mine if x["step"] == r["step"]} for r in mine[::400]}
    assert all(len(times) == 1 for times in batches.values())  # its four texts are one batch
    steps = [r["latency_ms"] for r in mine if r["subtask"] == mine[0]["subtask"]]
    (found,) = numbers[numbers.run.str.contains(run.name[-8:]) & (numbers.method == "full")].itertuples()
    assert (found.n, found.texts, found.batch) == (len(steps), 4, 4) and 4 * len(steps) == len(mine)
    assert (found.low, found.middle, found.high, found.tail) == approx(tuple(np.percentile(steps, [5, 50, 95, 99])))
    caption = long_texts.latency(records, tmp_path).caption
    assert "4 texts in batches of 4" in caption and "a step of a batch counts once" in caption


def test_the_stars_of_a_sweep_are_intervals_that_leave_out_0(records):
    run = next(r for r in records.runs if sweep.numbers(records, r) is not None)
    numbers, mine = sweep.numbers(records, run), [r for r in rows(run / "samples") if r["error"] is None]
    full = {(r["subtask"], r["example_id"]): r["score"] for r in mine if r["method"] == "full"}
    generator = np.random.default_rng(0)
    for found in numbers.iloc[::4].itertuples():
        strata: dict = {}
        for r in mine:
            if (r["method"], r["variant"]) == ("mac", found.variant):
                strata.setdefault(r["subtask"], []).append(r["score"] - full[r["subtask"], r["example_id"]])
        # Draws of n - 1 of n, whose spread is that of the unbiased standard error.
        draws = np.mean([generator.choice(x, (4000, len(x) - 1)).mean(1) for x in strata.values()], axis=0)
        low, high = np.quantile(draws, [0.025, 0.975])
        assert found.difference == approx(np.mean([np.mean(x) for x in strata.values()]))
        assert (found.difference_low, found.difference_high) == approx((low, high), abs=0.01)
        assert found.apart == (low > 0 or high < 0) or min(abs(low), abs(high)) < 0.01


def test_the_caption_of_a_probe_counts_its_rows(records, tmp_path):
    run = next(r for r in records.runs if r.parent.parent.name == "smollm2_128k")
    mine = [r for r in rows(run / "samples") if r["error"] is None]
    frame, headline = records.samples(run), records.headline(run)
    caption = fig1.picture(frame, headline, records.source(run), "probe", tmp_path).caption
    examples, variants = ({tuple(r[key] for key in keys) for r in mine} for keys in (("subtask", "example_id"), ("method", "variant")))
    assert f"{len(examples)} examples of" in caption and "its scores say nothing about SmolLM2" in caption
    assert f"{len(variants)} method variants, {sum(r['decode_steps'] for r in mine):,} decode steps" in caption
    assert ("No answer is right" in caption) == (not any(r["score"] for r in mine))


def test_scores_that_tell_nothing_are_said_to():
    def told(full, mac, lines=None):
        made = [row("full", "vt", i, x, top1_agreement=None) for i, x in enumerate(full)]
        made += [row("mac", "vt", i, x, top1_agreement=0.75) for i, x in enumerate(mac)]
        return fig1.untold(summarise(pd.DataFrame(made)), lines or {})

    assert "No answer is right" in told([0, 0], [0, 0]) and "mac 75.0%" in told([0, 0], [0, 0])
    assert "not above chance" in told([0, 1, 0, 0], [0, 0, 1, 0], {"chance": 0.25}) and "have no width" in told([0, 1], [0, 1])
    assert told([1] * 7 + [0], [1] * 6 + [0] * 2, {"chance": 0.25}) == told([0.5, 0.4], [0.4, 0.4]) == ""


def test_sweep_reads_its_knobs_from_the_variants(tmp_path):
    run = tmp_path / "ruler" / "tiny" / "512" / "mac-1"
    (run / "samples").mkdir(parents=True)
    labels = [f"tau={t} window={w} band=64" for t in (0.3, 0.6) for w in (128, 512)]
    made = [row("full", "vt", i, 0.5, rho_bytes=1.0) for i in range(3)]
    scores = {label: [0.1 * j + 0.25 * (i > 0) for i in range(3)] for j, label in enumerate(labels)}
    made += [row("mac", "vt", i, x, variant=label, rho_bytes=0.25, hit_rate=0.75) for label, some in scores.items() for i, x in enumerate(some)]
    blank = dict.fromkeys(SCHEMAS["samples"].names) | {"run_id": "mac-1", "task": "ruler", "ctx": 512}
    pq.write_table(pa.Table.from_pylist([blank | r for r in made], schema=SCHEMAS["samples"]), run / "samples" / "part-0.parquet")
    (run / "summary.json").write_text("[]")
    (run / "environment.json").write_text(json.dumps({"device": "cpu"}))
    numbers = sweep.numbers(Records(tmp_path), run)
    (found,) = numbers[(numbers.tau == 0.6) & (numbers.window == 128)].itertuples()
    assert found.difference == approx(np.mean(scores["tau=0.6 window=128 band=64"]) - 0.5) and found.band == 64
    # Of three examples two are drawn: differences of -0.5 + 0.1 j once in nine times, of -0.25 + 0.1 j four times in nine.
    assert sorted(numbers.apart) == [False, True, True, True] and not numbers.set_index(["tau", "window"]).apart[0.6, 512]
    (drawn,) = sweep.make(Records(tmp_path), tmp_path)
    assert (
        "3 examples of vt per variant, 150 decode steps of all 4 variants and full attention, which scores 0.500" in drawn.caption
        and "up to ±0.125" in drawn.caption
    )
    assert drawn.files[0].stat().st_size > 1000
