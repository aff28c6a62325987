"""How well the adapted model answers questions of the training's kinds about text, keys and values that it has not seen.

    python -m macbench.probe.evaluate --text kjv.txt austen.txt jargon.txt devil.txt --adapter runs/probe/adapter.safetensors

An answer counts as right if every token of it is the most likely one, which is what greedy decoding would say. Each needle sequence is
asked once as RULER asks (first) and, at no further cost, many times more (all). This is a check of the training; scores are RULER's:
``python -m macbench.run model=smollm2_128k task=ruler ctx=64k``.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from macbench import cli
from macbench.errors import ConfigError
from macbench.models import lora
from macbench.models.weights import load, load_chat, resolve_device
from macbench.probe import backend, text
from macbench.probe.mixture import FAMILIES, POSITIONS, Mixture, collate
from macbench.probe.network import Probe
from macbench.probe.steps import answer_loss
from macbench.probe.train import SHORTEST, base_spec

SEED = 10**9  # of the held-out sequences
SHORT_ONLY = ("cwe", "fwe")  # hardly trained above 32K
LONG = 32768


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m macbench.probe.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--text", nargs="+", required=True, help="the text files of the training; their last tenth was not trained on")
    parser.add_argument("--adapter", help="adapter file; without one the base model is measured, within its own RoPE")
    parser.add_argument("--gguf", help="the wheel's GGUF file, if the wheel is not installed")
    parser.add_argument("--lengths", nargs="+", default=["4k", "16k", "64k", "120k"], help="tokens of a sequence")
    parser.add_argument("--sequences", type=int, default=4, help="sequences of each family and length")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", help="write the counts to this JSON file")
    return parser.parse_args(argv)


@torch.inference_mode()
def measure(probe: Probe, mixture: Mixture, family: str, length: int, sequences: int) -> dict:
    """First and all questions of ``sequences`` sequences: how many were answered exactly, and how many there were."""
    counts = np.zeros(4, np.int64)
    for i in range(sequences):
        rng = np.random.default_rng([SEED, length, FAMILIES.index(family), i])
        sequence = mixture.sequence(family, length, rng)
        batch = collate([sequence], np.arange(length)[None], length, mixture.dialogue.eos)
        right = answer_loss(probe, batch).right.cpu().numpy()
        counts += [right[0], 1, right.sum(), len(right)]
    return dict(zip(("first_right", "first", "all_right", "all"), counts.tolist(), strict=True))


def run(args: argparse.Namespace) -> list[dict]:
    device, spec = resolve_device(args.device), base_spec(args.gguf)
    lengths = [cli.parse_ctx(length) for length in args.lengths]
    if max(lengths) > POSITIONS:
        raise ConfigError("--lengths", max(lengths), f"must be at most {POSITIONS}")
    if min(lengths) < SHORTEST:
        raise ConfigError("--lengths", min(lengths), f"must be at least {SHORTEST}")
    if args.out and not Path(args.out).parent.is_dir():
        raise ConfigError("--out", args.out, "no such folder")
    factors, header = lora.read(Path(args.adapter)) if args.adapter else ({}, None)
    chat = load_chat(spec)
    mixture = Mixture(chat, text.read(args.text, chat, held_out=True), SEED)
    network = load(spec, device, chat).network
    theta = header.rope_theta if header else network.config.rope_parameters["rope_theta"]
    probe = Probe(network, theta, torch.bfloat16 if device == "cuda" else torch.float32, scale=header.scale if header else 1.0)
    if header:
        probe.set_factors(factors)
    with backend.fastest(network):
        return table(probe, mixture, lengths, args)


def table(probe: Probe, mixture: Mixture, lengths: list[int], args: argparse.Namespace) -> list[dict]:
    """Measure and print a line for every length and family."""
    rows = []
    print(f"{'tokens':>7}  {'family':14}{'first':>9}{'all':>11}")
    for length in lengths:
        for family in args.families:
            if length > LONG and family in SHORT_ONLY:
                continue
            row = {"length": length, "family": family} | measure(probe, mixture, family, length, args.sequences)
            rows.append(row)
            print(f"{length:7d}  {family:14}{row['first_right']:4d}/{row['first']:<4d}{row['all_right']:6d}/{row['all']:<5d}", flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    try:
        args = arguments(argv)
        rows = run(args)
    except ConfigError as error:
        print(f"macbench: {error}", file=sys.stderr)
        return 2
    if args.out:
        Path(args.out).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
