"""Do a captured step, an eager step and a batch of requests write the same greedy text? SmolLM2, prompts of RULER.

python -m macbench.bench.same_tokens [prompts=16] [new_tokens=64] [ctx=4096] [device=cuda] [dtype=auto] [batch=16] [gguf=FILE] [out=FILE.parquet]

The first prompt gets the longest text and the last one the shortest, of ``new_tokens``, so that a batch has requests that have ended beside others.
Each way is compared with batch 1, eager. Until the first token that differs both were given the same tokens, so their logits can be compared
there: how far apart they are at every step, and whether a difference as large as those before it is enough to turn the two best
around. dtype=float32 makes roundings 2^16 times smaller. "batch, invariant" is a batch whose attention goes request by request
(``batch_invariant`` of the engine): if it writes what single requests write, all that a batch changes is the order of sums in its attention.
"""

import sys
from pathlib import Path
from statistics import median

import pyarrow as pa
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from macbench.bench.watched import Steps, Watched, decoded
from macbench.errors import ConfigError, choose, one_line
from macbench.methods.full import Full

DEFAULTS = OmegaConf.create(
    {
        "methods": ["full", "mac"], "prompts": 16, "new_tokens": 64, "ctx": 4096, "device": "cuda", "dtype": "auto", "batch": 16, "backend": "auto",
        "gguf": None, "out": None,
    }
)  # fmt: skip
_APART = 2  # tokens from the end of one text to that of the next
_LEAST = {"prompts": 1, "new_tokens": 2, "ctx": 64, "batch": 2}
_TYPES = {
    "method": pa.string(), "way": pa.string(), "batch": pa.int64(), "graph": pa.bool_(), "invariant": pa.bool_(), "prompt": pa.int64(),
    "prompt_tokens": pa.int64(), "new_tokens": pa.int64(), "same": pa.bool_(), "first_differing": pa.int64(), "gap": pa.float64(),
    "smallest_gap": pa.float64(), "differences": pa.list_(pa.float64()), "difference_before": pa.float64(), "gap_change": pa.float64(),
    "explained": pa.bool_(), "first_other_match": pa.int64(), "other_hits": pa.int64(), "other_entries": pa.int64(), "nearness": pa.float64(),
}  # fmt: skip
SCHEMA = pa.schema(list(_TYPES.items()))
# Batched, captured, request by request.
WAYS = {
    "eager": (False, False, False), "graph": (False, True, False), "batch, eager": (True, False, False), "batch, graph": (True, True, False),
    "batch, invariant": (True, True, True),
}  # fmt: skip


def compare(
    network, prompts: list[list[int]], methods: dict, new_tokens: list[int], ctx: int, batch: int, layer_kernels, ways=tuple(WAYS)
) -> list[dict]:
    """A row per method, way and prompt (see ``SCHEMA``), in that order.

    ``first_differing``: index of the first generated token that is not that of batch 1, eager; None if all are the same. ``gap``: between the two
    largest logits of batch 1, eager, where that token was chosen; ``smallest_gap``: the smallest such gap of that text. For further columns
    see ``difference`` and ``matching``.
    """
    rows: list[dict] = []
    for name, method in methods.items():
        want: list[Steps] = []
        for way in ways:
            batched, graph, invariant = WAYS[way]
            size = batch if batched else 1
            made = decoded(network, prompts, method, new_tokens, ctx, size, graph, invariant, layer_kernels)
            want = want or made
            for i, (got, expected) in enumerate(zip(made, want, strict=True)):
                row = {"method": name, "way": way, "batch": size, "graph": graph, "invariant": invariant, "prompt": i}
                row |= {"prompt_tokens": len(prompts[i]), "new_tokens": len(got.tokens), "smallest_gap": min(gaps(expected.logits))}
                rows.append(row | difference(got, expected) | matching(got, expected))
    return rows


def gaps(logits: torch.Tensor) -> list[float]:
    """Between the two largest of each row of logits [n, vocab]."""
    top = logits.topk(2).values
    return (top[:, 0] - top[:, 1]).tolist()


def difference(got: Steps, want: Steps) -> dict:
    """How far logits are from those of batch 1, eager, where both were given the same tokens.

    ``differences``: the largest of any logit, for each token up to the first that differs. ``difference_before``: the largest of those before it.
    ``gap_change``: how much nearer, there, the logit of the token that was chosen came to that of the token of batch 1; never less than the gap,
    since each is the best of its own text. ``explained``: the gap is at most twice ``difference_before``, by which two logits can come nearer
    at a step like those before.
    """
    at = _first(a != b for a, b in zip(got.tokens, want.tokens, strict=True))
    upto = len(want.tokens) if at is None else at + 1
    apart = (got.logits[:upto] - want.logits[:upto]).abs().amax(1).tolist()
    found = {"same": at is None, "first_differing": at, "gap": None, "differences": apart, "gap_change": None, "explained": None}
    found["difference_before"] = max(apart if at is None else apart[:at], default=0.0)
    if at is not None:
        here, there = ((steps.logits[at, want.tokens[at]] - steps.logits[at, got.tokens[at]]).item() for steps in (want, got))
        found |= {"gap": gaps(want.logits[at : at + 1])[0], "gap_change": here - there}
        found["explained"] = found["gap"] <= 2 * found["difference_before"]
    return found


def matching(got: Steps, want: Steps) -> dict:
    """Where MAC first matches otherwise than at batch 1, eager, in any layer and head, up to the first token that differs.

    ``first_other_match``: the token that this step makes. ``other_hits``: heads that hit in one and miss in the other; ``other_entries``: heads
    that hit in both and reuse another entry. ``nearness``: the largest distance to the radius, over the radius, of the former at batch 1.
    """
    found = dict.fromkeys(("first_other_match", "other_hits", "other_entries", "nearness"))
    if want.sources is None:
        return found
    upto = _first(a != b for a, b in zip(got.tokens, want.tokens, strict=True))
    other = (got.sources != want.sources).flatten(1)[:upto]
    step = _first(other.any(1).tolist())
    if step is not None:
        one, two = got.sources[step], want.sources[step]
        flipped = (one < 0) != (two < 0)
        found |= {"first_other_match": step + 1, "other_hits": int(flipped.sum()), "other_entries": int(other[step].sum() - flipped.sum())}
        found["nearness"] = (want.distances[step][flipped] / want.radius - 1).abs().max().item() if flipped.any() else None
    return found


def _first(flags) -> int | None:
    return next((i for i, flag in enumerate(flags) if flag), None)


def told(rows: list[dict], method: str) -> list[str]:
    """Lines on one method: a line per way and one per text that differs, and how near ties were."""
    mine = [row for row in rows if row["method"] == method]
    lines = []
    for way in dict.fromkeys(row["way"] for row in mine):
        here = [row for row in mine if row["way"] == way]
        apart = [value for row in here for value in row["differences"]]
        line = f"{method:<5} {way:<16} same text: {sum(r['same'] for r in here)} of {len(here)}"
        line += f"; logits differ by {median(apart):.2g} (median), at most {max(apart):.2g}"
        matched = [row for row in here if row["first_other_match"] is not None]
        lines += [line + f"; other matches in {len(matched)}" * (method == "mac"), *(_one(row) for row in here if not row["same"])]
    smallest = [row["smallest_gap"] for row in mine if row["way"] == "eager"]
    return [*lines, f"{method:<5} smallest gap between the two largest logits of a text: median {median(smallest):.3f}, least {min(smallest):.4f}"]


def _one(row: dict) -> str:
    """On a text that differs."""
    at = row["first_differing"]
    said = f"      prompt {row['prompt']} from token {at}: gap {row['gap']:.3f}, changed by {row['gap_change']:.3f}; logits differ by "
    said += f"{row['differences'][at]:.3f} there, by up to {row['difference_before']:.3f} before"
    said += ": as before is enough" if row["explained"] else ": more than before"
    if row["first_other_match"] is not None:
        near = "" if row["nearness"] is None else f", within {row['nearness']:.2g} of the radius"
        said += f"; matches differ from token {row['first_other_match']}: {row['other_hits']} hits{near}, {row['other_entries']} entries"
    return said


def configured(argv: list[str] | None = None):
    """``DEFAULTS`` with what the command line says; raises a ConfigError."""
    said = sys.argv[1:] if argv is None else argv
    try:
        given = OmegaConf.from_cli(said)
        for key in given:
            choose("key", key, DEFAULTS)
        config = OmegaConf.merge(DEFAULTS, given)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError("arguments", " ".join(said), f"must be key=value of {', '.join(DEFAULTS)} ({one_line(error)})") from error
    for key, least in _LEAST.items():
        if not isinstance(config[key], int) or isinstance(config[key], bool) or config[key] < least:
            raise ConfigError(key, config[key], f"must be an integer of at least {least}")
    for key in ("gguf", "out"):
        if not isinstance(config[key], str | None):
            raise ConfigError(key, config[key], "must be null or a file's path")
    if config.new_tokens >= config.ctx:
        raise ConfigError("new_tokens", config.new_tokens, f"must be less than ctx={config.ctx}, which bounds prompt plus generated tokens")
    if not config.methods:
        raise ConfigError("methods", config.methods, "must list at least one of full, mac")
    for method in config.methods if OmegaConf.is_list(config.methods) else [config.methods]:
        choose("methods", method, ("full", "mac"))
    return config


def main() -> None:
    from macbench_kernels import UnsupportedError, kernels

    from macbench.attention import table
    from macbench.attention.__main__ import facts
    from macbench.cli import load_option
    from macbench.models.weights import load, load_chat, max_context, resolve_device
    from macbench.tasks.ruler import Ruler

    config = configured()
    device, target = resolve_device(config.device), table.ready(Path(config.out)) if config.out else None
    try:
        layer_kernels = kernels(config.backend, device)
    except UnsupportedError as error:
        raise ConfigError("backend", config.backend, str(error).removeprefix(f"backend={config.backend}").strip(": ")) from error
    spec = load_option("model", "smollm2")
    spec.gguf, spec.dtype = config.gguf, config.dtype
    if config.ctx > (most := max_context(spec)):
        raise ConfigError("ctx", config.ctx, f"must be at most {most}, the positions of {spec.name}")
    chat = load_chat(spec)
    network = load(spec, device, chat).network
    torch.set_float32_matmul_precision("highest")
    tasks = ("niah_single_1", "niah_multikey_2", "vt", "cwe")
    ruler = Ruler(chat, config.ctx, subtasks=list(tasks))
    new_tokens = [config.new_tokens + _APART * i for i in reversed(range(config.prompts))]
    longest = new_tokens[0]
    if longest >= config.ctx:
        raise ConfigError("prompts", config.prompts, f"makes the first text {longest} tokens long, which must be less than ctx={config.ctx}")
    prompts = [ruler.example(tasks[i % 4], i // 4).input_ids[: config.ctx - longest] for i in range(config.prompts)]
    dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
    print(f"{len(prompts)} prompts, {config.new_tokens} to {longest} greedy tokens, ctx {config.ctx}, {dtype}, {device}")
    ways = [way for way, (*_, invariant) in WAYS.items() if not invariant or (device == "cuda" and config.batch <= 16)]
    known = {"model": "smollm2", "dtype": dtype, "ctx": config.ctx, "prompts": "RULER: " + ", ".join(tasks)}
    rows: list[dict] = []
    for name, method in {"full": Full(), "mac": Watched()}.items():
        if name in config.methods:
            rows += compare(network, prompts, {name: method}, new_tokens, config.ctx, config.batch, layer_kernels, ways)
            print("\n".join(told(rows, name)), flush=True)
            if target is not None:
                table.write(rows, target, facts(device, "macbench.bench.same_tokens") | known, SCHEMA)
    if target is not None:
        print(f"records: {target}")


if __name__ == "__main__":
    try:
        with torch.inference_mode():
            main()
    except ConfigError as error:
        print(f"macbench: {error}", file=sys.stderr)
        sys.exit(2)
