"""Tables over runs that compare methods: shares from rows, and that the documentation holds what the reference runs say."""

from pathlib import Path

import pandas as pd
import pytest

from analysis import equal_bytes, load, questions, sanity, step_times
from macbench.counting import TOTALS
from macbench.errors import ConfigError

ROOT = Path(__file__).parent.parent


def rows(ctx, method, variant, scores):
    facts = {"subtask": "a", "error": None, "prefill_s": 1.0, "decode_s": 1.0, "decode_steps": 1, "hit_rate": None, "ctx": ctx}
    counts = dict.fromkeys(TOTALS, 1)
    return [{"method": method, "variant": variant, "score": score, "example_id": str(i)} | facts | counts for i, score in enumerate(scores)]


def test_shares_are_of_full_attention_by_context_and_budget(monkeypatch):
    made = [
        *rows(4096, "full", "", [1.0, 0.5]),
        *rows(4096, "snapkv", "budget=0.25 capacity=1000", [0.5, 0.25]),
        *rows(4096, "snapkv", "budget=0.1 capacity=400", [0.0, 0.3]),
        *rows(8192, "full", "", [0.4]),
        *rows(8192, "kivi", "", [0.3]),
    ]
    monkeypatch.setattr(load, "samples", lambda folder: pd.DataFrame(made))
    found = sanity.kept([Path("run")])
    assert found[4096].dropna().to_dict() == {("snapkv", "0.25"): 0.5, ("snapkv", "0.1"): pytest.approx(0.2)}
    assert found[8192].dropna().to_dict() == {("kivi", ""): pytest.approx(0.75)}
    text = sanity.table([Path("run")]).splitlines()
    assert next(line for line in text if "`snapkv`" in line).endswith("| 0.20 at 0.1, 0.50 at 0.25 | - |")
    assert len(text) == 2 + len(sanity.PUBLISHED)


def test_the_documentation_holds_what_the_reference_runs_say(monkeypatch):
    """The commands analysis.sanity, equal_bytes, equal_bytes --full and questions write the tables that belong there."""
    folders = load.run_folders(ROOT / load.RUNS)
    alone = [load.swept(samples) or not load.compares(samples) for samples in map(load.samples, folders)]
    assert any(alone) and not all(alone)  # what compares nothing lies beside the runs and is left out
    tables = load.measured(folders)
    for module in (sanity, equal_bytes):
        monkeypatch.setattr(module, "measured", lambda folders: tables)
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/equal_bytes.md").read_text()
    assert sanity.table(folders) in (ROOT / "docs/methods.md").read_text()
    assert equal_bytes.short(folders) in (ROOT / "README.md").read_text()
    assert page.rstrip().endswith(equal_bytes.full(folders, step_times.recorded(equal_bytes.REFERENCE_TIMES)))
    assert questions.tables(folders, load.run_folders("runs/reference/h100/asked")) in page


def test_sweeps_are_left_out_and_runs_of_one_length_are_never_pooled(monkeypatch):
    runs = {
        "sweep": [*rows(4096, "full", "", [0.0]), *(row for tau in range(4) for row in rows(4096, "mac", f"tau={tau}", [0.0]))],
        "one": [*rows(4096, "full", "", [1.0]), *rows(4096, "snapkv", "budget=0.1 capacity=400", [0.5])],
        "two": [*rows(4096, "full", "", [0.2]), *rows(4096, "quest", "budget=0.1 budget=9", [0.5])],
        "alone": rows(4096, "full", "", [0.3]),
        "unfitted": [*rows(4096, "full", "", [0.4]), *rows(4096, "quest", "", [0.5])],
    }
    monkeypatch.setattr(load, "samples", lambda folder: pd.DataFrame(runs[folder.name]))
    for beside in (["sweep"], ["alone", "unfitted"]):
        found = equal_bytes.measured([Path("one"), *map(Path, beside)])
        assert found[4096].set_index(["method", "variant"]).score.to_dict() == {("full", ""): 1.0, ("snapkv", "0.1"): 0.5}
    assert equal_bytes.measured([Path("unfitted")])[4096].score.tolist() == [0.4, 0.5]
    with pytest.raises(ConfigError, match="RUNS_DIR=alone: has no run that compares methods"):
        equal_bytes.measured([Path("alone")])
    with pytest.raises(ConfigError, match="RUNS_DIR=two: has ctx=4096, as one has"):
        equal_bytes.measured([Path("one"), Path("two")])


def test_every_method_has_a_line():
    named = {path.stem for path in (ROOT / "conf/method").glob("*.yaml")}
    assert set(sanity.PUBLISHED) <= named and named - set(sanity.PUBLISHED) == {"full", "mac", "oracle_topk"}
