"""The tables at the end of a run, from made-up sample rows and from the reference run."""

import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest

from macbench import merge, report, stats
from macbench.counting import TOTALS
from macbench.summary import COLUMNS, headline, summarise
from macbench.tables import format_summary, format_table
from macbench.tasks.longbench_v2 import LongBenchV2

REFERENCE = Path(__file__).parent.parent / "runs/reference/cpu/ruler/smollm2/4096"


def row(method: str, subtask: str, index: int, score: float | None, **more) -> dict:
    steps = 10
    counts = dict.fromkeys(TOTALS, 0) | {"tokens_log": 25 * steps, "tokens_phys": 50 * steps, "bytes_kv": 100 * steps}
    counts |= {"tokens_log_full": 100 * steps, "tokens_phys_full": 100 * steps, "bytes_full": 400 * steps}
    row = {"method": method, "variant": "", "subtask": subtask, "example_id": str(index), "score": score, "error": None, "decode_steps": steps}
    row |= {"decode_s": 0.2, "prefill_s": 1.0, "hit_rate": None, "top1_agreement": None, "kl_mean": None, "meta": "{}"}
    return row | counts | more


SCORES = {  # method, subtask: scores of examples 0, 1, ...
    ("full", "one"): [1, 1, 0, 1],
    ("full", "two"): [0.5, 1.0, 0.25],
    ("quest", "one"): [1, 0, 0, 1],
    ("quest", "two"): [0.75, 1.0, 0.5],
}


@pytest.fixture
def samples() -> pd.DataFrame:
    return pd.DataFrame([row(method, subtask, i, s) for (method, subtask), scores in SCORES.items() for i, s in enumerate(scores)])


def pick(table: pd.DataFrame, method: str, subtask: str) -> pd.Series:
    (found,) = table[(table.method == method) & (table.subtask == subtask)].itertuples()
    return found


def test_a_row_per_subtask_and_one_for_all(samples):
    table = summarise(samples)
    assert list(zip(table.method, table.subtask, strict=True)) == [(m, s) for m in ("full", "quest") for s in ("one", "two", "all")]
    one, whole = pick(table, "quest", "one"), pick(table, "quest", "all")
    assert (one.score, one.difference, one.wins, one.losses, one.ties) == (0.5, -0.25, 0, 1, 3)
    assert one.mcnemar_p == 1 and math.isnan(pick(table, "quest", "two").mcnemar_p) and math.isnan(whole.mcnemar_p)
    assert (whole.examples, whole.wins, whole.losses, whole.ties) == (7, 2, 1, 4)
    assert whole.difference == pytest.approx((-0.25 + 0.5 / 3) / 2) and whole.difference_low < whole.difference < whole.difference_high
    assert whole.score == pytest.approx((0.5 + 0.75) / 2)
    assert whole.score_se == pytest.approx(stats.standard_error([samples.score[7:11], samples.score[11:]]))
    assert (whole.rho_log, whole.rho_phys, whole.rho_bytes, whole.ms_per_token, whole.steps) == (0.25, 0.5, 0.25, pytest.approx(20), 70)
    assert math.isnan(pick(table, "full", "all").difference)


def test_only_examples_that_both_finished_are_compared(samples):
    samples.loc[(samples.method == "full") & (samples.example_id == "0"), ["error", "score"]] = ["RuntimeError: no", None]
    whole = pick(summarise(samples), "quest", "all")
    assert (whole.examples, whole.wins + whole.losses + whole.ties) == (7, 5)
    assert whole.difference == pytest.approx((-1 / 3 + 0.25 / 2) / 2)
    assert summarise(samples[samples.method == "quest"]).difference.isna().all()  # nothing to compare with


def test_order_of_rows_changes_no_number(samples):
    mixed = summarise(samples.sample(frac=1, random_state=1)).sort_values(["method", "subtask"], ignore_index=True)
    pd.testing.assert_frame_equal(mixed, summarise(samples).sort_values(["method", "subtask"], ignore_index=True))


def test_fidelity_is_averaged_like_scores(samples):
    samples["top1_agreement"] = [None] * 7 + [1.0, 0.5, 0.5, 1.0, 0.25, 0.25, None]
    assert pick(summarise(samples), "quest", "all").top1_agreement == pytest.approx((0.75 + 0.25) / 2)
    assert "top1" in format_summary(summarise(samples)) and "KL" not in format_summary(summarise(samples)).split("\nscore:")[0]


def test_guesses_stand_in_every_table():
    answers = "CCAB"
    rows = [row(m, "zero_shot", i, float(i == 0), meta=json.dumps({"answer": a})) for m in ("quest", "full") for i, a in enumerate(answers)]
    samples = pd.DataFrame(rows)
    table = summarise(samples, LongBenchV2.guesses(samples))
    assert table[["method", "score"]].to_numpy().tolist() == [["quest", 0.25], ["full", 0.25], ["chance", 0.25], ["always C", 0.5]]
    assert table.errors.sum() == 0 and table.examples.tolist() == [4] * 4
    for text in format_summary(table).split("\n\n"):
        assert "chance" in text and "always C" in text


def test_the_best_constant_answer_of_all_questions_is_c():
    """Answers of the whole data set: A 96, B 127, C 148, D 132."""
    meta = [json.dumps({"answer": a}) for a, n in zip("ABCD", (96, 127, 148, 132), strict=True) for _ in range(n)]
    frame = pd.DataFrame({"example_id": [str(i) for i in range(503)], "meta": meta})
    assert LongBenchV2.guesses(pd.concat([frame, frame])) == {"chance": 0.25, "always C": 148 / 503}
    assert f"{148 / 503:.3f}" == "0.294"


def test_printed(samples):
    text = format_summary(summarise(samples))
    lines = text.splitlines()
    quest = next(line for line in lines[9:] if "quest" in line)
    assert "0.625 ± 0.161" in quest and "-0.042 [" in quest and "2/1/4" in quest
    assert " p " not in lines[8] and "hit_rate" not in text and "variant" not in text
    assert text.splitlines()[-1].endswith("in bytes") and max(map(len, lines)) <= 150
    assert " p " in lines[0] and [line.split()[6] for line in lines[1:7]] == ["-", "-", "-", "1.000", "-", "-"]  # right or wrong in one subtask alone
    alone = summarise(samples[(samples.method == "quest") & (samples.subtask == "one")])
    assert format_summary(alone) == format_table(alone)  # one row says it all


def test_the_reference_run_is_what_its_rows_say():
    for run in REFERENCE.iterdir():
        table = report.recomputed(run)
        kept = [dict.fromkeys(COLUMNS) | row for row in json.loads((run / "summary.json").read_text())]  # older ones have fewer columns
        assert kept == json.loads(table.to_json(orient="records", indent=1))
        assert not headline(table).empty


def test_a_summary_made_anew_is_the_reference_runs_own(tmp_path):
    """What was asked is listed there in another order than the protocol has."""
    (reference,) = REFERENCE.iterdir()
    run = shutil.copytree(reference, tmp_path / reference.relative_to(REFERENCE.parents[2]))
    asked = json.loads((run / "asked.json").read_text())
    (run / "asked.json").write_text(json.dumps(asked | {"examples": dict(sorted(asked["examples"].items()))}))
    kept = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()
    merge.summary(run)
    made = json.loads((run / "summary.json").read_text())
    assert [(r["method"], r["subtask"], r["score"]) for r in made] == [(r["method"], r["subtask"], r["score"]) for r in kept]


def test_rows_over_all_subtasks_alone_are_the_same_rows():
    samples = pd.DataFrame([row(m, s, i, i % 2) for m in ("full", "mac") for s in ("vt", "cwe") for i in range(4)])
    whole = summarise(samples)
    pd.testing.assert_frame_equal(summarise(samples, each=False), whole[whole.subtask == "all"].reset_index(drop=True))
