"""What a training writes of its answers, and the tables made of it."""

import json
from pathlib import Path
from statistics import NormalDist, mean, stdev
from types import SimpleNamespace

import numpy as np
import pytest

from macbench.probe import learnt
from macbench.probe.progress import ANSWERS, LOG, Report

FAMILIES = ("text", "vt")
REFERENCE = Path(__file__).parents[2] / "runs/reference/h200/probe"


def trained(folder: Path, answers: list[tuple[float, int, list]]) -> Path:
    """A folder that a training wrote to: (progress, length, answers as (family, first, right)) of every step, a table after the last."""
    folder.mkdir()
    report = Report(folder, FAMILIES, append=False)
    for i, (progress, length, asked) in enumerate(answers):
        family, first, right = (np.array(x) for x in zip(*asked, strict=True))
        batch = SimpleNamespace(first=first.astype(bool), family=family)
        report.step(step=i, progress=progress, length=length, seconds=1.0, loss=0.5, norm=1.0, batches=[batch], right=right)
        if progress == 0.5:
            report.show()
    report.close()
    return folder


def test_only_the_end_counts_and_first_questions_by_family(tmp_path, capsys):
    early = (0.5, 64, [(0, 1, 0), (1, 1, 0)])
    steps = [(0.7, 64, [(0, 1, 1), (0, 0, 1), (1, 1, 0), (1, 0, 0)]), (0.9, 64, [(0, 1, 1)]), (0.95, 128, [(1, 1, 1), (1, 0, 0)])]
    found = trained(tmp_path / "a", [early, *steps])
    (row, longer) = learnt.by_length([found]).to_dict("records")
    assert (row["length"], row["steps 1"], row["exact 1"]) == (64, 2, pytest.approx(0.75)) and row["se 1"] == pytest.approx(0.25)
    assert (longer["length"], longer["steps 1"], longer["exact 1"]) == (128, 1, 0.5)
    assert learnt.by_family([found]).values.tolist() == [["text", "2/2", "–"], ["vt", "0/1", "1/1"]]
    assert [json.loads(line)["exact"] for line in (found / ANSWERS).read_text().splitlines()] == [0, 0, 1, 0, 0.5]
    assert learnt.main([str(found)]) == 0 and "2/2" in capsys.readouterr().out

    assert learnt.main([]) == 2 and learnt.main([str(tmp_path)]) == 2
    (found / LOG).write_text('{"step": 0}\n')
    assert learnt.main([str(found)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line[:9] for line in lines] == ["macbench:"] * 3 and f"FOLDER={tmp_path}" in lines[1]


def test_the_records_of_two_seeds_by_hand():
    """Against plain sums over the lines, and the normal approximation of the difference."""
    folders = [REFERENCE / "seed1", REFERENCE / "seed2"]
    logs = [[json.loads(line) for line in (folder / LOG).read_text().splitlines()] for folder in folders]
    table = learnt.by_length(folders).set_index("length")
    assert list(table.index) == [2**i for i in range(12, 18)]
    for length, row in table.iterrows():
        shares = [[line["exact"] for line in log if line["length"] == length and line["progress"] >= 0.6] for log in logs]
        for i, share in enumerate(shares, 1):
            assert row[f"steps {i}"] == len(share) and row[f"exact {i}"] == pytest.approx(mean(share))
            assert row[f"se {i}"] == pytest.approx(stdev(share) / len(share) ** 0.5)
        wide = NormalDist().inv_cdf(0.975) * sum(stdev(share) ** 2 / len(share) for share in shares) ** 0.5
        assert row["difference"] == pytest.approx(mean(shares[1]) - mean(shares[0]))
        assert (row.high - row.low) / 2 == pytest.approx(wide, rel=0.1) and row.low < row.difference < row.high
