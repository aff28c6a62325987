"""task=trace from the command line's configuration to its files, on the real model."""

import json

import pandas as pd
import pyarrow.parquet as pq

from analysis import fig5, table6
from analysis.records import Records
from macbench import pack, run
from macbench.experiment import configuration
from macbench.trace.records import SCHEMAS

KNOBS = "method.window=32 method.band=16 task.windows=[32,64] task.bands=[0,16] task.samples=4 task.sources.ruler.subtasks=[niah_single_1]"


def test_a_trace_leaves_its_tables_and_is_not_made_twice(tmp_path, capsys):
    cfg = configuration([*f"task=trace ctx=512 limit=1 logger=none device=cpu runs_dir={tmp_path} {KNOBS}".split()])
    assert run.run(cfg) == 0
    folder = run.target(cfg)
    frames = {name: pd.read_parquet(folder / f"{name}.parquet") for name in SCHEMAS}
    texts = frames["texts"]
    assert texts.subtask.tolist() == ["niah_single_1"] and (texts.steps == texts.new_tokens - 1).all() and texts.note.isna().all()
    accepted = frames["acceptance"]
    assert len(accepted) == 30 * 9 * 2 * 5  # layers, heads, ring sizes, tau
    wide, narrow = (accepted[accepted.window == w].hits.sum() for w in (64, 32))
    assert accepted.steps.sum() == texts.steps.sum() * 30 * 9 * 10 and wide >= narrow > 0
    assert frames["chains"]["count"].sum() == texts.steps.sum() * 30 * 9
    facts = json.loads(pq.read_schema(folder / "gaps.parquet").metadata[b"macbench"])
    assert (facts["model"], facts["method"]["band"], facts["texts"]) == ("smollm2", 16, 1) and (folder / "config.yaml").exists()
    for item in (fig5, table6):
        assert all(drawn.files[0].exists() for drawn in item.make(Records(tmp_path), tmp_path))
    # Kept without where it was made, rows as they are.
    kept = pack.pack(folder, tmp_path / "kept")
    assert kept == tmp_path / "kept" / folder.relative_to(tmp_path)
    for name, frame in frames.items():
        pd.testing.assert_frame_equal(pd.read_parquet(kept / f"{name}.parquet"), frame)
    packed = json.loads(pq.read_schema(kept / "gaps.parquet").metadata[b"macbench"])
    assert "host" in facts and packed == json.loads((kept / "environment.json").read_text()) and "host" not in packed
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in kept.iterdir())
    capsys.readouterr()
    assert run.run(cfg) == 0 and "nothing left to compute" in capsys.readouterr().err
    # Cut off after its first table: what is finished stays, the rest is as it was.
    (folder / "config.yaml").unlink()
    texts = pq.read_table(folder / "texts.parquet")
    pq.write_table(texts.slice(0, 0), folder / "texts.parquet")
    assert run.run(cfg) == 0
    for name, frame in frames.items():
        pd.testing.assert_frame_equal(pd.read_parquet(folder / f"{name}.parquet"), frame)
    written = (folder / "texts.parquet").stat().st_mtime_ns
    (folder / "config.yaml").unlink()
    assert run.run(cfg) == 0 and (folder / "config.yaml").exists() and (folder / "texts.parquet").stat().st_mtime_ns == written
