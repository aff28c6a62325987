"""Do a captured step, an eager step and a batch of requests write the same greedy text? SmolLM2, prompts of RULER.

python -m macbench.bench.same_tokens [prompts=16] [new_tokens=64] [ctx=4096] [device=cuda] [batch=16] [gguf=FILE] [out=FILE.parquet]

Each way is compared with batch 1, eager. Where a text differs, the gap between the two largest logits at that step says how near a tie was.
"""

import sys
from pathlib import Path
from statistics import median

import pyarrow as pa
import torch
from omegaconf import OmegaConf

from macbench.errors import ConfigError

DEFAULTS = OmegaConf.create(
    {
        "methods": ["full", "mac"], "prompts": 16, "new_tokens": 64, "ctx": 4096, "device": "cuda", "batch": 16, "backend": "auto", "gguf": None,
        "out": None,
    }
)  # fmt: skip
_TYPES = {
    "method": pa.string(), "way": pa.string(), "batch": pa.int64(), "graph": pa.bool_(), "prompt": pa.int64(), "prompt_tokens": pa.int64(),
    "new_tokens": pa.int64(), "same": pa.bool_(), "first_differing": pa.int64(), "gap": pa.float64(), "smallest_gap": pa.float64(),
}  # fmt: skip
SCHEMA = pa.schema(list(_TYPES.items()))
WAYS = {"eager": (False, False), "graph": (False, True), "batch, eager": (True, False), "batch, graph": (True, True)}  # batched, captured


def compare(network, prompts: list[list[int]], methods: dict, new_tokens: int, ctx: int, batch: int, layer_kernels) -> list[dict]:
    """A row per method, way and prompt (see ``SCHEMA``), in that order.

    ``first_differing``: index of the first generated token that is not that of batch 1, eager; None if all are the same. ``gap``: between the two
    largest logits of batch 1, eager, where that token was chosen. ``smallest_gap``: the smallest such gap of that text.
    """
    rows: list[dict] = []
    for name, method in methods.items():
        want: list[tuple[list[int], list[float]]] = []
        for way, (batched, graph) in WAYS.items():
            made = _texts(network, prompts, method, new_tokens, ctx, batch if batched else 1, graph, layer_kernels)
            want = want or made
            for i, ((tokens, _), (expected, gaps)) in enumerate(zip(made, want, strict=True)):
                at = next((j for j, pair in enumerate(zip(tokens, expected, strict=True)) if pair[0] != pair[1]), None)
                rows.append({
                    "method": name, "way": way, "batch": batch if batched else 1, "graph": graph, "prompt": i, "prompt_tokens": len(prompts[i]),
                    "new_tokens": len(tokens), "same": at is None, "first_differing": at, "gap": None if at is None else gaps[at],
                    "smallest_gap": min(gaps),
                })  # fmt: skip
    return rows


def _texts(network, prompts, method, new_tokens, ctx, size, graph, layer_kernels) -> list[tuple[list[int], list[float]]]:
    """Tokens of each prompt, and the gap between the two largest logits at each of them."""
    from macbench.engine import Engine, Request

    engine = Engine(network, layer_kernels, ctx, batch=size, graph=graph)
    made = []
    for start in range(0, len(prompts), size):
        ready = [engine.prefill(list(ids), method.prompt_queries) for ids in prompts[start : start + size]]
        seen = [_gaps(torch.stack([p.logits for p in ready]))]
        done = engine.decode_batch([Request(p, new_tokens) for p in ready], method, watch=lambda step, logits, seen=seen: seen.append(_gaps(logits)))
        made += [(g.tokens, [gaps[i] for gaps in seen]) for i, g in enumerate(done)]
        for prompt in ready:
            prompt.free()
    return made


def _gaps(logits: torch.Tensor) -> list[float]:
    """Of each row of logits [B, vocab]."""
    top = logits.float().topk(2).values
    return (top[:, 0] - top[:, 1]).tolist()


def told(rows: list[dict], method: str) -> list[str]:
    """Lines on one method: a line per way, and how near ties were."""
    mine = [row for row in rows if row["method"] == method]
    lines = []
    for way in WAYS:
        here = [row for row in mine if row["way"] == way]
        other = ", ".join(f"{r['prompt']} from token {r['first_differing']} (gap {r['gap']:.3f})" for r in here if not r["same"])
        lines.append(f"{method:<5} {way:<13} same text: {sum(r['same'] for r in here)} of {len(here)}{'; prompt ' + other if other else ''}")
    smallest = [row["smallest_gap"] for row in mine if row["way"] == "eager"]
    return [*lines, f"{method:<5} smallest gap between the two largest logits of a text: median {median(smallest):.3f}, least {min(smallest):.4f}"]


def main() -> None:
    from macbench_kernels import kernels

    from macbench.attention import table
    from macbench.attention.__main__ import facts
    from macbench.cli import load_option
    from macbench.methods.full import Full
    from macbench.methods.mac import MAC
    from macbench.models.weights import load, load_chat
    from macbench.tasks.ruler import Ruler

    config = OmegaConf.merge(DEFAULTS, OmegaConf.from_cli())
    spec = load_option("model", "smollm2")
    spec.gguf = config.gguf
    chat = load_chat(spec)
    network = load(spec, config.device, chat).network
    tasks = ("niah_single_1", "niah_multikey_2", "vt", "cwe")
    ruler = Ruler(chat, config.ctx, subtasks=list(tasks))
    prompts = [ruler.example(tasks[i % 4], i // 4).input_ids[: config.ctx - config.new_tokens] for i in range(config.prompts)]
    dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
    print(f"{len(prompts)} prompts, {config.new_tokens} greedy tokens, ctx {config.ctx}, {dtype}, {config.device}")
    rows: list[dict] = []
    for name, method in {"full": Full(), "mac": MAC()}.items():
        if name in config.methods:
            rows += compare(network, prompts, {name: method}, config.new_tokens, config.ctx, config.batch, kernels(config.backend, config.device))
            print("\n".join(told(rows, name)), flush=True)
    if config.out:
        known = {"model": "smollm2", "dtype": dtype, "ctx": config.ctx, "prompts": "RULER: " + ", ".join(tasks)}
        table.write(rows, Path(config.out), facts(config.device, "macbench.bench.same_tokens") | known, SCHEMA)
        print(f"records: {config.out}")


if __name__ == "__main__":
    try:
        with torch.inference_mode():
            main()
    except ConfigError as error:
        print(f"macbench: {error}", file=sys.stderr)
        sys.exit(2)
