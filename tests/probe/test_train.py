"""A whole training on a CPU, in small: it learns, it goes on where it stopped, and its adapter is what the harness loads."""

import argparse
import json
import multiprocessing
import os
import signal
import socket
from hashlib import sha256
from types import SimpleNamespace

import pytest
import torch

from macbench.errors import ConfigError
from macbench.models import lora
from macbench.probe import checkpoint, evaluate, regular, train
from macbench.probe.group import Group
from macbench.probe.mixture import Mixture, collate
from macbench.probe.network import Probe
from macbench.probe.schedule import learning_rate
from macbench.probe.stream import Stream
from tests import real
from tests.probe.made import background, prose, tiny_llama

HEADER = lora.Header("0" * 64, 1e6, 131072, 2.0)


@pytest.fixture(autouse=True)
def few_positions(monkeypatch):
    """The distance from the base model is measured at fewer positions: a whole vocabulary at each takes most of the time."""
    monkeypatch.setattr(regular, "LAST", 16)
    monkeypatch.setattr(regular, "OTHERS", 16)


def steps(folder, out, *flags: str, workers: int = 0) -> tuple[list[dict], Probe]:
    """Train the tiny network; returns the log and the network."""
    out.mkdir(exist_ok=True)
    shared = [
        "--text",
        "-",
        "--out",
        str(out),
        "--shrink",
        "8",
        "--longest",
        "1024",
        "--step-tokens",
        "1024",
        "--rate",
        "0.05",
        "--distance",
        "0.1",
        *flags,
    ]
    probe = Probe(tiny_llama(), HEADER.rope_theta, torch.float32, rank=4)
    torch.manual_seed(0)
    args = train.arguments(shared)
    stream = Stream(Mixture(real.chat(), background(folder), 0), workers, train.parts(args.accumulate))
    group = Group("cpu")
    train.train(probe, HEADER, stream, group, args, out, started=0.0)
    stream.close()
    group.close()
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()], probe


def one_of_two(rank: int, port: int, *known) -> None:
    """What torchrun does for a process, then ``steps``."""
    torch.set_num_threads(1)  # threads do not survive a fork
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    steps(*known)


def test_processes_share_a_step(tmp_path):
    """Two processes take the steps of one that accumulates two parts, up to the order of sums, and these are not those of one part."""
    flags = ("--steps", "2", "--rate", "0.01", "--longest", "512", "--step-tokens", "512")
    alone, probe = steps(tmp_path, tmp_path / "alone", *flags, "--accumulate", "2")
    half, _ = steps(tmp_path, tmp_path / "half", *flags)
    assert [line["loss"] for line in half] != [line["loss"] for line in alone]

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=one_of_two, args=(rank, port, tmp_path, tmp_path / "both", *flags)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    log = [json.loads(line) for line in (tmp_path / "both" / "log.jsonl").read_text().splitlines()]
    for name in ("length", "rows", "rate"):
        assert [line[name] for line in log] == [line[name] for line in alone]
    for name in ("loss", "norm"):
        assert [line[name] for line in log] == pytest.approx([line[name] for line in alone], rel=1e-4)
    found = lora.read(tmp_path / "both" / "adapter.safetensors")[0]
    for name, pair in probe.factors().items():
        for got, wanted in zip(found[name], pair, strict=True):
            assert (got - wanted).norm() <= 0.01 * wanted.norm() + 1e-9  # codes of 8 bits


def test_parts_are_shared_evenly(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert list(train.parts(None)) == [1] and list(train.parts(4)) == [1, 3]
    with pytest.raises(ConfigError, match="--accumulate=3: must be a positive multiple of the number of processes, 2"):
        train.parts(3)


def test_the_loss_falls_and_a_run_goes_on_exactly_where_it_stopped(tmp_path, capsys):
    torch.manual_seed(0)
    whole, probe = steps(tmp_path, tmp_path / "whole", "--steps", "10")
    assert len(whole) == 10 and [line["step"] for line in whole] == list(range(10))
    assert sum(line["loss"] for line in whole[-4:]) < sum(line["loss"] for line in whole[:4]) - 4 * 1.0  # nats
    assert {line["length"] for line in whole} == {512, 1024}
    assert [line["distance"] is not None for line in whole] == [step % 4 == 0 for step in range(10)]

    torch.manual_seed(0)
    half, _ = steps(tmp_path, tmp_path / "parts", "--steps", "10", "--stop", "0.5")
    assert len(half) == 5
    both, again = steps(tmp_path, tmp_path / "parts", "--steps", "10", "--resume")
    for name in ("step", "length", "rows", "rate", "loss", "norm", "exact"):
        assert [line[name] for line in both] == [line[name] for line in whole], name
    for name, weight in probe.trained().items():
        assert torch.equal(weight, again.trained()[name])
    assert "step 9" in capsys.readouterr().out

    found, header = lora.read(tmp_path / "whole" / "adapter.safetensors")
    assert header == HEADER
    for name, pair in probe.factors().items():
        for got, wanted in zip(found[name], pair, strict=True):
            assert (got - wanted).norm() <= 0.01 * wanted.norm()


def test_a_run_by_time_ends_with_its_plan(tmp_path):
    log, _ = steps(tmp_path, tmp_path / "timed", "--seconds", str(train.monotonic() + 4 + train.RESERVE))
    progress, rates = ([line[name] for line in log] for name in ("progress", "rate"))
    assert progress == sorted(progress) and progress[-1] <= 1
    assert rates == [pytest.approx(learning_rate(p, 0.05), abs=1e-6) for p in progress]


def test_sigterm_ends_a_run_after_the_step_in_hand(tmp_path, monkeypatch):
    """To the whole group, as ``timeout`` sends it: the workers live on, and the leader writes what there is."""
    update = train.update

    def interrupted(*known):
        if known[2]:  # the learning rate: from the second step on
            for _ in range(2):
                os.killpg(0, signal.SIGTERM)
        return update(*known)

    def session():
        os.setsid()
        monkeypatch.setattr(train, "update", interrupted)
        steps(tmp_path, tmp_path / "cut", *flags, workers=1)

    flags = ("--steps", "3", "--longest", "512", "--step-tokens", "512")
    process = multiprocessing.get_context("fork").Process(target=session)
    process.start()
    process.join()
    assert process.exitcode == 0
    log = (tmp_path / "cut" / "log.jsonl").read_text().splitlines()
    assert len(log) == 2 and lora.read(tmp_path / "cut" / "adapter.safetensors")[1] == HEADER
    log, _ = steps(tmp_path, tmp_path / "cut", *flags, "--resume")
    assert [line["step"] for line in log] == [0, 1, 2]


def test_the_command_says_what_it_ran_on(tmp_path, monkeypatch, capsys):
    text, out = tmp_path / "prose.txt", tmp_path / "out"
    text.write_text(prose())
    monkeypatch.setattr(train, "load", lambda *args: SimpleNamespace(network=tiny_llama()))
    args = ["--text", str(text), "--out", str(out), "--workers", "0", "--device", "cpu"]
    args += ["--shrink", "8", "--longest", "512", "--step-tokens", "512"]
    monkeypatch.setattr("sys.argv", ["train", *args])
    assert train.main([*args, "--steps", "1"]) == 0 and train.main([*args, "--steps", "2", "--resume"]) == 0
    started = [json.loads(line) for line in (out / "environment.jsonl").read_text().splitlines()]
    assert len(started) == 2 and len((out / "log.jsonl").read_text().splitlines()) == 2
    for facts in started:
        assert facts["text_sha256"] == {"prose.txt": sha256(text.read_bytes()).hexdigest()}
        assert facts["command"] == f"python -m macbench.probe.train {' '.join(args)}" and "git" in facts and facts["device"].startswith("cpu")
    assert sha256((out / "adapter.safetensors").read_bytes()).hexdigest() in capsys.readouterr().out


def test_the_clock(monkeypatch):
    now = 100.0
    monkeypatch.setattr(train, "monotonic", lambda: now)
    args = train.arguments(["--text", "x", "--seconds", str(50 + train.RESERVE), "--stop", "0.7"])
    clock = train.Clock(args, checkpoint.Place(40, 0.2, {}), started=90.0)
    assert clock.progress(40) == pytest.approx(0.2) and clock.left(40) == pytest.approx(40)  # less 10 s of start and the reserve
    now = 120.0
    assert clock.progress(50) == pytest.approx(0.45) and clock.progress(50, ahead=8) == pytest.approx(0.55)
    assert clock.left(50) == pytest.approx(20)
    now = 150.0
    assert clock.progress(60) == pytest.approx(0.7) and clock.left(60) < 0


@pytest.mark.parametrize(
    ("program", "flags", "said"),
    [
        (train, ["--text", "nowhere.txt"], "--text=nowhere.txt: cannot be read"),
        (train, ["--text", "{text}", "--gguf", "nowhere.gguf"], "model.gguf=nowhere.gguf: no such file"),
        (train, ["--text", "{short}"], "holds fewer than 16 sentences"),
        (train, ["--text", "{text}", "--device", "tpu"], "device=tpu"),
        (train, ["--text", "{text}", "--steps", "0"], "--steps=0: must be at least 1"),
        (train, ["--text", "{text}", "--seconds", "1"], "--seconds=1.0: must be at least 6"),
        (train, ["--text", "{text}", "--longest", "5"], "--longest=5: must be at least 4096"),
        (train, ["--text", "{text}", "--shrink", "0"], "--shrink=0: must be at least 1"),
        (train, ["--text", "{text}", "--shrink", "16"], "--shrink=16: must be at most 8"),
        (train, ["--text", "{text}", "--out", "{text}"], "cannot be made a folder"),
        (evaluate, ["--text", "{text}", "--lengths", "100"], "--lengths=100: must be at least 512"),
        (evaluate, ["--text", "{text}", "--out", "nowhere/x.json"], "--out=nowhere/x.json: no such folder"),
        (evaluate, ["--text", "{text}", "--lengths", "129k"], "--lengths=132096: must be at most 131072"),
        (evaluate, ["--text", "{text}", "--adapter", "{text}"], "cannot be read as an adapter"),
    ],
)
def test_wrong_input_gets_one_line(program, flags, said, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(prose(100))
    (tmp_path / "short.txt").write_text("One sentence.")
    files = {"text": tmp_path / "text.txt", "short": tmp_path / "short.txt"}
    code = program.main((["--out", str(tmp_path / "out")] if program is train else []) + [flag.format(**files) for flag in flags])
    error = capsys.readouterr().err
    assert code == 2 and said in error and error.count("\n") == 1


def test_the_evaluation_counts_exact_answers(tmp_path, capsys, monkeypatch):
    mixture = Mixture(real.chat(), background(tmp_path, held_out=True), evaluate.SEED)
    probe = Probe(tiny_llama(), HEADER.rope_theta, torch.float32, rank=4)
    args = evaluate.arguments(["--text", "-", "--families", "text", "cwe", "--sequences", "2"])
    (row,) = evaluate.table(probe, mixture, [600], argparse.Namespace(**vars(args) | {"families": ["text"]}))
    assert (row["first_right"], row["first"], row["all_right"]) == (0, 2, 0) and row["all"] >= 2

    # A network that always knows: all answers count. Common words are not asked where they were not trained.
    said = []
    monkeypatch.setattr(evaluate, "collate", lambda *known: said.append(collate(*known)) or said[-1])
    answers = lambda: torch.from_numpy(said[-1].ids[said[-1].rows, said[-1].columns]).long()  # noqa: E731
    monkeypatch.setattr(probe, "logits", lambda hidden: torch.nn.functional.one_hot(answers(), 49152).float())
    monkeypatch.setattr(evaluate, "LONG", 500)
    (row,) = evaluate.table(probe, mixture, [600], args)
    assert row["family"] == "text" and row["first_right"] == 2 and row["all_right"] == row["all"]
    assert "600  text" in capsys.readouterr().out
