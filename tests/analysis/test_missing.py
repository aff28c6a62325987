"""What is missing is named in one line, and the rest is drawn."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from analysis import contexts, fig1, fig2, fig4, fig6, fig8, figures, long_texts, page, sweep, table2_3, table4, table7
from analysis.records import Missing, Records, Source
from analysis.style import Drawn
from macbench import report
from macbench.errors import ConfigError
from tests.analysis.test_numbers import REFERENCE


@pytest.fixture
def runs(tmp_path) -> Path:
    """Copies of some reference records that a test may spoil."""
    trace = Records(REFERENCE).trace.path
    shutil.copytree(trace, tmp_path / "runs" / "trace" / "smollm2" / "8192" / "trace-1")
    shutil.copytree(REFERENCE / "h100" / "decode", tmp_path / "runs" / "decode")
    (run,) = (REFERENCE / "cpu" / "ruler" / "smollm2" / "4096").iterdir()
    shutil.copytree(run, tmp_path / "runs" / "ruler" / "smollm2" / "4096" / run.name)
    return tmp_path / "runs"


def drawn(runs: Path, *items) -> dict[str, str]:
    """Lack ('' if drawn) of each figure by the start of its name."""
    return {item.name.split("-")[0]: item.lack for item in figures.draw(Records(runs), runs.parent / "out", items)}


def test_a_file_of_a_trace(runs):
    (runs / "trace/smollm2/8192/trace-1/gaps.parquet").unlink()
    lacks = drawn(runs, fig2, fig4)
    assert "gaps.parquet is not there" in lacks["fig2"] and lacks["fig4"] == ""


def test_a_column(runs):
    path = runs / "trace/smollm2/8192/trace-1/amend.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["error_p99"]), path)
    part = next((runs / "ruler").rglob("samples/part-*.parquet"))
    pq.write_table(pq.read_table(part).drop_columns(["score"]), part)
    lacks = drawn(runs, fig1, fig2, fig4, sweep, table2_3)
    assert all("samples has no column score" in lacks[name] for name in ("sweep", "table2_3"))
    assert "amend.parquet has no column error_p99" in lacks["fig4"] and "samples has no column score" in lacks["fig1"] and lacks["fig2"] == ""


def test_a_part(runs):
    part = next((runs / "ruler").rglob("samples/part-*.parquet"))
    table = pq.read_table(part)
    pq.write_table(table.slice(0, 50), part)
    assert "has 50 of the 130 finished examples of summary.json: a part is missing" in drawn(runs, fig1)["fig1"]
    part.unlink()
    assert "samples has no parts" in drawn(runs, fig1)["fig1"]


def test_rows_of_steps_and_layers(runs):
    """Of the 5,702 decode steps of the run, and of its 130 answers by 30 layers; a run without all of these is no picture of its steps."""
    for name, kept, says in (("steps", 2851, "lacks 2,851 of 5,702 rows"), ("layers", 3899, "lacks 1 of 3,900 rows")):
        part = next((runs / "ruler").rglob(f"{name}/part-*.parquet"))
        whole = pq.read_table(part)
        pq.write_table(whole.slice(0, kept), part)
        lacks = drawn(runs, long_texts, fig1)
        assert f"{part.parents[1].name}/{name} {says}" in lacks["records"] and lacks["fig1"] == ""
        assert ("steps lacks" in lacks.get("long_texts", "")) == (name == "steps")
        pq.write_table(whole, part)


def test_a_damaged_file(runs):
    path = runs / "decode/llama31_8b.parquet"
    path.write_bytes(path.read_bytes()[:500])
    lacks = drawn(runs, table7)
    assert lacks["table7"] == "" and "llama31_8b.parquet cannot be read" in lacks["records"]  # from the files beside it
    for other in path.parent.glob("*.parquet"):
        if other != path:
            other.unlink()
    assert "llama31_8b.parquet cannot be read" in drawn(runs, table7)["table7"]


def test_a_whole_run(runs):
    shutil.rmtree(runs / "ruler")
    lacks = drawn(runs, fig1, fig6, fig8, table4, fig2)
    assert "+experiment=fig1" in lacks["fig1"] and "task=attention" in lacks["fig6"] and "Qwen3-30B-A3B" in lacks["table4"] and lacks["fig2"] == ""


def test_what_says_how_a_trace_was_made(runs):
    """Any table of it will do; without one there is a line, and the rest is drawn."""
    folder = runs / "trace/smollm2/8192/trace-1"
    text = folder / "texts.parquet"
    pq.write_table(pq.read_table(text).replace_schema_metadata({}), text)
    assert drawn(runs, fig2)["fig2"] == ""
    for path in folder.glob("*.parquet"):
        pq.write_table(pq.read_table(path).replace_schema_metadata({}), path)
    lacks = drawn(runs, fig2, table7)
    assert "trace-1: no table has the metadata" in lacks["fig2"] and lacks["table7"] == ""


def test_a_file_of_a_run(runs):
    run = next((runs / "ruler").rglob("summary.json")).parent
    shutil.rmtree(run / "steps")
    lacks = drawn(runs, long_texts, fig1)
    assert "steps has no parts" in lacks["long_texts"] and lacks["fig1"] == ""
    (run / "summary.json").unlink()
    lacks = drawn(runs, fig1, table7)
    assert "has samples and no summary.json" in lacks["records"] and lacks["table7"] == ""


def test_a_run_without_a_protocol():
    with pytest.raises(Missing, match=r"gone/environment.json has no protocol with subtasks"):
        contexts.order({4096: (None, Source(Path("gone"), {"device": "cpu"}))})


def test_one_figure_that_fails_does_not_stop_the_others(runs, monkeypatch):
    def fail(records, out):
        raise KeyError("tau")

    monkeypatch.setattr(fig4, "make", fail)
    lacks = drawn(runs, fig4, table7)
    assert "cannot be drawn from these records (KeyError: 'tau')" in lacks["fig4"] and lacks["table7"] == ""


def test_the_command(tmp_path, capsys):
    assert figures.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "no runs below" in capsys.readouterr().err
    for arguments, says in (
        (["--out"], "--out: must name a folder"),
        ([str(REFERENCE), str(tmp_path)], f"no runs below {tmp_path}\n"),
        ([str(REFERENCE), "--out", __file__], f"--out={__file__}: cannot be written"),
    ):
        assert figures.main(arguments) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1


def test_the_page_needs_no_network_and_says_what_is_missing(runs, monkeypatch, capsys):
    monkeypatch.setattr(page, "draw", lambda records, out: figures.draw(records, out, (fig2, fig8, table7)))
    target = runs.parent / "report.html"
    report.main([str(runs), "--html", str(target)])
    text = target.read_text()
    assert text.count("data:image/png;base64,") == 1 and 'src="http' not in text and "<script" not in text
    assert "<td>" in text and "missing: no record of task=attention" in text and "NVIDIA H100" in text
    assert 'href="runs/decode/llama31_8b.parquet"' in text and "bos_count" not in text.split("Protocol cards")[0]
    with pytest.raises(ConfigError, match="is not a run folder"):
        report.main([str(runs / "nothing")])


def test_of_many_pictures_of_a_kind_one_stands_open(tmp_path, monkeypatch):
    def some(records, out):
        items = []
        for i in range(5):
            path = out / f"{i}.png"
            path.write_bytes(b"\x89PNG" + bytes(96 + (i == 3)))
            items.append(Drawn(f"fig1-{i}", f"picture {i}", "", [path], path))
        return [*items, Drawn("fig2", "picture 5", "", [items[0].picture], items[0].picture)]

    monkeypatch.setattr(page, "draw", some)
    text = page.write([str(tmp_path)], tmp_path / "report.html").read_text()
    open_, folded = text.split("<details><summary>4 more pictures")
    assert [i for i in range(6) if f'alt="picture {i}"' in open_] == [3]
    folded, after = folded.split("</details>", 1)
    assert [i for i in range(6) if f'alt="picture {i}"' in folded] == [0, 1, 2, 4] and 'alt="picture 5"' in after
