"""Two trainings compared by their runs' scores."""

import json
from pathlib import Path

import pandas as pd
import pytest

from macbench.errors import ConfigError
from macbench.probe import compare

REFERENCE = Path(__file__).parents[2] / "runs/reference/cpu/ruler/smollm2/4096"


def made(**scores: list[float]) -> pd.Series:
    rows = {("ruler", 4096, subtask, str(i)): score for subtask, each in scores.items() for i, score in enumerate(each)}
    return pd.Series(rows).rename_axis(["task", "ctx", "subtask", "example_id"])


def test_verdicts():
    ours = made(same=[1, 0, 1, 1], one=[1] * 25, worse=[1] * 25, only=[1, 1])
    theirs = made(same=[1, 0, 1, 1], one=[1] * 24 + [0], worse=[1] * 15 + [0] * 10, other=[0])
    found = compare.compare(ours, theirs).set_index("subtask")
    assert found.verdict.to_dict() == {"same": "within", "one": "within", "worse": "OUTSIDE"}
    assert found.loc["worse", ["n", "first", "second", "difference"]].tolist() == [25, 1, 0.6, pytest.approx(-0.4)]
    # 10 of 25 differences are -1: the interval of the mean is about 0.4 +- 1.96 * sqrt(0.4 * 0.6 / 25)
    assert found.loc["worse", "low"] == pytest.approx(-0.59, abs=0.04) and found.loc["worse", "high"] == pytest.approx(-0.21, abs=0.04)
    # 3 of 25 differ, and (22/25)**25 = 4% of the resamples have none of these: the interval begins at 0, here a rounding above it
    edge = compare.compare(made(cwe=[0.3] * 25), made(cwe=[0.1 + 0.2] * 22 + [0.9] * 3))
    assert 0 < edge.low[0] < 1e-15 and edge.difference[0] * 25 > 1 and edge.verdict[0] == "within"
    with pytest.raises(ConfigError, match="no example in common"):
        compare.compare(made(a=[1]), made(b=[1]))


def test_command(capsys, tmp_path):
    assert compare.main([str(REFERENCE), str(REFERENCE.parent)]) == 0
    out = capsys.readouterr().out
    assert out.count("within") == 13 + 1 and "13 of 13 within; 0.7 expected outside" in out and "niah_multivalue" in out
    assert compare.main([str(REFERENCE)]) == 2 and compare.main([str(REFERENCE), str(tmp_path)]) == 2
    for model in ("a", "b"):
        (tmp_path / model / "4096" / "full-0" / "samples").mkdir(parents=True)
        (tmp_path / model / "4096" / "full-0" / "environment.json").write_text("{}")
    assert compare.main([str(REFERENCE), str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[1:2] == [f"macbench: RUN={tmp_path}: holds no finished example of full attention"]
    assert error[2:] == [f"macbench: RUN={tmp_path}: holds runs of several models (a, b); name the folder of one"]


def test_two_adapters_of_one_model_are_never_pooled(tmp_path):
    for name in ("a", "b"):
        run = tmp_path / "ruler/probe/4096" / f"full-{name}"
        (run / "samples").mkdir(parents=True)
        (run / "environment.json").write_text(json.dumps({"model_sha256": name * 64}))
    with pytest.raises(ConfigError, match=r"several adapters \(aaaaaaaa, bbbbbbbb\)"):
        compare.scores(tmp_path)
