"""From what each variant made of an example to the rows of the three tables: every number is a sum of counts or a ratio of sums.

A generation has one sample row, but as many step rows as steps: steps and layers are made column by column (masked: nothing was counted).
"""

import json

import numpy as np

from macbench.counting import READ_CATEGORIES, TOTALS, ratios
from macbench.engine import Generation
from macbench.generate import Answer, failure
from macbench.settings import Variant
from macbench.tasks.base import Example, Task

Columns = dict[str, np.ndarray | str]


def records(ctx: int, task: Task, variants: list[Variant], example: Example, made: list, run_id: str, batched: bool = False) -> dict[str, list[dict]]:
    """The three tables (see ``RunDirectory.write_example``) from what each variant made of an example. A failure becomes a row with ``error``.

    ``batched``: whether the run decodes several examples in step; then ``meta`` says which these were.
    """
    tables = {"samples": [], "steps": [], "layers": []}
    texts: dict[int, list[int]] = {}
    for i, (variant, answer) in enumerate(zip(variants, made, strict=True)):
        key = {"run_id": run_id, "method": variant.name, "variant": variant.label}
        key |= {"subtask": example.subtask, "example_id": example.example_id}
        row = key | {"task": task.name, "ctx": ctx, "prompt_tokens": len(example.input_ids), "reference": list(example.references)}
        meta = dict(example.meta)
        if isinstance(answer, Answer):
            texts[i] = answer.generation.tokens
            try:
                row["score"] = task.score(example, answer.text)
            except Exception as error:  # models write anything; what one text does to a scorer costs no other's row
                row["error"] = f"scoring fails: {failure(error)}"
            meta |= {"earlier_texts": answer.earlier} if answer.earlier else {}
            meta |= {"resumed_at": answer.resumed_at} if answer.resumed_at else {}
            meta |= {"prefill_chunk": answer.prefill_chunk} if answer.prefill_chunk else {}
            meta |= {"decoded_with": answer.together} if batched else {}
            row |= {"text": answer.text, "prefill_s": answer.prefill_s}
            row |= {"prompt_tokens": answer.prompt_tokens} | sample_columns(answer.generation) | answer.fidelity
            tables["steps"].append(step_rows(answer.generation, key))
            tables["layers"].append(layer_rows(answer.generation, key, answer.layer_errors))
        else:
            row["error"] = failure(answer)
        tables["samples"].append(row | {"meta": json.dumps(meta, default=str)})
    _mark_divergence(tables["samples"], variants, texts)
    return tables


def _mark_divergence(rows: list[dict], variants: list[Variant], texts: dict[int, list[int]]) -> None:
    """``first_divergence``: index of the first generated token that differs from full attention's; null if none does or full was not run."""
    full = next((texts[i] for i, v in enumerate(variants) if v.name == "full" and i in texts), None)
    for i, row in enumerate(rows):
        if full is not None and i in texts and texts[i] != full:
            shorter = min(len(full), len(texts[i]))
            row["first_divergence"] = next((j for j in range(shorter) if full[j] != texts[i][j]), shorter)


def sample_columns(generation: Generation) -> dict:
    """Counts, ratios and times of a whole generation."""
    steps = len(generation.step_seconds)
    decode = float(generation.step_seconds.sum())
    sums = {name: int(generation.counts[name].sum()) for name in (*TOTALS, "hits", "match_heads")}
    return {
        "new_tokens": len(generation.tokens),
        "decode_steps": steps,
        "question_steps": generation.question_steps,
        "finish_reason": generation.finish_reason,
        "setup_s": generation.setup_seconds,
        "decode_s": decode,
        "tpot_ms": 1e3 * decode / steps if steps else None,
        **{name: sums[name] for name in TOTALS},
        **ratios(sums),
        "bytes_pre": generation.prepared_bytes,
    }


def step_rows(generation: Generation, key: dict[str, str]) -> Columns:
    """A row per decode step; ``position`` is the 0-based position of the token that the step processes."""
    place = {"step": np.arange(len(generation.step_seconds)), "position": generation.positions, "latency_ms": 1e3 * generation.step_seconds}
    return key | place | _columns(generation.counts, (1, 2))


def layer_rows(generation: Generation, key: dict[str, str], errors: list[float | None]) -> Columns:
    """A row per layer; ``errors`` of its attention outputs, or []."""
    layers = generation.counts["tokens_log"].shape[1]
    found = np.ma.masked_invalid(np.array(errors or [None] * layers, dtype=float))
    return key | {"layer": np.arange(layers)} | _columns(generation.counts, (0, 2)) | {"output_error": found}


def _columns(counts: dict[str, np.ndarray], axis: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Sums over ``axis`` of counts [steps, layers, 1] and what follows from them; see ``counting.ratios``."""
    sums = {name: counts[name].sum(axis=axis) for name in (*TOTALS, "hits", "match_heads", "chain_sum")}
    read = sum(sums[f"bytes_{category}"] for category in READ_CATEGORIES)
    reused = sums["match_heads"]
    return {
        **{name: sums[name] for name in TOTALS},
        "rho_log": np.ma.divide(sums["tokens_log"], sums["tokens_log_full"]),
        "rho_phys": np.ma.divide(sums["tokens_phys"], sums["tokens_phys_full"]),
        "rho_bytes": np.ma.divide(read, sums["bytes_full"]),
        "hit_rate": np.ma.divide(sums["hits"], reused),
        "chain_mean": np.ma.divide(sums["chain_sum"], reused),
        "chain_max": np.ma.masked_where(reused == 0, counts["chain_max"].max(axis=axis, initial=0)),
    }
