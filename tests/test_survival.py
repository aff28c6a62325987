"""Runs that go on: kills, several processes on one run, shards, memory that does not suffice. Real commands on a tiny model."""

import errno
import json
import os
import re
import signal
import stat
import threading
import time

import pandas as pd
import pytest
import torch

from macbench import asked, generate, verify
from macbench import run as run_module
from macbench.engine import Engine
from macbench.errors import ConfigError
from macbench.leases import Leases
from macbench.records import KEY, SCHEMAS, RunDirectory, part_name
from tests import kills
from tests.test_cli import macbench, samples, tiny_args, tiny_model  # noqa: F401
from tests.test_leases import die

SHORT = ["method=mac", "compare=[full]", "method.min_context=0", "method.window=64", "method.band=16"]


def test_kills_lose_nothing_and_repeat_little(tmp_path):
    """The quick version of ``python -m tests.kills``."""
    found = kills.killed(tmp_path, kills=3, examples=16, workers=2)
    assert found["kills"] == 3 and found["exit codes"] == [0, 0]
    assert (found["examples"], found["lost"], found["duplicates"], found["left behind"]) == (16, 0, 0, [])
    assert found["begun again"] <= found["kills"]
    assert all(found["same rows"].values()), found


def test_sigterm_gives_the_leases_back(tmp_path):
    """What a cluster sends before SIGKILL: finished examples stay, no lease is left for others to wait for."""
    context, log, runs = kills.forks(), tmp_path / "log", tmp_path / "runs"
    model = kills.tiny_model(tmp_path / "model")
    process = kills.start(context, kills.arguments(model, runs, 4000), log)
    deadline = time.time() + 120
    while kills.parts(runs) < 2 and time.time() < deadline:
        time.sleep(0.02)
    process.terminate()
    assert kills.finish([process], 60) == [128 + signal.SIGTERM]
    assert kills.parts(runs) >= 2 and not list(runs.rglob("leases"))
    assert not [p for p in runs.rglob("*") if p.name.startswith(".")]


def stoppable(args, log):
    """A worker whose heartbeat counts as lost after half a second, and that stops itself as soon as it has made its first example."""
    leases = run_module.Leases
    run_module.Leases = lambda path: leases(path, beat=0.05, stale=0.5)
    write, records = run_module.RunDirectory.write_examples, run_module.records

    def stops(*args):
        made = records(*args)
        if not log.with_suffix(".stopped").exists():
            log.with_suffix(".stopped").touch()
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # of the whole process, before this thread does anything else
        return made

    def written(self, examples, *args):
        with log.with_suffix(".written").open("a") as file:
            file.writelines(f"{os.getpid()} {part}\n" for part in examples)
        write(self, examples, *args)

    run_module.records, run_module.RunDirectory.write_examples = stops, written
    kills.work(args, log)


def test_a_stopped_worker_is_taken_over_and_writes_nothing_twice(tmp_path):
    context, log, runs = kills.forks(), tmp_path / "log", tmp_path / "runs"
    args = kills.arguments(kills.tiny_model(tmp_path / "model"), runs, 6)
    stopped = context.Process(target=stoppable, args=(args, log))
    stopped.start()
    deadline = time.time() + 120
    while not log.with_suffix(".stopped").exists() and time.time() < deadline:
        time.sleep(0.02)
    other = context.Process(target=stoppable, args=(args, log))
    other.start()
    assert kills.finish([other], 120) == [0] and kills.parts(runs) == 6
    assert list(runs.rglob("leases/worker-*"))  # of the stopped one, which lives
    os.kill(stopped.pid, signal.SIGCONT)
    assert kills.finish([stopped], 60) == [0] and not list(runs.rglob("leases"))
    written = [line.split() for line in log.with_suffix(".written").read_text().splitlines()]
    assert len({part for _, part in written}) == len(written) == 6 and {int(pid) for pid, _ in written} == {other.pid}


def test_a_process_makes_what_no_other_has_and_waits_for_the_rest(macbench, tiny_args, tmp_path, monkeypatch):  # noqa: F811
    """Another worker holds one of three examples and dies while this one waits."""
    args = [*tiny_args, "method=full"]
    assert macbench(*args, "limit=1")[0] == 0
    (run,) = (p.parent for p in (tmp_path / "runs").rglob("config.yaml"))
    other = Leases(run)
    assert other.claim(part_name("niah_single_1", "2"))
    slept = []

    def sleep(seconds):
        slept.append(len(samples(tmp_path)))
        if len(slept) == 3:
            other.close()

    monkeypatch.setattr("macbench.work.sleep", sleep)
    assert macbench(*args, "limit=4")[0] == 0
    assert slept == [3, 3, 3] and len(samples(tmp_path)) == 4 and not (run / "leases").exists()


def test_a_worker_that_dies_after_the_last_example_leaves_nothing(macbench, tiny_args, tmp_path):  # noqa: F811
    """Nothing is left to compute, so that nobody takes leases any more; the next command clears away all the same."""
    args = [*tiny_args, "method=full", "limit=1"]
    assert macbench(*args)[0] == 0
    (run,) = (p.parent for p in (tmp_path / "runs").rglob("config.yaml"))
    dead = Leases(run)
    assert dead.claim(part_name("niah_single_1", "0"))
    (run / "samples" / ".writing-part").touch()
    assert macbench(*args)[0] == 0 and (run / "leases").exists() and (run / "samples" / ".writing-part").exists()
    die(dead)
    assert macbench(*args)[0] == 0 and not (run / "leases").exists() and not (run / "samples" / ".writing-part").exists()


def test_who_writes_while_another_process_tidies_writes_again(tmp_path, monkeypatch):
    """The last worker clears away scratch files while another one still writes its summary."""
    mine, other, fsync, times = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run"), os.fsync, []

    def tidied(file):
        if stat.S_ISREG(os.fstat(file).st_mode):
            times.append(file)
            if len(times) < 3:
                other.tidy()
        fsync(file)

    monkeypatch.setattr(os, "fsync", tidied)
    mine.write_text("summary.json", "[]")
    assert len(times) == 3 and (tmp_path / "run" / "summary.json").read_text() == "[]"
    monkeypatch.setattr(os, "fsync", lambda file: other.tidy())
    with pytest.raises(ConfigError, match="cannot be written"):
        mine.write_text("summary.json", "[]")


def test_what_another_process_recorded_meanwhile_is_not_made_again(macbench, tiny_args, tmp_path, monkeypatch):  # noqa: F811
    """A copy of this run appears after this command looked what there is: all of it is taken as it is."""
    args = [*tiny_args, "method=full", "limit=3"]
    assert macbench(*args)[0] == 0
    (folder,) = (p.parent for p in (tmp_path / "runs").rglob("config.yaml"))
    hidden = tmp_path / "hidden"
    folder.rename(hidden)
    load = run_module.load

    def appears(*args):
        for table in SCHEMAS:
            for part in (hidden / table).iterdir():
                part.rename(folder / table / part.name)
        return load(*args)

    monkeypatch.setattr(run_module, "load", appears)
    monkeypatch.setattr(Engine, "prefill", None)
    code, out, _ = macbench(*args)
    assert code == 0 and "niah_single_1" in out and len(samples(tmp_path)) == 3


def test_a_sweep_on_a_full_disk_is_one_line(macbench, tiny_args, tmp_path, monkeypatch):  # noqa: F811
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    args = [*tiny_args, "method=full", "limit=0,-1", "-m"]
    with monkeypatch.context() as patch:
        patch.setattr("macbench.sweep.tempfile.mkstemp", full)  # no room for a job's exit code
        code, _, err = macbench(*args)
        assert code == 2 and "Traceback" not in err and "limit=0" in err
    monkeypatch.setattr("macbench.sweep.tempfile.mkdtemp", full)
    code, _, err = macbench(*args)
    assert code == 2 and err.count("\n") == 1 and "No space left" in err


def test_two_commands_that_ask_for_different_numbers(macbench, tiny_args, tmp_path, monkeypatch):  # noqa: F811
    """A shorter one ends while a longer one is at work: what stays is the longer one's, question and table."""
    args, load = [*tiny_args, "method=full"], run_module.load

    def meanwhile(*given):
        monkeypatch.setattr(run_module, "load", load)
        assert macbench(*args, "limit=1")[0] == 0
        return load(*given)

    monkeypatch.setattr(run_module, "load", meanwhile)
    assert macbench(*args, "limit=3")[0] == 0
    (run,) = (p.parent for p in (tmp_path / "runs").rglob("config.yaml"))
    assert list(asked.read(run).examples.values()) == [3] and not verify.verify(run).wrong


def test_shards_are_the_whole(macbench, tmp_path):  # noqa: F811
    base = kills.arguments(kills.tiny_model(tmp_path / "model"), tmp_path / "runs", 6)
    counts = []
    for i in (1, 2, 3, 4):
        code, out, err = macbench(*base, f"shard={i}/4")
        assert code == 0, err
        counts.append(len(samples(tmp_path)) // 2)
        assert ("left to other shards" in err) == (i < 4)
    assert counts == [2, 4, 5, 6]
    sharded = kills.tables(tmp_path / "runs")
    code, again, err = macbench(*base)
    assert code == 0 and "nothing left" in err and again == out
    (tmp_path / "runs").rename(tmp_path / "sharded")
    assert macbench(*base)[0] == 0
    whole = kills.tables(tmp_path / "runs")
    for table in SCHEMAS:
        pd.testing.assert_frame_equal(sharded[table], whole[table])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_prefills_in_smaller_chunks(macbench, tiny_args, tmp_path, monkeypatch, error):  # noqa: F811
    prefill, tried = Engine.prefill, []

    def small(self, ids, *args, chunk=None, **kwargs):
        tried.append(chunk)
        if chunk > 250:
            raise error
        return prefill(self, ids, *args, chunk=chunk, **kwargs)

    args = [*tiny_args, *SHORT, "ctx=1k", "limit=2"]
    assert macbench(*args)[0] == 0
    whole = samples(tmp_path)
    (tmp_path / "runs").rename(tmp_path / "before")
    monkeypatch.setattr(Engine, "prefill", small)
    assert macbench(*args)[0] == 0
    made = samples(tmp_path)
    assert tried[0] == 4096 and min(tried) > generate.SMALLEST_CHUNK
    assert made.error.isna().all() and (made.text == whole.text).all()
    assert all(json.loads(meta)["prefill_chunk"] in {chunk for chunk in tried if chunk <= 250} for meta in made.meta)
    assert not any("prefill_chunk" in meta for meta in whole.meta)


def test_a_prompt_that_fits_in_no_chunk_is_a_failed_example(macbench, tiny_args, tmp_path, monkeypatch):  # noqa: F811
    def never(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Engine, "prefill", never)
    code, _, err = macbench(*tiny_args, "method=full", "ctx=1k", "limit=2")
    assert code == 1 and "2 example(s) failed" in err and "Traceback" not in err
    assert samples(tmp_path).error.str.contains("engine.prefill_chunk").all() and not samples(tmp_path).duplicated(KEY).any()


def test_a_full_disk_is_one_line_and_nothing_is_lost(macbench, tiny_args, tmp_path, monkeypatch):  # noqa: F811
    """The quick version of ``python -m tests.disk``: the third part cannot be written, at any of its tables; later there is room again."""
    args = [*tiny_args, "method=full", "limit=4"]
    fsync = os.fsync
    for first in (8, 9, 10):
        calls = []

        def full(file, first=first, calls=calls):
            calls += [file] * stat.S_ISREG(os.fstat(file).st_mode)
            if len(calls) >= first:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(file)

        monkeypatch.setattr(os, "fsync", full)
        code, _, err = macbench(*args)
        # A progress bar stands beside it.
        assert code == 2 and len(re.findall("macbench: (?!note)", err)) == 1 and "Traceback" not in err and "No space left on device" in err, err
        monkeypatch.setattr(os, "fsync", fsync)
        assert not samples(tmp_path).empty and samples(tmp_path).error.isna().all()
        assert not list((tmp_path / "runs").rglob(".writing-*")) and not list((tmp_path / "runs").rglob("leases"))
    assert macbench(*args)[0] == 0 and len(samples(tmp_path)) == 4
