"""What is written beside the next examples: in which order, and what an error or a full disk leaves."""

import errno
import os
import signal
import threading
import time

import pandas as pd
import pytest

from macbench import partial
from macbench import run as run_module
from macbench.errors import ConfigError
from macbench.recorder import Recorder
from macbench.records import KEY, SCHEMAS, RunDirectory, part_name, read_table
from macbench.tasks.base import Example
from tests.test_cli import macbench, samples, tiny_args, tiny_model  # noqa: F401


def rows(directory: RunDirectory, *examples: str, score: float = 1.0) -> dict:
    """The parts of some examples, of sample rows alone."""
    names = {"run_id": directory.run_id, "method": "full", "variant": "", "subtask": "a"}
    return {part_name("a", e): {"samples": [names | {"example_id": e, "score": score}], "steps": [], "layers": []} for e in examples}


def test_one_group_is_written_beside_the_next_one():
    events, go = [], threading.Event()

    def slow():
        go.wait(10)
        events.append("first")
        return 1

    with Recorder() as recorder:
        recorder.put(slow, events.append)
        events.append("meanwhile")
        go.set()
        recorder.put(lambda: events.append("second") or 2, events.append)
        assert events[:2] == ["meanwhile", "first"] and 1 in events and 2 not in events  # and it may not be a third one that waits
        recorder.settle()
        recorder.settle()
    assert sorted(map(str, events)) == ["1", "2", "first", "meanwhile", "second"] and events[-1] == 2


def test_what_fails_in_the_thread_is_raised_and_an_error_beside_it_lets_it_end():
    def full():
        raise ConfigError("runs_dir", "runs", "cannot be written")

    with Recorder() as recorder:
        recorder.put(full, lambda found: pytest.fail("it was not written"))
        with pytest.raises(ConfigError, match="cannot be written"):
            recorder.settle()
    written, go = [], threading.Event()
    with pytest.raises(KeyboardInterrupt), Recorder() as recorder:
        recorder.put(lambda: go.wait(0.2) or written.append(1), lambda found: None)
        raise KeyboardInterrupt
    assert written == [1]


def failing(said: str):
    def write():
        raise ConfigError("runs_dir", "runs", said)

    return write


def test_every_ctrl_c_waits_for_what_is_being_written():
    """One that ends the run, and three while it ends."""
    written, began = [], threading.Event()

    def slow():
        began.set()
        for _ in range(3):
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        written.append(1)

    for alone in (False, True):  # also where none has ended it
        with pytest.raises(KeyboardInterrupt), Recorder() as recorder:
            recorder.put(slow, written.append)
            began.wait()
            if not alone:
                raise KeyboardInterrupt
        assert written.pop() == 1 and not written


def test_what_fails_when_another_error_ends_a_run_is_a_line(capsys):
    with pytest.raises(KeyboardInterrupt), Recorder() as recorder:
        recorder.put(failing("is full"), written_nothing)
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "macbench: runs_dir=runs: is full\n"
    with pytest.raises(ConfigError, match="is full"), Recorder() as recorder:
        recorder.put(failing("is full"), written_nothing)
    assert capsys.readouterr().err == ""


def written_nothing(found):
    pytest.fail("it was not written")


def test_a_group_that_fails_does_not_take_the_next_one_with_it(capsys):
    """And what fails for the same reason is said once."""
    written = []
    with pytest.raises(ConfigError, match="is full"), Recorder() as recorder:
        recorder.put(failing("is full"), written_nothing)
        recorder.put(lambda: written.append(2), written_nothing)
    assert written == [2]
    with pytest.raises(ConfigError, match="is full"), Recorder() as recorder:
        recorder.put(failing("is full"), written_nothing)
        recorder.put(failing("is full"), written_nothing)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("batch", [1, 2])
def test_a_single_example_is_safe_before_the_next_begins_and_its_unfinished_text_goes_last(macbench, tiny_args, tmp_path, monkeypatch, batch):  # noqa: F811
    answers, clear, began, cleared = run_module.answers, partial.clear, [], []
    there = lambda: {path.stem for path in (tmp_path / "runs").rglob("samples/part-*.parquet")}  # noqa: E731

    def begins(engine, model, task, variants, examples, *rest):
        began.append(there())
        return answers(engine, model, task, variants, examples, *rest)

    def clears(run, example):
        cleared.append(part_name(example.subtask, example.example_id) in there())
        clear(run, example)

    monkeypatch.setattr(run_module, "answers", begins)
    monkeypatch.setattr(partial, "clear", clears)
    assert macbench(*tiny_args, "method=full", "limit=6", f"batch={batch}")[0] == 0
    if batch == 1:
        assert [len(parts) for parts in began] == [*range(6)]
    else:  # the last group but one may still be on its way
        assert all(n - 1 <= len(parts) / 2 <= n for n, parts in enumerate(began))
    assert cleared == [True] * 6 and len(samples(tmp_path)) == 6


def test_of_a_batch_a_full_disk_keeps_what_it_has_room_for(tmp_path, monkeypatch):
    directory, fsync = RunDirectory(tmp_path / "full-00000000"), os.fsync

    def full(file):
        if sum(path.is_file() for path in tmp_path.rglob("*")) > 5:  # room for one example, not for two
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        directory.write_examples(rows(directory, "0", "1", "2"), {})
    assert set(read_table(directory.path, "samples", complete=True).example_id) == {"0"}
    assert not list(directory.path.rglob(".writing-*"))


def test_parts_of_recorded_examples_are_tidied_away(tmp_path):
    """Of those for all methods and without an error; others' go on."""
    directory = RunDirectory(tmp_path / "full-00000000")
    written = rows(directory, "0", "1", "2")
    for number, part in enumerate(written.values()):
        part["samples"] += [part["samples"][0] | {"method": "mac", "error": "out of memory" if number == 2 else None}] if number else []
    directory.write_examples(written, {})
    kept = [partial.example_folder(directory.path, Example("a", str(i), "", [1], [], 1)) for i in range(4)]
    for folder in kept:
        folder.mkdir(parents=True)
    partial.tidy(directory, 2)
    assert [folder.exists() for folder in kept] == [True, False, True, True]
    partial.tidy(directory, 1)
    assert [folder.exists() for folder in kept] == [False, False, False, True]


def test_rows_that_were_written_here_need_not_be_read(tmp_path, monkeypatch):
    """Another process's are, also where one has taken the place of ours."""
    mine, other = RunDirectory(tmp_path / "full-00000000"), RunDirectory(tmp_path / "full-00000000")
    mine.write_examples(rows(mine, "0", "1"), {"commit": "a"})
    other.write_examples(rows(other, "2"), {"commit": "b"})
    other.write_examples(rows(other, "1", score=0.5), {})
    read = read_table(mine.path, "samples")
    assert dict(zip(read.example_id, read.score, strict=True)) == {"0": 1.0, "1": 0.5, "2": 1.0}
    pd.testing.assert_frame_equal(mine.samples(), read)
    opened, real = [], run_module.read_table.__globals__["_read"]
    monkeypatch.setattr("macbench.records._read", lambda part, *rest: opened.append(part.stem) or real(part, *rest))
    pd.testing.assert_frame_equal(mine.samples(), read)
    assert sorted(opened) == sorted(part_name("a", e) for e in "12")
    assert list(mine.samples().columns) == SCHEMAS["samples"].names and not mine.samples().duplicated(KEY).any()
