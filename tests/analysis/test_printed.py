"""What figures draw and tables print, once more from the parquet files in the repository by plain pandas: intervals, error bars and columns."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.container import ErrorbarContainer
from pytest import approx

from analysis import chains, fig1, fig2, fig4, fig5, fig6, fig8, long_texts, methods, style, table1, table2_3, table5, table6, table7
from analysis.records import Records
from macbench.cli import CONF

H100 = CONF.parent / "runs" / "reference" / "h100"
READ = [f"bytes_{c}" for c in ("kv", "meta", "state", "idx")]
BEST = H100 / "longbench_v2" / "smollm2" / "8192" / "mac-b0b9e845"


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures that an item hands over to be saved, which are closed at the end."""
    found = []
    monkeypatch.setattr(style, "save", lambda figure, out, name, title, caption, *_: found.append(figure) or style.Drawn(name, title, caption, []))
    yield found
    plt.close("all")


def table(folder) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(part) for part in sorted(folder.glob("part-*.parquet"))])


def traced(records: Records, name: str) -> pd.DataFrame:
    return pd.read_parquet(records.trace.path / f"{name}.parquet").assign(text=lambda f: f.task + f.subtask + f.example_id)


def bars(axes, along: str = "y") -> dict[str, np.ndarray]:
    """What was drawn, by label: [points, (x, y, low, high)], the ends being those of the bars along ``along``."""
    found = {}
    for container in axes.containers:
        if isinstance(container, ErrorbarContainer):
            line, _, (collection, *_) = container
            ends = np.array([segment[:, "xy".index(along)] for segment in collection.get_segments()])
            found[container.get_label()] = np.column_stack([*line.get_data(), ends])
    return found


def resampled(values) -> tuple[float, float]:
    """95% interval of the mean: the quantiles of many means of n - 1 of n values, drawn with replacement by indices."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return np.nan, np.nan
    drawn = values[np.random.default_rng(1).integers(len(values), size=(6000, len(values) - 1))].mean(1)
    return tuple(np.quantile(drawn, [0.025, 0.975]))


def holds(found, values) -> None:
    """Mean and interval are those of the values: ends within a tenth of the interval's width of those drawn anew."""
    low, high = resampled(values)
    assert found.mean == approx(np.mean(values))
    assert (found.low, found.high) == approx((low, high), abs=0.1 * (high - low) + 1e-9 if low == low else 0, nan_ok=True)


def test_intervals_over_texts_are_those_of_the_texts(records):
    gaps, amend, hits, depths = (traced(records, name) for name in ("gaps", "amend", "acceptance", "chains"))
    hits = hits.groupby(["tau", "window", "layer", "text"])[["hits", "steps"]].sum()
    by_text = hits.groupby(["tau", "window", "text"]).sum()
    made = [
        (fig2.numbers(records), gaps, ["pairs", "gap_low"], {"space": "pre"}, "pre_p50"),
        (fig2.numbers(records), gaps, ["pairs", "gap_low"], {"space": "post"}, "post_p50"),
        (fig4.numbers(records), amend, ["tau", "band"], {"quantile": "p50"}, "error_p50"),
        (fig4.numbers(records), amend, ["tau", "band"], {"quantile": "p99"}, "error_p99"),
        (chains.numbers(records), depths[depths.depth_low > 0], ["depth_low"], {"quantile": "p90"}, "error_p90"),
        (fig5.rates(records, ["tau", "window"]), by_text.assign(rate=by_text.hits / by_text.steps).reset_index(), ["tau", "window"], {}, "rate"),
        (fig5.rates(records, ["tau", "layer"], window=512), hits.assign(rate=hits.hits / hits.steps).xs(512, level="window").reset_index(),
         ["tau", "layer"], {}, "rate"),
    ]  # fmt: skip
    for numbers, frame, keys, only, column in made:
        for name, value in only.items():
            numbers = numbers[numbers[name] == value]
        truth = {key: part[column].to_numpy() for key, part in frame.groupby(keys)}
        assert len(numbers) == len(truth)
        for found in list(numbers.itertuples())[:: max(1, len(numbers) // 12)]:
            holds(found, truth[tuple(getattr(found, key) for key in keys)])


def test_bars_end_where_intervals_do(records, figures, tmp_path):
    def same(drawn, part) -> None:
        low, high = (part[end].fillna(part["mean"]) for end in ("low", "high"))
        assert drawn[:, 1:] == approx(np.column_stack([part["mean"], low, high]))

    for item in (fig2, fig4, chains, fig5):
        item.make(records, tmp_path)
    two, four, depth, five = (figure.axes for figure in figures[:4])
    numbers = fig2.numbers(records)
    for axes, kind in zip(two, ("nearest", "every"), strict=True):
        for space, label in (("pre", "before RoPE"), ("post", "after RoPE")):
            same(bars(axes)[label], numbers[(numbers.pairs == kind) & (numbers.space == space)])
    numbers = fig4.numbers(records)
    for axes, quantile in zip(four, ("p50", "p99"), strict=True):
        same(bars(axes)["tau = 0.45"], numbers[(numbers.tau == 0.45) & (numbers["quantile"] == quantile)])
    numbers = chains.numbers(records)
    same(bars(depth[0])["90th percentile"], numbers[numbers["quantile"] == "p90"])
    whole, layers = fig5.rates(records, ["tau", "window"]), fig5.rates(records, ["tau", "layer"], window=512)
    for (tau, part), drawn in zip(whole.groupby("tau"), bars_in_order(five[1]), strict=True):
        same(drawn, part)
        mine = layers[layers.tau == tau]
        band = five[0].collections[sorted(whole.tau.unique()).index(tau)].get_paths()[0].vertices
        for row in mine.itertuples():
            ends = band[band[:, 0] == row.layer, 1]
            assert (ends.min(), ends.max()) == approx((row.low, row.high))


def bars_in_order(axes) -> list[np.ndarray]:
    """As ``bars``, of lines without labels."""
    for i, container in enumerate(axes.containers):
        container.set_label(str(i))
    return list(bars(axes).values())


def timed(name: str) -> pd.DataFrame:
    frame = pd.read_parquet(H100 / "attention" / name)
    return frame[frame.error.isna()]


def test_fig6_draws_speed_ups_between_the_percentiles(records, figures, tmp_path):
    fig6.make(records, tmp_path)
    frame = timed("mac-56bc9272.parquet")
    full = frame[frame.method.eq("full") & frame.backend.str.startswith("flashinfer")].groupby(["batch", "ctx"]).time_ms.min()
    for axes, batch in zip(figures[0].axes, (1, 8, 32), strict=True):
        for rate, drawn in bars(axes).items():
            mine = frame[(frame.method == "mac") & (frame.batch == batch) & (frame.hit_rate == float(rate))].sort_values("ctx")
            peer = full[batch].loc[mine.ctx].to_numpy()
            truth = [mine.ctx, *(peer / mine[name] for name in ("time_ms", "time_p90_ms", "time_p10_ms"))]
            assert len(mine) == 4 and drawn == approx(np.column_stack(truth))


def test_fig8_draws_and_says_what_the_h100_took(records, figures, tmp_path):
    (drawn,) = fig8.make(records, tmp_path)
    frame = timed("full-b70c0136.parquet").query("method == 'match'")
    shown = 0
    for axes, batch in zip(figures[0].axes, sorted(frame.batch.unique()), strict=True):
        for layout, points in bars(axes).items():
            q_heads, kv_heads = map(int, layout.split("/"))
            mine = frame[(frame.batch == batch) & (frame.q_heads == q_heads) & (frame.kv_heads == kv_heads)].sort_values("window")
            assert points == approx(mine[["window", "time_ms", "time_p10_ms", "time_p90_ms"]].to_numpy() * [1, 1e3, 1e3, 1e3])
            shown += len(mine)
    assert shown == len(frame) == 50
    assert f"Up to {(frame.bytes_read / (frame.time_ms * 1e-3) / 1e9).max():.0f} GB/s" in drawn.caption


def test_table5_prints_what_the_h100_took(records, tmp_path):
    (drawn,) = table5.make(records, tmp_path)
    printed = drawn.frame.set_index("part")
    frame = timed("mac-c7209e7c.parquet")
    names = {"full": lambda r: f"full, {r.backend}", "mac": lambda r: f"MAC, hit {r.hit_rate_measured:.2f}", "match": lambda r: "match alone"}
    for r in frame.itertuples():
        cell = f"{1e3 * r.time_ms:.1f} [{1e3 * r.time_p10_ms:.1f}, {1e3 * r.time_p90_ms:.1f}]"
        assert printed.loc[names[r.method](r), f"{r.ctx // 1024}K"] == cell
    assert printed.size == len(frame) == 24


def test_table6_prints_shares_of_groups(records, tmp_path):
    (drawn,) = table6.make(records, tmp_path)
    printed, groups = drawn.frame.set_index("task"), traced(records, "groups")
    for task, part in [*groups.groupby("task"), ("all", groups)]:
        found, some = printed.loc[task], part[part.hit_all > 0]
        shares = (part.hit_all.sum() / part.steps.sum(), part.hit_none.sum() / part.steps.sum())
        assert (found["all heads hit"], found["no head hits"]) == tuple(f"{x:.3f}" for x in shares)
        spreads = [np.average(some[f"spread_p{q}"], weights=some.hit_all) for q in (50, 90, 99)]
        assert [float(found[f"spread, {q}%"]) for q in (50, 90, 99)] == approx(spreads, abs=0.5)
        assert (found.texts, found["groups x steps"]) == (str(part.text.nunique()), f"{part.steps.sum():,}")


def stratified(some: pd.DataFrame, column: str = "score") -> tuple[float, float]:
    """Mean over subtasks of the means over examples, and its standard error."""
    by = some.groupby("subtask")[column]
    return by.mean().mean(), np.sqrt((by.var(ddof=1) / by.size()).sum(skipna=False)) / by.ngroups


def test_table1_prints_scores_errors_and_savings(records, tmp_path):
    found, sources, _ = table1.compared(records)
    (drawn,) = table1.make(records, tmp_path)
    runs = {(s.path.parts[-3], (rows := table(s.path / "samples")).task.iloc[0], int(s.path.parts[-2]), s.apart): rows for s in sources}
    for row, printed in zip(found.itertuples(), drawn.frame.to_dict("records"), strict=False):  # below them what was not run
        rows = runs[row.model, row.task, row.ctx, row.apart]
        rows = rows[rows.error.isna() & (rows.variant == "")]
        full, mac = (rows[rows.method == m] for m in ("full", "mac"))
        for name, mine in (("full", full), ("MAC", mac)):
            mean, error = stratified(mine)
            assert printed[name] == (f"{mean:.3f}" if np.isnan(error) else f"{mean:.3f} ± {error:.3f}")
        counts = mac[["tokens_log", "tokens_phys", "tokens_log_full", "tokens_phys_full", "bytes_full", *READ]].sum()
        saved = (counts.tokens_log / counts.tokens_log_full, counts.tokens_phys / counts.tokens_phys_full, counts[READ].sum() / counts.bytes_full)
        assert [printed[f"{name} saved"] for name in ("tokens", "rows", "bytes")] == [f"{100 * (1 - ratio):.1f}%" for ratio in saved]
        some = mac[mac.hit_rate.notna()]  # others are empty answers
        assert printed["hit rate"] == f"{np.average(some.hit_rate, weights=some.decode_steps):.3f}"
        assert (printed["n"], printed["steps"]) == (str(len(mac)), f"{mac.decode_steps.sum():,}")
        against(row, mac, full)
        assert printed["difference [95%]"] == interval(row)


def against(row, mine, full) -> None:
    """Difference to full attention and its interval, of examples drawn anew within subtasks."""
    both = mine.merge(full[["subtask", "example_id", "score"]], on=["subtask", "example_id"], suffixes=("", "_full"))
    strata = [part.to_numpy() for _, part in (both.score - both.score_full).groupby(both.subtask)]
    assert row.difference == approx(np.mean([x.mean() for x in strata]))
    if any(len(x) < 2 for x in strata):
        assert np.isnan(row.difference_low)
        return
    generator = np.random.default_rng(2)
    means = np.mean([x[generator.integers(len(x), size=(4000, len(x) - 1))].mean(1) for x in strata], axis=0)
    low, high = np.quantile(means, [0.025, 0.975])
    assert (row.difference_low, row.difference_high) == approx((low, high), abs=0.1 * (high - low) + 1e-9)


def interval(row) -> str:
    """As tables print a row that ``against`` has checked; no interval of one example, or where no example differs."""
    if not row.wins and not row.losses:
        return f"{row.difference:+.3f}, none differs"
    return f"{row.difference:+.3f}" + ("" if np.isnan(row.difference_low) else f" [{row.difference_low:+.3f}, {row.difference_high:+.3f}]")


def test_fig1_draws_one_standard_error_and_the_interval(records):
    run = next(r for r in records.runs if r.name == "mac-9febb003")
    rows = fig1.in_order(records.headline(run))
    samples = table(run / "samples")
    samples = samples[samples.error.isna()]
    _, (left, right) = plt.subplots(1, 2)
    fig1.scores(left, rows, style.methods(rows.method), {})
    fig1.differences(right, rows, style.methods(rows.method))
    drawn = dict(zip(dict.fromkeys(rows.method), bars_in_order(left), strict=True))
    for method, mine in rows.groupby("method", sort=False):
        for row, (_, mean, low, high) in zip(mine.itertuples(), drawn[method], strict=True):
            truth, error = stratified(samples[(samples.method == method) & (samples.variant == row.variant)])
            assert (mean, low, high) == approx((truth, truth - error, truth + error))
    full = samples[samples.method == "full"]
    for place, row in enumerate(rows.itertuples()):
        if row.method != "full" and place % 5 == 1:
            against(row, samples[(samples.method == row.method) & (samples.variant == row.variant)], full)
            line = right.lines[2 * place].get_xdata()
            assert tuple(line) == (row.difference_low, row.difference_high)
    plt.close("all")


def test_table2_3_prints_the_records(records, tmp_path):
    numbers, run = table2_3.numbers(records)
    assert run == BEST
    (drawn,) = table2_3.make(records, tmp_path)
    samples, times = table(run / "samples"), pd.read_parquet(H100 / "step_times.parquet").query("ctx == 8192")
    samples = samples[samples.error.isna()]
    full, alone = samples[samples.method == "full"], times[times.method == "full"].ms.median()
    assert len(drawn.frame) == len(numbers) == samples.groupby(["method", "variant"]).ngroups
    for printed in drawn.frame.to_dict("records"):
        budget = printed["variant"].removeprefix("at ").split(":")[0] if printed["variant"].startswith("at ") else ""
        (variant,) = {
            v for v in samples[samples.method == printed["method"]].variant if (f"budget={budget} " in f"{v} " if budget else "budget=" not in v)
        }
        mine = samples[(samples.method == printed["method"]) & (samples.variant == variant)]
        mean, error = stratified(mine)
        assert printed["score"] == f"{mean:.3f} ± {error:.3f}"
        assert printed["rho_bytes"] == f"{mine[READ].sum().sum() / mine.bytes_full.sum():.3f}"
        assert (printed["n"], printed["steps"]) == (str(len(mine)), f"{mine.decode_steps.sum():,}")
        ms = times[(times.method == printed["method"]) & (times.budget == budget)].ms.median()
        assert (printed["ms/step"], printed["/ full"]) == (f"{ms:.2f}", f"{ms / alone:.2f}")
        if printed["method"] != "full":
            (row,) = numbers[(numbers.method == printed["method"]) & (numbers.variant == variant)].itertuples()
            against(row, mine, full)
            assert printed["difference [95%]"] == interval(row)
            agree = 100 * mine.groupby("subtask").top1_agreement.mean().mean()
            assert f"{fig1.named(printed['method'], variant)} {agree:.1f}%" in drawn.caption


def test_drift_is_of_tokens_bytes_hits_and_chains(records):
    run = next(r for r in records.runs if r.parts[-4] == "longgenbench_16k")
    steps = table(run / "steps").query("method == 'mac' and variant == ''")
    steps = steps.assign(first=steps.step // 250 * 250, text=steps.subtask + "/" + steps.example_id, read=steps[READ].sum(axis=1))
    numbers = long_texts.numbers(records, run)
    assert len(numbers) == 4 * 16
    for found in numbers.iloc[::9].itertuples():
        mine = steps[(steps.text == found.text) & (steps["first"] == found.first)]
        truth = (
            mine.tokens_log.sum() / mine.tokens_log_full.sum(),
            mine.read.sum() / mine.bytes_full.sum(),
            mine.hit_rate.mean(),
            mine.chain_mean.mean(),
        )
        assert (found.rho_log, found.rho_bytes, found.hit_rate, found.chain_mean) == approx(truth, nan_ok=True)


def test_methods_print_times_and_bytes(records, tmp_path):
    (drawn,) = methods.make(records, tmp_path)
    frame = pd.read_parquet(H100 / "attention" / "methods.parquet").set_index("method")
    some = drawn.frame[drawn.frame.machine == "H100"] if "machine" in drawn.frame else drawn.frame
    assert set(some.method) == set(frame.index)
    for printed in some.to_dict("records"):
        r = frame.loc[printed["method"]]
        told = ("rho_bytes", "ms per layer", "/ full", "bytes / copy bandwidth, ms")
        if pd.notna(r.time_ms):
            numbers = (
                f"{r.rho_bytes:.3f}",
                f"{r.time_ms:.3f}",
                f"{r.time_ms / frame.time_ms['full']:.2f}",
                f"{1e3 * r.bytes_counted / r.copy_bandwidth:.3f}",
            )
            assert tuple(printed[name] for name in told) == numbers
        else:
            assert {printed[name] for name in told} == {"–"} and printed["note"]


def test_table7_prints_bytes_of_one_request(records, tmp_path):
    (drawn,) = table7.make(records, tmp_path)
    frame = pd.read_parquet(H100 / "decode" / "llama31_8b.parquet").query("method == 'mac'")
    per = frame.assign(kv=frame.kv_bytes / frame.batch, state=frame.state_bytes / frame.batch).groupby("ctx")[["kv", "state"]].min()
    (longest,) = drawn.frame[drawn.frame.model.str.startswith("llama31_8b") & (drawn.frame.ctx == "127K")].to_dict("records")
    kv, state = per.loc[130048]
    printed = (longest["KV cache, GB"], longest["rings, GB"], longest["rings / KV cache"])
    assert printed == (f"{kv / 1e9:.2f}", f"{state / 1e9:.3f}", f"{100 * state / kv:.1f}%")


def test_shares_of_chains_heat_and_drift_are_drawn_as_counted(records, figures, tmp_path):
    chains.make(records, tmp_path)
    fig5.make(records, tmp_path)
    run = next(r for r in records.runs if r.parts[-4] == "longgenbench_16k")
    numbers = long_texts.numbers(records, run)
    long_texts.drift(records, run, numbers, tmp_path)
    chain, _, heat, drift = (figure.axes for figure in figures)
    hits = traced(records, "chains").query("depth_low > 0").groupby("depth_low")["count"].sum()
    assert [bar.get_height() for bar in chain[1].patches] == approx((hits / hits.sum()).tolist())
    rates = traced(records, "acceptance").query("window == 512").assign(rate=lambda f: f.hits / f.steps).groupby(["tau", "layer", "head"]).rate.mean()
    panels = [axes for axes in heat if axes.get_title()]
    for axes in panels:
        tau = float(axes.get_title().removeprefix("tau = "))
        assert np.asarray(axes.images[0].get_array()) == approx(rates[tau].unstack().to_numpy())
    assert len(panels) == 3
    for axes, column in zip(drift, ("hit_rate", "rho_bytes", "chain_mean", "rho_log"), strict=True):
        for line in axes.lines:
            assert line.get_ydata() == approx(numbers[numbers.text == line.get_label()][column].to_numpy(), nan_ok=True)
        assert len(axes.lines) == 4
