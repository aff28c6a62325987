"""Scores against the length of the context, on the reference run's rows under other lengths and scores."""

from pathlib import Path

import numpy as np
import pytest

from analysis import contexts
from analysis.load import samples
from analysis.records import Missing, Records, Source

RUN = next((Path(__file__).parents[2] / "runs/reference/cpu/ruler/smollm2/4096").iterdir())
FACTS = {"device": "cpu", "protocol": {"subtasks": ["vt", "cwe", "fwe"]}}


class Made(Records):
    """The reference run at several lengths: at ``ctx`` every score is that times ctx / 4096, cut at 1."""

    def __init__(self, *lengths: int):
        super().__init__()
        self.runs = [Path(str(ctx)) for ctx in lengths]

    def samples(self, run):
        frame = samples(RUN)
        frame = frame[frame.subtask.isin(FACTS["protocol"]["subtasks"])]
        return frame.assign(ctx=int(str(run)), score=np.minimum(1, frame.score * int(str(run)) / 4096))

    def source(self, run):
        return Source(run, FACTS)


def test_numbers_and_files(tmp_path):
    records = Made(16384, 4096, 8192)
    (runs,) = contexts.longest(records).values()
    assert list(runs) == [4096, 8192, 16384]
    found = contexts.numbers(runs).set_index(["method", "subtask", "ctx"])
    raw = records.samples(Path("8192"))
    for method in ("full", "mac"):
        mine = raw[raw.method == method]
        vt = mine[mine.subtask == "vt"].score
        row = found.loc[method, "vt", 8192]
        assert (row.score, row.se, row.examples) == (pytest.approx(vt.mean()), pytest.approx(vt.std() / len(vt) ** 0.5), len(vt))
        assert row.low <= row.score <= row.high
        assert found.loc[method, "all", 8192].score == pytest.approx(mine.groupby("subtask").score.mean().mean())

    drawn = contexts.make(records, tmp_path)
    assert [d.name.removeprefix("contexts-ruler-smollm2") for d in drawn] == ["", "-full", "-methods"]
    assert all(file.stat().st_size > 300 for d in drawn for file in d.files)
    card = drawn[1].frame
    assert card.columns.tolist() == ["subtask", "4K", "8K", "16K"] and card.subtask.tolist() == ["all", "vt", "cwe", "fwe"]
    row = found.loc["full", "vt", 8192]
    assert card["8K"][1] == f"{row.score:.2f} ± {row.se:.2f} ({row.examples:.0f})"


def test_what_lacks(monkeypatch):
    with pytest.raises(Missing, match="at 3 contexts"):
        contexts.longest(Made(4096, 8192))
    records = Made(4096, 8192, 16384)
    whole = records.samples
    monkeypatch.setattr(records, "samples", lambda run: whole(run) if str(run) != "8192" else whole(run)[lambda frame: frame.subtask != "vt"])
    (runs,) = contexts.longest(records).values()
    numbers = contexts.numbers(runs)
    assert contexts.lacking(numbers, ["vt", "cwe", "fwe"]) == " No mean at 8K (without vt)."
    assert contexts.shown(numbers, "method", ["mac"], [4096, 8192]).columns.tolist() == ["method", "4K", "8K"]
    found = contexts.shown(numbers, "subtask", ["all", "vt", "cwe"], list(runs))
    assert found["8K"].tolist()[:2] == ["–", "–"] and "±" in found["8K"][2]


def test_the_probes_card_holds_what_the_reference_runs_say():
    """Scores of full attention by task and length, as make figures writes them."""
    root = Path(__file__).parents[2]
    (runs,) = contexts.longest(Records(root / "runs/reference/h100/ruler/smollm2_128k")).values()
    runs = {ctx: (frame[frame.method == "full"], source) for ctx, (frame, source) in runs.items()}
    table = contexts.shown(contexts.numbers(runs), "subtask", ["all", *contexts.order(runs)], list(runs))
    card = (root / "docs/smollm2_128k.md").read_text()
    assert all(f"| {' | '.join(row)} |" in card for row in table.to_numpy().tolist()) and len(table) == 14
