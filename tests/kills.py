"""Kill the processes of a run with SIGKILL at random moments, again and again: ``python -m tests.kills kills=20 examples=200 workers=3 batch=1``.

Workers are real commands in processes of their own, forked from one that has imported everything, so that most of a worker's life is
work. Afterwards an undisturbed run is made, and both must hold the same rows.
"""

import contextlib
import io
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from macbench import run as run_module
from macbench.records import KEY, SCHEMAS, read_table
from tests import real

# Columns that a clock makes; all others must be the same in every run.
TIMES = {"prefill_s", "setup_s", "decode_s", "tpot_ms", "latency_ms"}


def tiny_model(folder: Path) -> Path:
    """A random two-layer Llama with SmolLM2's tokenizer and short answers, as a folder."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    network = LlamaForCausalLM(config)
    network.generation_config.eos_token_id = list(range(0, 49152, 16))  # answers end after a handful of words
    network.save_pretrained(folder)
    real.chat().tokenizer.save_pretrained(folder)
    return folder


def arguments(model: Path, runs: Path, examples: int, *more: str) -> list[str]:
    """A run of short examples: a word or two of an answer each."""
    fixed = ["method=mac", "compare=[full]", "method.min_context=0", "method.window=64", "method.band=16", "logger=none", "device=cpu"]
    return [f"model.path={model}", f"runs_dir={runs}", "task.subtasks=[niah_single_1]", "ctx=320", f"limit={examples}", *fixed, *more]


def work(args: list[str], log: Path) -> None:
    """A worker's whole life; every example that it begins is a line of ``log``."""
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(1)
    answers = run_module.answers

    def counted(engine, model, task, variants, examples, *rest):
        with log.open("a") as file:
            file.writelines(f"{example.subtask}/{example.example_id}\n" for example in examples)
        return answers(engine, model, task, variants, examples, *rest)

    run_module.answers = counted
    sys.argv = ["macbench", *args]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            run_module.main()
        finally:
            log.with_suffix(f".{os.getpid()}.out").write_text(out.getvalue())


def forks():
    """Where workers come from: forks of a process that has imported what a run needs."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.kills", "macbench.models.weights", "transformers.models.auto.tokenization_auto"])
    return context


def start(context, args: list[str], log: Path):
    process = context.Process(target=work, args=(args, log))
    process.start()
    return process


def finish(processes: list, seconds: float = 600) -> list[int]:
    for process in processes:
        process.join(seconds)
    return [process.exitcode for process in processes]


def parts(runs: Path) -> int:
    return len(list(runs.rglob("samples/part-*.parquet")))


def tables(runs: Path) -> dict[str, pd.DataFrame]:
    """All rows of the one run below ``runs``, sorted, without times."""
    (config,) = runs.rglob("config.yaml")
    order = {"samples": KEY, "steps": [*KEY, "step"], "layers": [*KEY, "layer"]}
    frames = {table: read_table(config.parent, table) for table in SCHEMAS}
    # who decodes with whom follows from who was there
    frames["samples"]["meta"] = [json.dumps({k: v for k, v in json.loads(m).items() if k != "decoded_with"}) for m in frames["samples"].meta]
    return {t: frame.drop(columns=TIMES & {*frame}).sort_values(order[t], ignore_index=True) for t, frame in frames.items()}


def killed(folder: Path, kills: int, examples: int, workers: int, seed: int = 0, batch: int = 1) -> dict:
    """One run with ``kills`` kills, one without; what became of them."""
    choice, context = random.Random(seed), forks()
    model, disturbed, quiet = tiny_model(folder / "model"), folder / "disturbed", folder / "quiet"
    log = folder / "began.log"
    log.touch()
    running = [start(context, arguments(model, disturbed, examples, f"batch={batch}"), log) for _ in range(workers)]
    killed = 0
    while killed < kills and parts(disturbed) < examples:
        # At a random moment between this kill's share of the work and the next one's.
        target = (killed + choice.random()) * examples / kills * 0.95
        while parts(disturbed) < target and any(p.is_alive() for p in running):
            time.sleep(0.001)
        time.sleep(choice.random() * 0.02)
        victim = choice.choice([i for i, p in enumerate(running) if p.is_alive()])
        os.kill(running[victim].pid, signal.SIGKILL)
        running[victim].join()
        killed += 1
        running[victim] = start(context, arguments(model, disturbed, examples, f"batch={batch}"), log)
    codes = finish(running)
    began = Counter(log.read_text().split())
    finish([start(context, arguments(model, quiet, examples, f"batch={batch}"), folder / "quiet.log")])
    one, two = tables(disturbed), tables(quiet)
    done = one["samples"]
    return {
        "kills": killed,
        "exit codes": codes,
        "examples": int(done.example_id.nunique()),
        "lost": examples - int(done.example_id.nunique()),
        "duplicates": int(done.duplicated(KEY).sum()),
        "begun again": sum(began.values()) - examples,
        "same rows": {table: bool(one[table].equals(two[table])) for table in SCHEMAS},
        "different": {f"{t}.{c}": _distance(one[t][c], two[t][c]) for t in SCHEMAS for c in one[t] if not one[t][c].equals(two[t][c])},
        "rows": {table: len(one[table]) for table in SCHEMAS},
        "left behind": sorted(p.name for p in disturbed.rglob("*") if p.name.startswith(".") or "lease" in str(p)),
    }


def _distance(one: pd.Series, two: pd.Series) -> str:
    """How far a column of two runs is apart: the largest difference of numbers, or how many values differ."""
    if len(one) == len(two) and pd.api.types.is_float_dtype(one):
        return f"{(one - two).abs().max():.1e} at most"
    return f"{sum(a != b for a, b in zip(one, two, strict=False))} values"


if __name__ == "__main__":
    given = {key: int(value) for key, _, value in (argument.partition("=") for argument in sys.argv[1:])}
    with tempfile.TemporaryDirectory() as scratch:
        began = time.time()
        found = killed(
            Path(scratch), given.get("kills", 20), given.get("examples", 200), given.get("workers", 3), given.get("seed", 0), given.get("batch", 1)
        )
        print(json.dumps(found | {"seconds": round(time.time() - began)}, indent=1))
