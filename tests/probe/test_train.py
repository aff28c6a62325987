"""A whole training on a CPU, in small: it learns, it goes on where it stopped, and its adapter is what the harness loads."""

import argparse
import json

import pytest
import torch

from macbench.models import lora
from macbench.probe import checkpoint, evaluate, train
from macbench.probe.mixture import Mixture, collate
from macbench.probe.network import Probe
from macbench.probe.schedule import learning_rate
from macbench.probe.stream import Stream
from tests import real
from tests.probe.made import background, prose, tiny_llama

HEADER = lora.Header("0" * 64, 1e6, 131072, 2.0)


def steps(folder, out, *flags: str) -> tuple[list[dict], Probe]:
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
    stream = Stream(Mixture(real.chat(), background(folder), 0), workers=0)
    train.train(probe, HEADER, stream, train.arguments(shared), out, started=0.0)
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()], probe


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
        (evaluate, ["--text", "{text}", "--lengths", "129k"], "--lengths=132096: must be at most 131072"),
        (evaluate, ["--text", "{text}", "--adapter", "{text}"], "cannot be read as an adapter"),
    ],
)
def test_wrong_input_gets_one_line(program, flags, said, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(prose(100))
    (tmp_path / "short.txt").write_text("One sentence.")
    files = {"text": tmp_path / "text.txt", "short": tmp_path / "short.txt"}
    code = program.main([flag.format(**files) for flag in flags] + (["--out", str(tmp_path / "out")] if program is train else []))
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
