"""Runs of LongBench v2 and LongGenBench from the command line, and judging them again. A tiny random model stands in for a real one."""

import io
import json
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace

import pandas as pd
import pytest

from macbench import judge as judge_module
from macbench import run as run_module
from macbench.engine import Engine
from macbench.models.weights import load
from tests.tasks import longbench_v2_data, longgenbench_data
from tests.test_cli import macbench, samples, tiny_model  # noqa: F401

MAC = ["method=mac", "compare=[full]", "method.min_context=0", "method.window=64", "method.band=16"]


@pytest.fixture
def base(tiny_model, tmp_path):  # noqa: F811
    return [f"model.path={tiny_model}", f"runs_dir={tmp_path / 'runs'}", "logger=none", "device=cpu"]


@pytest.fixture
def rejudge(monkeypatch, capsys):
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["judge", *map(str, args)])
        code = 0
        try:
            judge_module.main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_longbench_v2(macbench, base, tmp_path):  # noqa: F811
    folder = longbench_v2_data.folder(tmp_path)
    args = [*base, *MAC, "task=longbench_v2", "task.subtasks=[zero_shot,no_context]", f"task.data_path={folder}", "ctx=700"]
    code, out, err = macbench(*args, "limit=2")
    assert code == 0, err
    assert "protocol: task longbench_v2, version 2" in err and "max_new_tokens 128 (zero_shot), 128 (no_context)" in err
    assert "chance 25" in out and "always" in out
    frame = samples(tmp_path)
    assert len(frame) == 8 and (frame.prompt_tokens + 128 <= 700).all()
    meta = json.loads(frame.meta[0])
    assert meta["item"].startswith("66ec") and {"difficulty", "length", "domain", "answer", "truncated"} <= set(meta)
    (run,) = (tmp_path / "runs" / "longbench_v2").glob("tiny-llama*/700/mac-*")
    tables = json.loads((run / "tables.json").read_text())
    assert {row["group"] for row in next(iter(tables.values()))} >= {"overall", "easy", "hard"}
    protocol = json.loads((run / "environment.json").read_text())["protocol"]
    assert protocol["data_sha256"] and protocol["truncation"]
    code, out, err = macbench(*args, "limit=100")  # there are eight
    assert code == 0 and len(samples(tmp_path)) == 8 * 2 * 2
    assert macbench(*args, "limit=100")[1] == out


def test_chain_of_thought_takes_two_calls_per_method(macbench, base, tiny_model, tmp_path, monkeypatch):  # noqa: F811
    from macbench.tasks.longbench_v2 import protocol

    monkeypatch.setitem(protocol.MAX_NEW_TOKENS, "cot", 30)
    monkeypatch.setitem(protocol.MAX_NEW_TOKENS, "cot_answer", 10)
    folder = longbench_v2_data.folder(tmp_path)
    endless = shutil.copytree(tiny_model, tmp_path / "endless")  # the other one's answers end at every sixteenth token of the vocabulary
    (endless / "generation_config.json").write_text("{}")
    args = [*base, f"model.path={endless}", *MAC, "task=longbench_v2", "task.subtasks=[cot]", "task.temperature=0.1", f"task.data_path={folder}"]
    code, _, err = macbench(*args, "ctx=500", "limit=1")
    assert code == 0, err
    frame = samples(tmp_path)
    assert (frame.new_tokens == 40).all() and (frame.decode_steps == 29 + 9).all()
    assert all(len(json.loads(meta)["earlier_texts"]) == 1 for meta in frame.meta)
    steps = pd.concat(map(pd.read_parquet, (tmp_path / "runs").rglob("steps/part-*.parquet")))
    assert steps.groupby("method").tokens_log_full.sum().to_dict() == frame.set_index("method").tokens_log_full.to_dict()


@pytest.fixture(scope="module")
def long_run_made(tiny_model, tmp_path_factory):  # noqa: F811
    """A judged run of LongGenBench: (its folder, its arguments, stdout, stderr)."""
    place = tmp_path_factory.mktemp("long_run")
    fixed = [f"model.path={tiny_model}", f"runs_dir={place / 'runs'}", "logger=none", "device=cpu", "ctx=400", "limit=1"]
    args = [*fixed, *MAC, "task=longgenbench", f"task.data_path={longgenbench_data.write(place)}", "task.max_new_tokens=60"]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["macbench", *args])
        run_module.main()
    (run,) = (place / "runs" / "longgenbench_16k").glob("tiny-llama*/400/mac-*")
    return run, args, out.getvalue(), err.getvalue()


@pytest.fixture
def long_run(long_run_made, tmp_path):
    """The same as a copy of one's own."""
    made, args, out, err = long_run_made
    runs = made.parents[3]
    shutil.copytree(runs, tmp_path / "runs")
    return tmp_path / "runs" / made.relative_to(runs), [a.replace(str(runs), str(tmp_path / "runs")) for a in args], out, err


def test_longgenbench_is_judged_at_the_end_and_again_without_generating(long_run, rejudge, monkeypatch):
    run, _, out, err = long_run
    assert "temperature 0.95" in err and "judged by lexical" in out and "stic_1" in out and "impossible" in out
    for engine in ("prefill", "decode"):
        monkeypatch.setattr(Engine, engine, None)
    before = {p: p.stat().st_mtime_ns for p in run.glob("samples/*")}
    code, out, _ = rejudge(run, "judge=lexical", "judge.share=0.5")
    assert code == 0 and "share=0.5" in out
    assert len(list((run / "judgements").iterdir())) == 2
    assert before == {p: p.stat().st_mtime_ns for p in run.glob("samples/*")}


def test_another_judge_is_no_other_run(long_run, macbench):  # noqa: F811
    run, args, _, _ = long_run
    code, out, err = macbench(*args, "judge=none")
    assert code == 0 and "nothing left to compute" in err and "judged by" not in out
    assert [p.name for p in run.parent.iterdir()] == [run.name]


def test_a_model_judges_on_our_engine(long_run, rejudge, tiny_model):  # noqa: F811
    run, *_ = long_run
    args = (run, "judge=llm", "judge.model=smollm2", f"judge.path={tiny_model}", "judge.max_tokens=5", "device=cpu")
    code, out, err = rejudge(*args)
    assert code == 0, err
    assert "not the official judge" in out
    (folder,) = (run / "judgements").glob("llm-*")
    checks = pd.read_parquet(folder / "checks.parquet")
    assert checks[checks.present].answer.notna().all()
    again = (folder / "verdicts.jsonl").read_bytes()
    assert rejudge(*args)[0] == 0 and (folder / "verdicts.jsonl").read_bytes() == again


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "RUN="),
        (["no-such-run"], "is not a run folder"),
        (["RUN", "judge=lexcal"], "did you mean lexical?"),
        (["RUN", "judge.shar=1"], "did you mean share?"),
        (["RUN", "juge=lexical"], "did you mean judge?"),
        (["RUN", "judge.share=7"], "judge.share=7"),
        (["RUN", "judge=api", "judge.key_env=NO_SUCH_KEY"], "NO_SUCH_KEY: is not set"),
        (["RUN", "judge=llm", "judge.path=no/such-model"], "judge.model=no/such-model"),
    ],
)
def test_wrong_judging_is_one_line(long_run, rejudge, args, said):
    code, _, err = rejudge(*[str(long_run[0]) if a == "RUN" else a for a in args])
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("macbench: ") and said in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["task=longbench_v2", "task.subtasks=[zeroshot]"], "did you mean zero_shot?"),
        (["task=longbench_v2", "task.data_path=no-such"], "task.data_path=no-such"),
        (["task=longbench_v2", "task.temprature=1"], "did you mean temperature?"),
        (["task=longgenbench", "task.split=64k"], "task.split=64k"),
        (["task=longgenbench", "task.data_path=no-such"], "Dataset_short.json"),
        (["judge=lexcal"], "did you mean lexical?"),
        (["task=longgenbench", "task.data_path=DATA", "judge=api", "judge.key_env=NO_SUCH_KEY"], "NO_SUCH_KEY"),
    ],
)
def test_one_clear_line_and_exit_code_2(macbench, base, tmp_path, args, said):  # noqa: F811
    folder = longgenbench_data.write(tmp_path)
    code, out, err = macbench(*base, *[a.replace("DATA", str(folder)) for a in args])
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("macbench: ") and said in err and "Traceback" not in out + err


def test_every_text_reaches_its_limit(macbench, base, tmp_path, monkeypatch):  # noqa: F811
    """Every token ends a sequence here; the runs are different ones."""
    monkeypatch.setattr("macbench.run.load", lambda *args: replace(load(*args), stop_ids=frozenset(range(49152))))
    folder = longgenbench_data.write(tmp_path)
    args = [*base, "method=full", "task=longgenbench", f"task.data_path={folder}", "task.max_new_tokens=30", "ctx=400", "limit=1", "judge=none"]
    assert macbench(*args)[0] == 0
    assert set(samples(tmp_path).new_tokens) == {1}
    code, _, err = macbench(*args, "task.ignore_eos=true")
    assert code == 0 and "not official" in err
    frame = samples(tmp_path)
    assert set(zip(frame.new_tokens, frame.finish_reason, strict=True)) == {(1, "stop"), (30, "length")} and frame.run_id.nunique() == 2


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("task=attention shard=1/2", "shard=1/2: must be null with task=attention"),
        ("task=trace shard=1/2", "shard=1/2: must be null with task=trace"),
        ("task=decode question_in_prefill=false", "question_in_prefill=False: must be true with task=decode"),
        ("task=attention engine.graph=false", "engine.graph=False: must be true with task=attention, whose task.modes"),
        ("task=decode task.data_path=/no/such", "task.data_path=/no/such: is not a folder"),
        ("task=decode task.hit_rate=[real] task.data_path=/proc/1", "task.data_path=/proc/1: has no PaulGrahamEssays.json"),
    ],
)
def test_what_a_benchmark_would_not_heed_is_an_error(macbench, tmp_path, args, said):  # noqa: F811
    code, _, err = macbench(*args.split(), f"runs_dir={tmp_path}")
    assert code == 2 and err.startswith(f"macbench: {said}") and err.count("\n") == 1, err
