"""A run that was packed, and examples of packed runs and of batches made again."""

import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from macbench import pack, verify
from macbench import run as run_module
from macbench.records import KEY, config_hash, part_name, read_table
from tests import kills
from tests.tools.conftest import change, rewrite


def test_a_packed_run_is_the_same_run(macbench, run, again, tmp_path, tool):
    """One part a table, same rows, nothing left to compute; where the machine's folders were named, nothing is."""
    before = read_table(run, "samples").sort_values(KEY, ignore_index=True)
    code, out, err = tool(pack, tmp_path / "kept", run)
    assert code == 0 and "as it should be" in out, out + err
    kept = tmp_path / "kept" / run.relative_to(tmp_path / "runs")
    assert [p.name for p in kept.rglob("*.parquet")] == ["part-all.parquet"] * 3
    pd.testing.assert_frame_equal(read_table(kept, "samples").sort_values(KEY, ignore_index=True), before)
    environment = json.loads((kept / "environment.json").read_text())
    assert "host" not in environment and "runs_dir=DIR" in environment["command"]
    metadata = pq.read_schema(kept / "steps" / "part-all.parquet").metadata[b"macbench"].decode()
    runs_dir = next(a for a in again if a.startswith("runs_dir=")).removeprefix("runs_dir=")
    assert all(runs_dir not in text for text in (metadata, (kept / "config.yaml").read_text(), (kept / "environment.json").read_text()))
    args = [a for a in again if not a.startswith("runs_dir=")]
    code, _, err = macbench(*args, f"runs_dir={tmp_path / 'kept'}")
    assert code == 0 and "nothing left to compute" in err
    assert tool(pack, tmp_path / "kept", run)[0] == 2  # never over what is there


@pytest.mark.parametrize("table", ["steps", "layers"])
def test_runs_of_earlier_versions_can_be_packed(run, tmp_path, tool, table):
    """Columns that did not exist are null, what was asked follows from the rows, steps or layers that were left out are said to be."""
    for path in (run / "samples").glob("*.parquet"):
        change(path, lambda data: data.drop_columns(["rho_page", "output_error"]))
    for path in (run / table).glob("*.parquet"):
        change(path, lambda data: data.filter(pc.equal(data["method"], "mac")))
    (run / "asked.json").unlink()
    assert tool(verify, run, "examples=0")[0] == 1
    code, out, err = tool(pack, tmp_path / "kept", run)
    assert code == 0, out + err
    assert "samples had no rho_page, output_error" in out and f"had the {table} of mac alone" in out and "had no asked.json" in out
    kept = tmp_path / "kept" / run.relative_to(tmp_path / "runs")
    assert read_table(kept, "samples").rho_page.isna().all() and set(read_table(kept, table).method) == {"mac"}
    code, out, err = tool(pack, tmp_path / "again", kept)  # what was done first is still said
    assert code == 0, out + err
    first, second = (
        json.loads((tmp_path / folder / run.relative_to(tmp_path / "runs") / "environment.json").read_text()) for folder in ("kept", "again")
    )
    assert len(first["packed"]) >= 3 and first["packed"] == second["packed"]
    part = kept / table / "part-all.parquet"
    change(part, lambda data: data.slice(1))
    code, out, _ = tool(verify, kept, "examples=0")
    assert code == 1 and f"is not the sum of its {table}" in out


def test_a_folder_of_the_machine_leaves_the_name(run, tmp_path, tool):
    """Where the weights' file lay was part of names once; its hash says what it holds."""
    environment = json.loads((run / "environment.json").read_text())
    identity = environment["identity"] | {"model": environment["identity"]["model"] | {"gguf": "/somewhere/x.gguf"}}
    name = f"mac-{config_hash(identity | {'protocol': environment['protocol']})}"
    (run / "environment.json").write_text(json.dumps(environment | {"identity": identity}))
    code, out, _ = tool(pack, tmp_path / "kept", run.rename(run.with_name(name)))
    kept = tmp_path / "kept" / run.relative_to(tmp_path / "runs")
    assert code == 0 and f"was {name}" in out and kept.is_dir() and set(read_table(kept, "layers").run_id) == {run.name}


def test_an_adapter_of_no_fixed_hash_leaves_its_folder_behind(run, tmp_path, tool):
    """Its place is part of the identity, and of the name; the packed name is the hash of what stands in the packed identity."""
    environment, config = json.loads((run / "environment.json").read_text()), OmegaConf.load(run / "config.yaml")
    config.model.adapter = "/somewhere/a.safetensors"
    identity = environment["identity"] | {"model": environment["identity"]["model"] | {"adapter": config.model.adapter}}
    name = f"mac-{config_hash(identity | {'protocol': environment['protocol']})}"
    (run / "environment.json").write_text(json.dumps(environment | {"identity": identity}))
    OmegaConf.save(config, run / "config.yaml")
    code, out, _ = tool(pack, tmp_path / "kept", run.rename(run.with_name(name)))
    assert code == 0 and f"was {name}" in out and "as it should be" in out
    (kept,) = (path.parent for path in (tmp_path / "kept").rglob("environment.json"))
    assert "/somewhere" not in (kept / "environment.json").read_text()
    code, out, err = tool(verify, kept, "examples=1", "device=cpu")
    assert code == 2 and "model.adapter=DIR: the run does not say where it lay" in err


def test_examples_of_a_packed_run_come_out_again(run, tmp_path, tool):
    """The places that pack took out are the defaults again, or what the command says."""
    config = OmegaConf.load(run / "config.yaml")
    OmegaConf.update(config, "model.gguf", "/nowhere/weights.gguf", force_add=True)
    OmegaConf.update(config, "task.data_path", "/nowhere/data", force_add=True)
    OmegaConf.save(config, run / "config.yaml")
    assert tool(pack, tmp_path / "kept", run)[0] == 0
    kept = tmp_path / "kept" / run.relative_to(tmp_path / "runs")
    assert OmegaConf.load(kept / "config.yaml").task.data_path == "DIR"
    code, out, err = tool(verify, kept, "examples=1", "device=cpu")
    assert code == 0 and "made again: niah_single_1" in out, out + err
    code, _, err = tool(verify, kept, "examples=1", "device=cpu", f"task.data_path={tmp_path / 'none'}")
    assert code == 2 and err.count("\n") == 1 and str(tmp_path / "none") in err
    code, _, err = tool(verify, kept, "examples=0", "task.data_path=/nowhere")
    assert code == 2 and "task.data_path=/nowhere: says where examples are made again, but examples=0 makes none" in err


@pytest.fixture(scope="module")
def batches(made, tmp_path_factory) -> Path:
    """``made`` again, three examples in step and the fourth alone."""
    runs = tmp_path_factory.mktemp("batches") / "runs"
    (model,) = (a.removeprefix("model.path=") for a in made[1] if a.startswith("model.path="))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["macbench", *kills.arguments(Path(model), runs, 4, "batch=3")])
        run_module.main()
    return runs


@pytest.mark.parametrize("recorded", [True, False])
def test_examples_of_a_batch_are_made_again_with_those_they_were_with(batches, tmp_path, tool, monkeypatch, recorded):
    """As the rows say, in that order; of a run that does not say it yet, as one process takes them, and a difference says so."""
    shutil.copytree(batches, tmp_path / "runs")
    (run,) = (path.parent for path in (tmp_path / "runs").rglob("config.yaml"))
    meta = read_table(run, "samples").set_index(["method", "example_id"]).meta.map(json.loads)
    names = [f"niah_single_1/{i}" for i in range(4)]
    assert all(meta[m, str(i)]["decoded_with"] == (names[:3] if i < 3 else names[3:]) for m in ("full", "mac") for i in range(4))
    together, order = [], names[2::-1]

    def answers(engine, model, task, variants, examples, *rest):
        together.append([f"{example.subtask}/{example.example_id}" for example in examples])
        return [[ValueError("not made")] * len(variants) for _ in examples]

    for i in range(4):
        path = run / "samples" / f"{part_name('niah_single_1', str(i))}.parquet"
        group = {"decoded_with": order if i < 3 else names[3:]} if recorded else {}
        rewrite(
            path,
            lambda rows, group=group: [
                row.update(meta=json.dumps({k: v for k, v in json.loads(row["meta"]).items() if k != "decoded_with"} | group)) for row in rows
            ],
        )
    assert tool(verify, run, "examples=4", "device=cpu")[0] == 0
    monkeypatch.setattr("macbench.regenerate.answers", answers)
    code, out, _ = tool(verify, run, "examples=4", "device=cpu")
    assert code == 1 and sorted(together) == sorted([order if recorded else names[:3], names[3:]])
    assert ("does not say which examples were a batch" in out) != recorded
    if recorded:
        rewrite(path, lambda rows: [row.update(meta=json.dumps({"decoded_with": ["niah_single_1/9"]})) for row in rows])
        code, _, err = tool(verify, run, "examples=1", "device=cpu")
        assert code == 2 and "names examples of a batch (1) that the run does not have" in err


@pytest.mark.parametrize(("target", "said"), [("", "name a target and runs"), ("file/x", "cannot be made"), ("there", "is there already")])
def test_where_nothing_can_be_packed(run, tmp_path, tool, target, said):
    (tmp_path / "file").touch()
    (tmp_path / "there" / run.relative_to(tmp_path / "runs")).mkdir(parents=True)
    code, _, err = tool(pack, target and tmp_path / target, run)
    assert code == 2 and err.count("\n") == 1 and said in err


@pytest.mark.parametrize("what", ["no run", "two versions", "a foreign column"])
def test_what_cannot_be_packed(run, tmp_path, tool, what):
    if what == "no run":
        (run / "environment.json").unlink()
    path = min((run / "samples").glob("*.parquet"))
    if what == "two versions":
        change(path, lambda data: data.replace_schema_metadata({"macbench": json.dumps({"device": "abacus"})}))
    if what == "a foreign column":
        change(path, lambda data: data.append_column("x", pa.array(range(len(data)))))
    code, _, err = tool(pack, tmp_path / "kept", run)
    assert code == 2 and err.count("\n") == 1 and not any((tmp_path / "kept").rglob("*.parquet"))
