"""Both protocols of questions on real runs of a tiny model: what the tables say of them, and what a step takes."""

import shutil

import pandas as pd
import pyarrow.parquet as pq
import pytest

from analysis import equal_bytes, questions, step_times
from analysis.load import run_folders
from macbench.errors import ConfigError
from tests.test_cli import macbench, tiny_args, tiny_model  # noqa: F401


def test_protocols_side_by_side_and_the_times_of_steps(macbench, tiny_args, tmp_path, capsys):  # noqa: F811
    args = [*tiny_args, "method=snapkv", "compare=[full,tova]", "budget=[0.25,0.5]", "expect=4", "batch=2", "limit=2", "follow=0"]
    for value in ("true", "false"):
        code, _, err = macbench(*args, f"question_in_prefill={value}")
        assert code == 0, err
        (run,) = (tmp_path / "runs").rglob("snapkv-*")
        shutil.move(run, tmp_path / value / "ruler" / "tiny" / "512" / run.name)

    questions.main([str(tmp_path / "true"), str(tmp_path / "false")])
    title, _, head, _, *rows = capsys.readouterr().out.splitlines()
    assert title == "### 0K, 2 examples of niah_single_1" and head.count("|") == 10
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    names = [("snapkv", "0.25"), ("snapkv", "0.5"), ("full", ""), ("tova", "0.25"), ("tova", "0.5")]
    assert [(row[0], row[1]) for row in cells] == names
    for row in cells:
        scores = [float(row[i].split()[0]) for i in (2, 5)]
        assert float(row[8].split()[0]) == pytest.approx(scores[1] - scores[0], abs=1e-3)

    file = tmp_path / "step_times.parquet"
    step_times.main([str(tmp_path / "true"), f"out={file}"])
    table = pd.read_parquet(file)
    found = step_times.medians(table)
    assert list(found.index) == [(512, *name) for name in names] and set(table.batch) == {2} and b"macbench" in pq.read_schema(file).metadata
    (run,) = run_folders(tmp_path / "true")
    rows = pd.concat(map(pd.read_parquet, (run / "samples").glob("*.parquet")))
    mine = rows[(rows.method == "tova") & rows.variant.str.contains("budget=0.25")].set_index("example_id")
    kept = table[(table.method == "tova") & (table.budget == "0.25")].set_index("example_id")
    assert kept.ms.to_dict() == mine.tpot_ms.to_dict() and kept.steps.to_dict() == mine.decode_steps.to_dict() and len(kept) == 2
    assert found[512, "tova", "0.25"] == pytest.approx(sum(mine.tpot_ms) / 2)  # the median of two
    (line,) = (line for line in equal_bytes.full([run], found * 0 + 7).splitlines() if line.startswith("| tova | 0.25 |"))
    assert line.split("|")[10].strip() == "7.00"
    with pytest.raises(ConfigError, match="is in two runs"):
        step_times.measured([run, run])
