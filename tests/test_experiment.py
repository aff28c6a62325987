"""Presets: every one composes at every scale, says what it would do, and runs."""

import json
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from macbench import cli, experiment, plan, run
from macbench.errors import ConfigError
from macbench.records import engine_knobs, placeless

NAMES = cli.options("experiment")


def test_one_preset_per_item_of_the_paper():
    figures = [f"fig{i}" for i in (1, 2, 4, 5, 6, 7, 8)]
    assert set(NAMES) == {*figures, "table1", "table2_3", "table4", "table5", "table6", "table7", "sweep"}
    assert all(experiment.load(name)["title"] for name in NAMES)


@pytest.mark.parametrize("scale", experiment.SCALES)
def test_every_command_composes_and_gets_its_data(scale, tmp_path):
    """Groups, keys and values exist, and whatever reads files is told where they are; checked once per distinct command."""
    folders = {name: str(tmp_path / name) for name in ("ruler", "longbench_v2", "longgenbench")}
    for folder in folders.values():
        Path(folder).mkdir()
    commands = {job for name in NAMES if not isinstance(found := experiment.jobs(name, scale), str) for job in found}
    assert len(commands) >= 7
    for job in commands:
        overrides = shlex.split(job)
        cfg = experiment.configuration(overrides + experiment.located(overrides, tmp_path))
        if cfg.task.name == "trace":
            read = {name: source.data_path for name, source in cfg.task.sources.items() if source is not None}
            assert "ruler" in read and all(place == folders[name] for name, place in read.items())
        else:
            assert cfg.task.get("data_path") == folders.get({"decode": "ruler"}.get(cfg.task.name, cfg.task.name))
        assert scale != "paper" or cfg.model.name != "random_llama31_8b" or cfg.task.name == "decode"


def test_the_recorded_runs_of_figure_1_are_what_its_preset_makes():
    """Everything in the identity of a run but what a device and the prompts add to it."""
    for name, ctx, run_name in (("fig1", 4096, "mac-9febb003"), ("fig1", 8192, "mac-b39ddfb1"), ("table1", 8192, "mac-b39ddfb1")):
        known = json.loads((cli.CONF.parent / f"runs/reference/h100/ruler/smollm2/{ctx}/{run_name}/environment.json").read_text())["identity"]
        (job,) = [job for job in experiment.jobs(name, "gpu") if f"task=ruler ctx={ctx // 1024}k" in job]
        mine = OmegaConf.to_container(experiment.configuration(shlex.split(job)), resolve=True)
        mine |= {"ctx": cli.parse_ctx(mine["ctx"]), "engine": engine_knobs(mine["engine"]), "model": placeless(mine["model"])}
        mine["task"] = {key: mine["task"][key] for key in known["task"]}
        assert all(mine[key] == value for key, value in known.items() if key not in ("dtype", "fitted", "backend"))


def test_a_scale_without_commands_says_why():
    assert "hub" in experiment.jobs("table4", "gpu")


def test_data_goes_to_the_task_that_has_a_folder(tmp_path):
    (tmp_path / "ruler").mkdir()
    (tmp_path / "longgenbench").mkdir()
    assert experiment.located(["task=ruler"], tmp_path) == [f"++task.data_path={tmp_path}/ruler"]
    assert experiment.located(["task=longbench_v2"], tmp_path) == [] == experiment.located(["task=ruler"], None)
    assert experiment.located(["task=trace"], tmp_path) == [f"++task.sources.ruler.data_path={tmp_path}/ruler"]
    sources = [f"task.sources.{name}={{limit:1}}" for name in ("longgenbench", "longbench_v2")]
    assert len(experiment.located(["task=trace", *sources], tmp_path)) == 2  # RULER and what has a folder
    (tmp_path / "longbench_v2").mkdir()
    assert f"++task.sources.longbench_v2.data_path={tmp_path}/longbench_v2" in experiment.located(["task=trace", *sources], tmp_path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["+experiment=fig9", "scale=cpu"], "experiment=fig9: must be one of"),
        (["+experiment=fig4"], "scale=: must be one of cpu, gpu, paper"),
        (["+experiment=fig4", "scale=tpu"], "scale=tpu: must be one of"),
        (["+experiment=fig4", "scale=cpu", "--dry"], "command line=--dry"),
        (["+experiment=fig4", "scale=cpu", "data=/nowhere"], "data=/nowhere: must be a folder"),
    ],
)
def test_mistakes_are_one_line(arguments, says):
    with pytest.raises(ConfigError) as error:
        experiment.main(arguments, lambda cfg: 0)
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


def test_a_dry_run_lists_cells_and_what_is_there(tmp_path, capsys):
    arguments = ["+experiment=fig6,table5", "scale=cpu", "--dry-run", f"runs_dir={tmp_path}"]
    assert experiment.main(arguments, lambda cfg: pytest.fail("a dry run runs nothing")) == 0
    said = capsys.readouterr().out
    assert "missing 32/8 heads, batch 1, ctx 2k: full torch" in said and "20 cells, 0 there, 20 missing: about 40 s" in said
    assert "match, K 512" in said
    cfg = experiment.configuration([*shlex.split(experiment.jobs("table5", "cpu")[0]), f"runs_dir={tmp_path}"])
    run.target(cfg).parent.mkdir(parents=True)
    run.target(cfg).write_bytes(b"")
    assert plan.plan(cfg).missing == 0 and "nothing to do" in plan.describe(cfg, (1.0, "measured"))


def test_where_essays_lie_is_no_part_of_a_latency_run(tmp_path):
    job = [*shlex.split(experiment.jobs("fig7", "cpu")[0]), f"runs_dir={tmp_path}"]
    names = {run.target(experiment.configuration([*job, f"task.data_path={place}"])) for place in ("here", "there")}
    assert len(names) == 1


def test_cells_of_a_benchmark_are_examples_by_variant(tmp_path):
    cfg = experiment.configuration(["task=ruler", "ctx=2k", "limit=2", "task.subtasks=[vt]", "compare=[full]", f"runs_dir={tmp_path}", "logger=none"])
    found = plan.plan(cfg)
    assert sorted(name for name, _ in found.cells) == ["full vt 0", "full vt 1", "mac vt 0", "mac vt 1"]
    assert found.missing == 4 and not found.folder.exists()
    seconds, source = plan.forecast(cfg, found, None)
    assert seconds > 0 and "measured in" in source  # the reference run on a CPU has the same model
    faster, source = plan.forecast(cfg, found, None, gpu=True)
    assert faster < seconds and "/h" in source and "/cpu/" not in source


def test_a_forecast_says_what_its_rates_are(tmp_path, monkeypatch):
    """Measured or estimated; the disk as in records of the kind, wherever there are some."""
    assert experiment.pace("fig4", "paper") == (120, "not measured: estimated from the prefill of 120K")
    assert experiment.pace("fig4", "gpu") == (8, "measured with this preset at scale gpu") and experiment.pace("table4", "paper") is None
    assert experiment.pace("table5", "paper") == (0.8, "measured with this preset at scale gpu")  # the same commands
    monkeypatch.chdir(cli.CONF.parent)
    cfg = experiment.configuration([*shlex.split(experiment.jobs("fig2", "gpu")[0]), f"runs_dir={tmp_path}"])
    found = plan.Plan([(str(i), False) for i in range(20)], tmp_path)
    traces = list((cli.CONF.parent / "runs/reference").glob("*/trace/**/*.parquet"))
    size, source = plan.disk(cfg, found)
    assert size == pytest.approx(sum(p.stat().st_size for p in traces)) and "as in runs/reference" in source  # that is of 20 texts
    monkeypatch.chdir(tmp_path)
    size, source = plan.disk(cfg, found)
    assert 0.5 < size / sum(p.stat().st_size for p in traces) < 2 and "as in the reference runs" in source


def test_a_dry_run_asks_a_hub_out_of_reach_once(monkeypatch):
    """Offline its client looks into the cache alone, where it would ask six times for each model; afterwards it is as it was."""
    import huggingface_hub
    from huggingface_hub import constants

    asked, offline = [], []

    class Session:
        def head(self, url, **more):
            asked.append(url)
            raise OSError("no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(plan, "describe", lambda *given, **more: offline.append(constants.HF_HUB_OFFLINE))
    assert experiment.main(["+experiment=table1", "scale=paper", "--dry-run"], lambda cfg: 0) == 0
    assert (len(asked), offline, constants.HF_HUB_OFFLINE) == (1, [True] * 6, False)


def test_cells_of_a_model_that_is_not_here_are_not_counted(tmp_path):
    (tmp_path / "empty").mkdir()
    said = plan.describe(experiment.configuration(["task=ruler", f"model.path={tmp_path}/empty", "model.gguf=null"]), None)
    assert said.startswith("   cells not counted: model.path=") and said.count("\n") == 1


def test_a_preset_runs_every_command_and_goes_on_after_a_mistake(capsys):
    seen = []

    def pretend(cfg):
        seen.append(cfg.task.name)
        if cfg.task.name == "ruler":
            raise ConfigError("task.data_path", "x", "is not there")
        return 0

    assert experiment.main(["+experiment=table1", "scale=cpu", "limit=1"], pretend) == 2
    assert seen == ["ruler", "longbench_v2", "longgenbench"]
    assert "task.data_path=x" in capsys.readouterr().err


def test_a_preset_goes_on_after_a_failure_of_any_kind(capsys):
    seen = []

    def pretend(cfg):
        seen.append(cfg.task.name)
        if cfg.task.name == "ruler":
            raise RuntimeError("no room\nfor it")
        return 0

    assert experiment.main(["+experiment=table1", "scale=cpu", "limit=1"], pretend) == 1
    assert seen == ["ruler", "longbench_v2", "longgenbench"]
    assert "this command failed (RuntimeError: no room" in capsys.readouterr().err


def test_ctrl_c_ends_the_whole_preset(capsys):
    def stopped(cfg):
        raise KeyboardInterrupt

    assert experiment.main(["+experiment=table1", "scale=cpu"], stopped) == 130
    assert capsys.readouterr().err.count("interrupted") == 1


def test_a_trace_refuses_what_it_cannot_do(tmp_path):
    for override, key in (
        ("method=quest", "method"),
        ("task.windows=[0]", "task.windows"),
        ("task.taus=[a]", "task.taus"),
        ("task.sources.ruler=null", "task.sources"),
        ("compare=[full]", "compare"),
        ("budget=0.1", "budget"),
    ):
        cfg = experiment.configuration(["task=trace", "ctx=2k", "limit=1", f"runs_dir={tmp_path}", override])
        with pytest.raises(ConfigError) as error:
            run.run(cfg)
        assert error.value.key == key
