"""The command line: what wrong input gets, resuming, interruption, failures. A tiny random model stands in for a real one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch

from macbench import run as run_module
from macbench.records import engine_knobs
from macbench.tasks.ruler import Ruler
from tests import kills


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with a random two-layer Llama and SmolLM2's tokenizer; its answers end soon."""
    return kills.tiny_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def macbench(monkeypatch, capsys):
    """Run the command line in this process: returns (exit code, stdout, stderr)."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["macbench", *map(str, args)])
        try:
            run_module.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def tiny_args(tiny_model, tmp_path):
    """A run that takes a second or two."""
    return [f"model.path={tiny_model}", f"runs_dir={tmp_path / 'runs'}", "logger=none", "task.subtasks=[niah_single_1]", "ctx=512", "device=cpu"]


def samples(tmp_path) -> pd.DataFrame:
    return pd.concat(map(pd.read_parquet, sorted((tmp_path / "runs").rglob("samples/part-*.parquet"))), ignore_index=True)


# -- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["ctx=12q"], ["ctx=12q", "4k"]),
        (["ctx=0"], ["ctx=0", "positive"]),
        (["ctx=16k", "model=smollm2"], ["ctx=16k", "16384", "8192"]),
        (["ctx=40"], ["ctx=40"]),
        (["method=mcc"], ["method=mcc", "full, ", "did you mean mac?"]),
        (["method.tau=-1"], ["method.tau=-1", "at least 0"]),
        (["method.band=0"], ["method.band=0", "at least 1"]),
        (["method.tauu=1"], ["method.tauu=1", "did you mean tau?"]),
        (["methd=mac"], ["methd=mac", "did you mean method?"]),
        (["compare=[ful]"], ["compare=ful", "did you mean full?"]),
        (["grid.tua=[1,2]"], ["grid.tua", "did you mean tau?"]),
        (["grid.tau=[0.1,-2]"], ["method.tau=-2", "at least 0"]),
        (["method=full", "compare=[tidaldecode]", "grid.reselect=[5,9]"], ["grid.reselect=[5, 9]", "chosen method alone, and method=full"]),
        (["method=tidaldecode", "method.reselect=99", "task.subtasks=[niah_single_1]"], ["method.reselect=99", "at most 29"]),
        (["method=kivi_2bit", "method.bits=4"], ["method.bits=4", "must be 2"]),
        (["method=oracle_topk_ideal", "method.count=honest"], ["method.count=honest", "must be one of ideal"]),
        (["method=tova", "grid.x=1"], ["grid.x=1: x is no knob of method=tova; must be one of capacity, mode, gqa"]),
        (["task=rular"], ["task=rular", "did you mean ruler?"]),
        (["task.subtasks=[niah_single_4]"], ["task.subtasks=niah_single_4", "did you mean"]),
        (["limit=0"], ["limit=0", "at least 1"]),
        (["limit=many"], ["limit=many", "integer"]),
        (["engine.page_size=0"], ["engine.page_size=0"]),
        (["model=random_llama31_8b"], ["model=random_llama31_8b", "task=decode alone"]),
        (["task=decode", "method=quest"], ["method=quest", "full, mac"]),
        (["task=decode", "ctx=9k", "model=smollm2"], ["ctx=9216", "8192"]),
        (["task=decode", "batch=0"], ["batch=0"]),
        (["task=decode", "task.hit_rate=[real,0]"], ["task.hit_rate=real"]),
        (["batch=[1,2]"], ["batch=[1, 2]", "at least 1"]),
        (["engine.graph=maybe"], ["engine.graph=maybe", "true or false"]),
        (["engine.batch_invariant=1"], ["engine.batch_invariant=1", "true or false"]),
        (["follow=-1"], ["follow=-1"]),
        (["ctx=129k"], ["ctx=129k", "131072", "smollm2_128k"]),
        *[([f"shard={value}"], [f"shard={value}", "1/4"]) for value in ("0/4", "5/4", "1/0", "4", "a/b")],
        (["retry=all"], ["retry=all", "failed"]),
        (["backend=tritn"], ["backend=tritn", "auto, torch, triton"]),
        (["device=tpu"], ["device=tpu", "auto, cpu, cuda"]),
        (["model.dtype=int3", "logger=none"], ["model.dtype=int3", "bfloat16"]),
        (["model.device_map=balanced", "logger=none"], ["model.device_map=balanced", "null or auto"]),
        (["model.device_map=auto", "logger=none", "device=cpu"], ["model.device_map=auto", "needs a GPU"]),
        (["task=decode", "model.device_map=auto"], ["model.device_map=auto", "must be null with task=decode"]),
        (["model.template=llama"], ["model.template=llama", "chat, base, meta-llama3"]),
        (["model.path=no/such-model"], ["model.path=no/such-model"]),
        (["ctx=[1"], ["ctx=[1", "key=value"]),
        (["task.data_path=no-such-folder", "task.subtasks=[qa_1]"], ["task.data_path", "no-such-folder"]),
        (["-m", "method=full,mcc"], ["method=mcc"]),
        (["compare=null"], ["compare=null", "compare=[full]"]),
        (["compare=[[full]]"], ["compare=", "full"]),
        (["grid=5"], ["grid=5", "grid.tau"]),
        (["grid=null"], ["grid=null"]),
        (["grid=[1]"], ["grid=[1]"]),
        (["grid.tau=[]"], ["grid.tau=[]", "at least one value"]),
        (["runs_dir=null"], ["runs_dir=null", "a folder"]),
        (["runs_dir=5"], ["runs_dir=5", "a folder"]),
        (["model.gguf=5"], ["model.gguf=5"]),
        (["model.path=5"], ["model.path=5"]),
        (["~ctx"], ["ctx=null", "4k"]),
        (["ctx=1.5k"], ["ctx=1.5k"]),
        (["ctx=-1"], ["ctx=-1"]),
        (["ctx=null"], ["ctx=null"]),
        (["seed=abc"], ["seed=abc", "integer"]),
        (["limit=999999999"], ["limit=999999999", "at most"]),
        (["engine=5"], ["engine"]),
        (["device=null"], ["device=null", "auto"]),
        (["backend=null"], ["backend=null", "auto"]),
        (["method.name=../../evil"], ["method.name=../../evil", "full, "]),
        (["method._target_=os.getcwd"], ["method._target_=os.getcwd", "class"]),
        (["method._target_=no.such"], ["method._target_=no.such"]),
        (["task.subtasks=5"], ["task.subtasks=5"]),
        (["task=attention", "device=cpu", "method.tau=abc"], ["method.tau=abc"]),
        (["task=attention", "device=cpu", "method.band=-100"], ["method.band=-100"]),
        (["task=attention", "device=cpu", "method.window=0"], ["method.window=0"]),
        (["task=attention", "device=cpu", "backend=flashinfr"], ["backend=flashinfr", "did you mean flashinfer?"]),
        (["task=attention", "device=tpu"], ["device=tpu", "cuda, cpu"]),
        *[
            (["task=attention", "device=cpu", f"task.{key}={value}"], [f"task.{key}={value}".replace(",", ", ")])
            for key, value in [
                *[("window", v) for v in ("abc", "64.5", "0", "[]")],
                *[("scattered", "maybe"), ("head_dim", "100"), ("head_dim", "512"), ("head_dim", "[64,128]"), ("steps", "[4,5]")],
                *[("heads", "130/2"), ("heads", "[]"), ("hit_rate", "[]"), ("modes", "[]"), ("misses", "[]")],
            ]
        ],
        (["task=attention", "device=cpu", "compare=[quest]"], ["compare="]),
        (["task=decode", "task.modes=[]"], ["task.modes=[]"]),
        *[([f"task={task}", "ctx=[]", "device=cpu"], ["ctx=[]: must list at least one value"]) for task in ("attention", "decode")],
        (["+engine.graphs=false"], ["engine.graphs=False: no such key; must be one of page_size, graph"]),
        (["+model.foo=1"], ["model.foo=1: no such key; must be one of adapter"]),
        (["model=smollm2_128k", "model.adapter="], ["model.adapter=: must be null or text"]),
        (["model=smollm2_128k", "model.adapter=null"], ["model.adapter=null: must be a file"]),
        (["engine.batch_invariant=true", "batch=2", "method=mac", "compare=[full,quest]"], ["engine.batch_invariant=True", "not quest"]),
        (["ctx=8k", "batch=2000000", "device=cpu", "task.subtasks=[niah_single_1]"], ["batch=2000000", "lower batch or ctx"]),
        (["task.subtasks=[]"], ["task.subtasks=[]"]),
        (["task.data_path=5"], ["task.data_path=5"]),
    ],
)
def test_one_clear_line_and_exit_code_2(macbench, tmp_path, args, said):
    code, out, err = macbench(f"runs_dir={tmp_path}/runs", *args)
    assert code == 2
    assert err.count("\n") == 1, err
    assert err.startswith("macbench: ")
    for text in said:
        assert text in err
    assert "Traceback" not in out + err


def test_damaged_data_file(macbench, tmp_path):
    (tmp_path / "dev-v2.0.json").write_text('{"data": [{"title": "x", "paragra')
    code, _, err = macbench("task.subtasks=[qa_1]", f"task.data_path={tmp_path}", f"runs_dir={tmp_path}/runs")
    assert (code, err.count("\n")) == (2, 1)
    assert "task.data_path" in err
    assert "dev-v2.0.json" in err


def test_gguf_with_the_wrong_hash(macbench, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    code, _, err = macbench(f"model.gguf={tmp_path / 'model.gguf'}", f"runs_dir={tmp_path}/runs")
    assert (code, err.count("\n")) == (2, 1)
    assert "sha256" in err
    assert "b179c9523d" in err


@pytest.mark.parametrize("damage", ["cut", "pickle", "config"])
def test_model_folder_without_usable_weights(macbench, tiny_model, tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    weights = folder / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    else:
        (folder / "config.json").write_text("{")
    code, _, err = macbench(
        f"model.path={folder}", f"runs_dir={tmp_path}/runs", "logger=none", "task.subtasks=[vt]", "ctx=2k", "limit=1", "method=full"
    )
    assert (code, err.count("\n")) == (2, 1)
    assert f"model.path={folder}" in err


def test_weights_that_do_not_fit_on_the_device(macbench, tiny_args, monkeypatch):
    def full(self, *args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    code, _, err = macbench(*tiny_args, "method=full", "limit=1")
    assert code == 2 and "out of memory" in err and "smaller model" in err and "Traceback" not in err


def test_unwritable_run_directory(macbench, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, err = macbench(f"runs_dir={tmp_path / 'file'}", "task.subtasks=[niah_single_1]", "ctx=512")
    assert (code, err.count("\n")) == (2, 1)
    assert f"runs_dir={tmp_path / 'file'}" in err
    code, _, err = macbench("-m", f"runs_dir={tmp_path / 'file'}", "method=full,mac")
    assert (code, err.count("\n")) == (2, 1)


# -- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_writes_every_table_and_the_same_command_resumes(macbench, tiny_args, tmp_path):
    args = [*tiny_args, "method=mac", "compare=[full]", "method.min_context=0", "method.window=64", "method.band=16"]
    code, out, _ = macbench(*args, "limit=2")
    assert code == 0
    assert "rho_bytes" in out
    (folder,) = (tmp_path / "runs" / "ruler").glob("tiny-llama*/512/mac-*")
    files = {"asked.json", "config.yaml", "environment.json", "summary.json"}
    assert {p.name for p in folder.iterdir()} == files | {"samples", "steps", "layers"}
    frame = samples(tmp_path)
    assert sorted(zip(frame.method, frame.example_id, strict=True)) == [("full", "0"), ("full", "1"), ("mac", "0"), ("mac", "1")]
    assert (frame.prompt_tokens + 128 <= 512).all()
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["protocol"]["task"] == "ruler"

    before = {p: p.stat().st_mtime_ns for p in folder.rglob("part-*.parquet")}
    code, again, err = macbench(*args, "limit=2")
    assert code == 0
    assert "nothing left to compute" in err
    assert again == out
    code, _, _ = macbench(*args, "limit=3")
    assert code == 0
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in before.items())
    assert len(samples(tmp_path)) == 6

    code, _, _ = macbench(*args, "limit=2", "method.tau=0.3")  # another number, another run
    assert code == 0
    assert len(list(folder.parent.glob("mac-*"))) == 2


def test_tables_agree_with_each_other(macbench, tiny_args, tmp_path):
    code, _, _ = macbench(*tiny_args, "method=mac", "compare=[full]", "limit=1", "method.min_context=0", "method.window=64", "method.band=16")
    assert code == 0
    tables = {t: pd.concat(map(pd.read_parquet, (tmp_path / "runs").rglob(f"{t}/part-*.parquet"))) for t in ("samples", "steps", "layers")}
    for _, sample in tables["samples"].iterrows():
        mine = {t: tables[t][tables[t].method == sample.method] for t in ("steps", "layers")}
        assert len(mine["steps"]) == sample.decode_steps == sample.new_tokens - 1
        assert len(mine["layers"]) == 2
        for column in ("tokens_log", "tokens_phys", "bytes_kv", "bytes_state", "bytes_write", "bytes_full"):
            assert mine["steps"][column].sum() == mine["layers"][column].sum() == sample[column]
        lengths = mine["steps"].position + 1
        assert (mine["steps"].tokens_log_full == lengths * 3 * 2).all()  # 3 query heads, 2 layers
        assert lengths.iloc[0] == sample.prompt_tokens + 1
        read = sample.bytes_kv + sample.bytes_meta + sample.bytes_state + sample.bytes_idx
        assert sample.rho_bytes == pytest.approx(read / sample.bytes_full)
    full = tables["samples"].set_index("method").loc["full"]
    assert (full.rho_log, full.rho_phys, full.rho_bytes) == (1, 1, 1)


def test_grid_makes_variants_on_one_prefill(macbench, tiny_args, tmp_path):
    code, out, _ = macbench(*tiny_args, "method=mac", "grid.tau=[0.2,0.45]", "grid.window=[32,64]", "limit=1")
    assert code == 0
    frame = samples(tmp_path)
    assert sorted(frame.variant) == [f"tau={t} window={w}" for t in (0.2, 0.45) for w in (32, 64)]
    assert frame.prefill_s.nunique() == 1
    assert "tau=0.45 window=64" in out


def test_multirun_makes_one_run_per_combination(macbench, tiny_args, tmp_path):
    code, _, _ = macbench("-m", *tiny_args, "method=full,mac", "limit=1")
    assert code == 0
    assert sorted(samples(tmp_path).method) == ["full", "mac"]


def test_a_job_that_fails_does_not_end_a_sweep(macbench, tiny_args, tmp_path, monkeypatch):
    decode = run_module.Engine.decode_batch

    def fails(self, requests, method, *args, **kwargs):
        if type(method).__name__ == "Full":
            raise RuntimeError("no")
        return decode(self, requests, method, *args, **kwargs)

    monkeypatch.setattr(run_module.Engine, "decode_batch", fails)
    code, _, err = macbench("-m", *tiny_args, "method=full,mac", "limit=1")
    assert code == 1 and "1 example(s) failed" in err
    assert samples(tmp_path).set_index("method").error.notna().to_dict() == {"full": True, "mac": False}
    assert macbench("-m", *tiny_args, "method=mac", "limit=1,0")[0] == 2
    assert [p.name for p in (tmp_path / "runs" / ".sweep").iterdir()] == ["multirun.yaml"]


def test_latency_of_a_random_model(macbench, tmp_path):
    tiny = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = [f"model.random.{key}={value}" for key, value in (tiny | {"head_dim": 8}).items()]
    knobs = [
        "task.steps=4",
        "task.hit_rate=[0,1]",
        "method.window=16",
        "method.band=8",
        "method.min_context=0",
        "ctx=[64,128]",
        "batch=2",
        "task.prefill=true",
    ]
    code, out, err = macbench("task=decode", "model=random_llama31_8b", "device=cpu", f"runs_dir={tmp_path}/runs", *sizes, *knobs)
    assert code == 0, err
    (file,) = (tmp_path / "runs/decode/random_llama31_8b").glob("mac-*.parquet")
    frame = pd.read_parquet(file)
    assert frame.random_weights.all() and frame.error.isna().all()
    assert frame.method.tolist() == ["full", "mac", "mac"] * 2 and frame.ctx.tolist() == [64] * 3 + [128] * 3
    assert "(random)" in out or "random_llama31_8b" in out


def test_a_scorer_that_fails_costs_one_row_and_no_text(macbench, tiny_args, tmp_path, monkeypatch):
    score = Ruler.score

    def sometimes(self, example, text):
        if example.example_id == "1":
            raise ValueError("digits without end")
        return score(self, example, text)

    monkeypatch.setattr(Ruler, "score", sometimes)
    assert macbench(*tiny_args, "method=full", "limit=3")[0] == 1
    frame = samples(tmp_path).set_index("example_id").sort_index()
    assert frame.error.notna().tolist() == [False, True, False] and "digits without end" in frame.error["1"]
    assert frame.text.notna().all() and frame.score.notna().tolist() == [True, False, True]


def test_a_failed_example_is_a_row_and_the_run_goes_on(macbench, tiny_args, tmp_path, monkeypatch):
    decode = run_module.Engine.decode_batch
    calls = []

    def sometimes(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(run_module.Engine, "decode_batch", sometimes)
    code, _, err = macbench(*tiny_args, "method=full", "limit=3")
    assert code == 1
    assert "1 example(s) failed" in err
    frame = samples(tmp_path).set_index("example_id").sort_index()
    assert frame.error.notna().tolist() == [False, True, False]
    assert "engine.prefill_chunk" in frame.error["1"]
    monkeypatch.setattr(run_module.Engine, "decode_batch", decode)
    code, _, err = macbench(*tiny_args, "method=full", "limit=3")
    assert code == 1 and "nothing left to compute" in err and "retry=failed" in err
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("part-*.parquet")}
    code, _, _ = macbench(*tiny_args, "method=full", "limit=3", "retry=failed")
    assert code == 0
    assert samples(tmp_path).error.isna().all()
    assert sum(p.stat().st_mtime_ns != stamp for p, stamp in before.items()) == 3  # the tables of the one that had failed


def test_a_damaged_part_is_named(macbench, tiny_args, tmp_path):
    assert macbench(*tiny_args, "method=full", "limit=1")[0] == 0
    (part,) = (tmp_path / "runs").rglob("samples/part-*.parquet")
    part.write_bytes(part.read_bytes()[:100])
    code, _, err = macbench(*tiny_args, "method=full", "limit=1")
    assert (code, err.count("\n")) == (2, 1)
    assert part.name in err
    part.unlink()
    (steps,) = (tmp_path / "runs").rglob("steps/part-*.parquet")
    assert macbench(*tiny_args, "method=full", "limit=1")[0] == 0
    steps.write_bytes(steps.read_bytes()[:50])
    code, _, err = macbench(*tiny_args, "method=full", "limit=1")
    assert (code, err.count("\n")) == (2, 1)
    steps.unlink()
    assert macbench(*tiny_args, "method=full", "limit=1")[0] == 0
    assert len(pd.read_parquet(steps)) == samples(tmp_path).decode_steps.sum()


def test_identity_is_what_can_change_a_number(macbench, tiny_args, tmp_path):
    """The same run whatever the device's name or the data's folder; another one for another precision."""
    for extra in ([], ["device=auto"], [f"task.data_path={tmp_path}"]):
        assert macbench(*tiny_args, "method=full", "limit=1", *extra)[0] == 0
    folder = tmp_path / "runs" / "ruler"
    assert len(list(folder.rglob("samples"))) == 1
    assert macbench(*tiny_args, "method=full", "limit=1", "model.dtype=bfloat16")[0] == 0
    assert len(list(folder.rglob("samples"))) == 2
    assert macbench(*tiny_args, "method=full", "limit=1", "engine.batch_invariant=true")[0] == 0
    assert len(list(folder.rglob("samples"))) == 3


def test_a_later_knob_of_the_engine_that_is_off_leaves_the_name():
    before = {"page_size": 16, "graph": True, "prefill_chunk": 4096}
    assert engine_knobs(before | {"batch_invariant": False}) == before
    assert engine_knobs(before | {"batch_invariant": True}) != before


def test_a_batch_that_cannot_be_invariant_is_refused(macbench, tiny_args):
    code, _, err = macbench(*tiny_args, "method=full", "limit=2", "batch=2", "engine.batch_invariant=true")
    assert (code, err.strip().count("\n")) == (2, 0), err
    assert "engine.batch_invariant=True: needs the fused step of a GPU, at most 16 requests" in err


def test_a_method_that_cannot_act_says_so(macbench, tiny_args):
    code, _, err = macbench(*tiny_args, "method=mac", "limit=1")
    assert code == 0
    assert "runs as full attention" in err


def test_ctrl_c_keeps_finished_examples(macbench, tiny_args, tmp_path):
    command = [sys.executable, "-m", "macbench.run", *tiny_args, "method=full", "limit=400"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    )
    deadline = time.time() + 120
    while time.time() < deadline and len(list((tmp_path / "runs").rglob("samples/part-*.parquet"))) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1].startswith("macbench: interrupted")
    assert "Traceback" not in err
    kept = len(samples(tmp_path))
    assert 2 <= kept < 400
    code, _, err = macbench(*command[3:-1], f"limit={kept}")
    assert code == 0 and "nothing left to compute" in err
    assert not [p for p in (tmp_path / "runs").rglob("*") if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("module", "imported"),
    [("macbench.run", "macbench.interrupt"), ("macbench", "omegaconf"), ("macbench.run", "torch")],
)
def test_ctrl_c_while_starting(tiny_args, module, imported):
    """As soon as the process has imported something, in the middle of the other imports."""
    command = [sys.executable, "-X", "importtime", "-m", module, *tiny_args, "method=full", "limit=400"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert any(line.split()[-1] == imported for line in process.stderr)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [line for line in err.splitlines() if not line.startswith(("import time:", "macbench: note"))] == [
        "macbench: interrupted; finished examples are kept, the same command continues"
    ]


def test_help_shows_groups_knobs_and_examples(macbench):
    code, out, _ = macbench("--help")
    assert code == 0
    for text in ("method: full, ", "compare=[full]", "prefill_chunk"):
        assert text in out
