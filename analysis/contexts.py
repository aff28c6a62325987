"""Score of each method against the length of the context, by subtask; and full attention's scores as a table, for a model's card.

One picture and two tables for every model and task with runs of one experiment at ``FEWEST`` contexts or more.
"""

import math
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from analysis import style, table
from analysis.load import swept
from analysis.records import Missing, Records, Source
from analysis.style import Drawn
from macbench import stats
from macbench.summary import REFERENCE, WHOLE

NAME = "contexts"
TITLE = "Score against the length of the context"
FEWEST = 3
_COLUMNS = 4  # panels side by side
_SCORED = {"ruler"}  # tasks whose subtasks are the same at every length


def longest(records: Records) -> dict[tuple[str, str, str], dict[int, tuple[pd.DataFrame, Source]]]:
    """For each task, model and kind of run (``Source.apart``), by ctx: the sample rows of one run with full attention.

    Of several a GPU's, then the one with the most methods, the most rows, the newest.
    """
    found: dict = {}
    for run in records.runs:
        try:
            frame, source = records.samples(run), records.source(run)
        except Missing:
            continue  # other figures tell
        first = frame.iloc[0]
        if first.task not in _SCORED or REFERENCE not in set(frame.method) or swept(frame):
            continue
        frame = frame[frame.variant == ""]  # a budget's knob differs from length to length
        rank = ("NVIDIA" in source.device, frame.method.nunique(), len(frame), source.facts.get("started", ""))
        place = found.setdefault((first.task, first.model, source.apart), {})
        if first.ctx not in place or rank > place[first.ctx][0]:
            place[int(first.ctx)] = (rank, frame, source)
    found = {key: {ctx: kept[1:] for ctx, kept in sorted(by.items())} for key, by in found.items() if len(by) >= FEWEST}
    if not found:
        raise Missing(f"no model has runs of ruler with full attention at {FEWEST} contexts; python -m macbench.run compare=[full] ctx=8k makes one")
    return found


def numbers(runs: dict[int, tuple[pd.DataFrame, Source]]) -> pd.DataFrame:
    """A row per method, subtask and ctx: examples, mean score, its standard error and 95% interval.

    ``all`` is the mean over subtasks, where every one of them was run.
    """
    rows, every = [], {subtask for frame, _ in runs.values() for subtask in frame.subtask}
    for ctx, (frame, _) in runs.items():
        for method, mine in frame.groupby("method", sort=False):
            parts = {subtask: part.score.to_numpy(float) for subtask, part in mine.groupby("subtask", sort=False)}
            whole = [(WHOLE, list(parts.values()))] * (set(parts) == every)
            for subtask, strata in [*whole, *((name, [x]) for name, x in parts.items())]:
                low, high = stats.bootstrap_interval(strata, draws=2000)
                row = {"method": method, "subtask": subtask, "ctx": ctx, "examples": sum(map(len, strata)), "score": stats.mean(strata)}
                rows.append(row | {"se": stats.standard_error(strata), "low": low, "high": high})
    return pd.DataFrame(rows)


def make(records: Records, out: Path) -> list[Drawn]:
    drawn = []
    for (task, model, apart), runs in longest(records).items():
        sources, found, name = [source for _, source in runs.values()], numbers(runs), "-".join([NAME, task, model, *re.findall(r"\w+", apart)])
        subtasks = [WHOLE, *(s for s in order(runs) if s in set(found.subtask))]
        made = style.made(sources, f"{model}, {task}: {examples(found)} examples of each subtask at {', '.join(map(style.tokens, runs))}")
        made += lacking(found, subtasks[1:])
        title = ", ".join(filter(None, [task, model, apart]))
        drawn.append(
            picture(
                found,
                subtasks,
                out,
                name,
                f"{TITLE}, {title}",
                f"{made} Bars: 95% bootstrap intervals, without width where all examples score alike.",
            )
        )
        text = f"{made} ± one standard error, in brackets the number of examples."
        card = shown(found[found.method == REFERENCE], "subtask", subtasks, list(runs))
        drawn.append(table.save(card, out, f"{name}-full", f"Full attention by subtask, {title}", text, ""))
        methods = shown(found[found.subtask == WHOLE], "method", list(dict.fromkeys(found.method)), list(runs))
        drawn.append(table.save(methods, out, f"{name}-methods", f"Methods, mean over subtasks, {title}", text, ""))
    return drawn


def order(runs: dict[int, tuple[pd.DataFrame, Source]]) -> Iterator[str]:
    """Subtasks as the protocol of the runs lists them."""
    for _, source in runs.values():
        if not (source.facts.get("protocol") or {}).get("subtasks"):
            raise Missing(f"{source.path / 'environment.json'} has no protocol with subtasks")
    return iter(dict.fromkeys(s for _, source in runs.values() for s in source.facts["protocol"]["subtasks"]))


def examples(found: pd.DataFrame) -> str:
    """How many a subtask has, as a number or a range."""
    counts = found[found.subtask != WHOLE].examples
    return f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"


def lacking(found: pd.DataFrame, every: list[str]) -> str:
    """A sentence for each length at which some subtasks were not run; '' without."""
    said = ""
    for ctx, mine in found.groupby("ctx"):
        if lacks := [subtask for subtask in every if subtask not in set(mine.subtask)]:
            what = ", ".join(lacks) if len(lacks) < 5 else f"{len(lacks)} of {len(every)} subtasks"
            said += f" No mean at {style.tokens(ctx)} (without {what})."
    return said


def picture(found: pd.DataFrame, subtasks: list[str], out: Path, name: str, title: str, caption: str) -> Drawn:
    rows = math.ceil(len(subtasks) / _COLUMNS)
    size = (style.WIDTH, 0.3 + 1.25 * rows)
    figure, panels = plt.subplots(rows, _COLUMNS, figsize=size, layout="constrained", sharex=True, sharey=True, squeeze=False)
    styles, methods = style.methods(found.method), list(dict.fromkeys(found.method))
    # Side by side, so that no bar hides another, and all of a length within 0.6 of the way to the next one.
    lengths = sorted(found.ctx.unique())
    nearest = min((later / earlier for earlier, later in pairwise(lengths)), default=2)
    step = min(1.09, nearest ** (0.6 / max(1, len(methods) - 1)))
    aside = {method: step ** (i - (len(methods) - 1) / 2) for i, method in enumerate(methods)}
    for axes, subtask in zip(panels.flat, subtasks, strict=False):
        for method, mine in found[found.subtask == subtask].groupby("method", sort=False):
            style.line(
                axes,
                mine.ctx * aside[method],
                mine[["score", "low", "high"]].to_numpy(),
                label=method,
                **styles[method] | {"markersize": 3, "linewidth": 1},
            )
        style.doubling(axes, lengths)
        axes.tick_params(axis="x", labelsize=6)
        axes.set_title("mean over subtasks" if subtask == WHOLE else subtask)
        axes.set_ylim(-0.05, 1.05)
    for axes in panels.flat[len(subtasks) :]:
        axes.set_visible(False)
    for axes in panels.flat[max(len(subtasks) - _COLUMNS, 0) : len(subtasks)]:
        axes.tick_params(labelbottom=True)
    for axes in panels[:, 0]:
        axes.set_ylabel("score")
    return style.save(figure, out, name, title, caption, "", legend=panels.flat[0])


def shown(found: pd.DataFrame, key: str, names: list[str], lengths: list[int]) -> pd.DataFrame:
    """score ± standard error (examples) as text: a row per name, a column per ctx."""

    def cell(row) -> str:
        return f"{row.score:.2f}{'' if pd.isna(row.se) else f' ± {row.se:.2f}'} ({row.examples})"

    cells = {(getattr(row, key), row.ctx): cell(row) for row in found.itertuples()}
    return pd.DataFrame([{key: name} | {style.tokens(ctx): cells.get((name, ctx), table.MISSING) for ctx in lengths} for name in names])
