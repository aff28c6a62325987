"""Figures are drawn from what is in the repository, and no point hides another."""

import pandas as pd
import pytest

from analysis import figures
from tests.test_summary import REFERENCE, row


def test_the_reference_run_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "OUT", tmp_path)
    assert figures.main([str(REFERENCE)]) == 0
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".pdf", ".png"]
    assert figures.main([str(tmp_path)]) == 2 and "no runs" in capsys.readouterr().err


@pytest.mark.parametrize("methods", [["quest"], ["full", "quest", "snapkv"]])
def test_without_full_attention_or_intervals(methods, tmp_path, monkeypatch):
    """One example of one subtask: no standard error, no interval."""
    monkeypatch.setattr(figures, "OUT", tmp_path)
    facts = {"task": "ruler", "model": "tiny", "ctx": 512, "device": "cpu", "commit": "unknown"}
    frame = pd.DataFrame([row(m, "vt", 0, 0.5, **facts) for m in methods])
    for file in figures.accuracy_against_bytes(frame, "made", {"chance": 0.25}):
        assert file.stat().st_size > 1000


def test_equal_ratios_stand_side_by_side():
    rho = pd.Series([0.1, 1.0, 0.1001, 0.2, 0.0999])
    drawn = figures.side_by_side(rho)
    assert drawn[0] < drawn[2] < drawn[4]  # in the order of the rows
    assert drawn[1] == pytest.approx(1) and drawn[3] == pytest.approx(0.2)
    assert drawn[2] == pytest.approx(0.1, rel=2e-3)
