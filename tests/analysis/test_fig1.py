"""Score against bytes: drawn from what is in the repository, and no point hides another."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from analysis import fig1, style
from analysis.records import Missing, Source
from macbench.cli import CONF
from macbench.summary import headline, summarise
from tests.test_summary import row


@pytest.mark.parametrize("methods", [["quest"], ["full", "quest", "snapkv"]])
def test_without_full_attention_or_intervals(methods, tmp_path):
    """One example of one subtask: no standard error, no interval."""
    facts = {"task": "ruler", "model": "tiny", "ctx": 512, "device": "cpu", "commit": "unknown"}
    frame = pd.DataFrame([row(m, "vt", 0, 0.5, **facts) for m in methods])
    drawn = fig1.picture(frame, headline(summarise(frame)), Source(Path("made"), {"device": "cpu"}), "made", tmp_path, {"chance": 0.25})
    assert [file.suffix for file in drawn.files] == [".png", ".pdf"] and all(file.stat().st_size > 1000 for file in drawn.files)
    assert "1 examples of vt" in drawn.caption and "Paper:" in drawn.caption


def test_full_attention_alone_is_no_comparison(tmp_path):
    class Alone:
        runs = (tmp_path / "ruler" / "tiny" / "512" / "full-1",)

        def samples(self, run):
            return pd.DataFrame([row("full", "vt", i, 0.5) for i in range(3)])

        def headline(self, run):
            return headline(summarise(self.samples(run)))

    with pytest.raises(Missing, match="no run compares methods"):
        fig1.make(Alone(), tmp_path)


def test_equal_ratios_stand_side_by_side():
    rho = pd.Series([0.1, 1.0, 0.1001, 0.2, 0.0999])
    drawn = fig1.side_by_side(rho)
    assert drawn[0] < drawn[2] < drawn[4]  # in the order of the rows
    assert drawn[1] == pytest.approx(1) and drawn[3] == pytest.approx(0.2)
    assert drawn[2] == pytest.approx(0.1, rel=2e-3)


def test_a_method_looks_the_same_in_whatever_company():
    known = [path.stem for path in (CONF / "method").glob("*.yaml")]
    everyone = style.methods(known)
    for some in (["full", "mac", "quest"], ["quest", "snapkv", "mine"], known[::3]):
        found = style.methods(some)
        assert all(found[name] == everyone[name] for name in set(some) & set(known))
    shown = [(look["marker"], look["color"], str(look["linestyle"])) for look in everyone.values()]
    assert len(set(shown)) == len(known) == len({look["marker"] for look in everyone.values()} - {"o"}) + 2  # full and mac: hollow and filled
    others = style.methods([*known, "mine", "yours"])
    taken = {look["marker"] for name, look in everyone.items()}
    assert others["mine"]["marker"] != others["yours"]["marker"] and not {others["mine"]["marker"], others["yours"]["marker"]} & taken

    def grey(name):
        return np.dot(to_rgb(everyone[name]["color"]), (0.299, 0.587, 0.114))

    assert abs(grey("mac") - grey("quest")) > 0.12 and everyone["mac"]["marker"] != everyone["quest"]["marker"]
