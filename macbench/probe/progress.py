"""What a run says while it learns: a line of JSON a step, and now and then a table of the answers by length and family, printed and as JSON.

``macbench.probe.learnt`` reads both files.
"""

import json
from collections import defaultdict
from pathlib import Path
from time import monotonic

import torch

from macbench.probe.mixture import Batch

EVERY = 20.0  # seconds between tables
LOG, ANSWERS = "log.jsonl", "answers.jsonl"  # a line a step; a line for every length and family of a table


class Report:
    """Counts exact answers by length and family since the last table; ``first`` questions are asked as in an evaluation.

    Of several processes the first one reports, with the answers of its own share of each step.
    """

    def __init__(self, folder: Path, families: tuple[str, ...], append: bool):
        self.file, self.table = ((folder / name).open("a" if append else "w") for name in (LOG, ANSWERS))
        self.families, self.shown, self.begun = families, monotonic(), monotonic()
        self.clear()

    def clear(self) -> None:
        self.answers: dict = defaultdict(lambda: [0, 0, 0, 0])  # (length, family): first right, first, all right, all
        self.steps: dict = defaultdict(lambda: [0, 0.0, 0.0])  # length: steps, seconds, loss
        self.since: float | None = None  # progress at the first of these steps

    def step(self, batches: list[Batch], right, **line) -> None:
        asked = [pair for batch in batches for pair in zip(batch.first.tolist(), batch.family.tolist(), strict=True)]
        for i, (first, family) in enumerate(asked):
            counts = self.answers[line["length"], self.families[family]]
            counts[0] += int(first and right[i])
            counts[1] += int(first)
            counts[2] += int(right[i])
            counts[3] += 1
        totals = self.steps[line["length"]]
        totals[0], totals[1], totals[2] = totals[0] + 1, totals[1] + line["seconds"], totals[2] + line["loss"]
        line["exact"] = round(float(right.mean()), 4)
        self.last = line
        self.since = line["progress"] if self.since is None else self.since
        print(json.dumps({key: round(x, 7) if isinstance(x, float) else x for key, x in line.items()}), file=self.file)
        if monotonic() - self.shown > EVERY:
            self.show()

    def show(self) -> None:
        if not self.steps:
            return
        peak = f"  peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else ""
        at = self.last
        print(f"{monotonic() - self.begun:6.0f} s  step {at['step']}  progress {at['progress']:.2f}  norm {at['norm']:.2f}{peak}")
        for length, (steps, seconds, loss) in sorted(self.steps.items()):
            found = [(family, counts) for (n, family), counts in sorted(self.answers.items()) if n == length]
            exact = "  ".join(f"{family} {c[0]}/{c[1]} {c[2] / c[3]:.2f}" for family, c in found)
            print(f"  {length:6d}  {steps:3d} x {seconds / steps:5.2f} s  loss {loss / steps:.3f}  {exact}")
            for family, (first_right, first, right, every) in found:
                row = {"since": round(self.since, 7), "step": at["step"], "length": length, "family": family}
                row |= {"first_right": first_right, "first": first, "exact": round(right / every, 2)}
                print(json.dumps(row), file=self.table)
        self.file.flush()
        self.table.flush()
        print(end="", flush=True)
        self.shown = monotonic()
        self.clear()

    def close(self) -> None:
        self.show()
        self.file.close()
        self.table.close()
