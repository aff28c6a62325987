"""What a command asked of a run: how many examples of each subtask, and which variants, in the order of its tables."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from macbench.errors import ConfigError, one_line
from macbench.untrusted import document

FILE = "asked.json"


# No run has more examples of a subtask; a file that says so is not one of ours.
_MOST = 100_000
_MOST_TOGETHER = 20 * _MOST


@dataclass(frozen=True)
class Asked:
    """``examples``: number by subtask, indices from 0. ``variants``: [method, label]."""

    examples: dict[str, int]
    variants: list[list[str]]

    def places(self) -> list[tuple[str, int]]:
        """(subtask, index) of every example."""
        return [(subtask, index) for subtask, number in self.examples.items() for index in range(number)]

    def rows(self, samples: pd.DataFrame) -> pd.DataFrame:
        """The sample rows of these examples, in this order."""
        those = {(subtask, str(index)) for subtask, index in self.places()}
        samples = samples[[pair in those for pair in zip(samples.subtask, samples.example_id, strict=True)]]
        order = {tuple(variant): i for i, variant in enumerate(self.variants)}
        rank = [order.get(pair, len(order)) for pair in zip(samples.method, samples.variant, strict=True)]
        place = {subtask: i for i, subtask in enumerate(self.examples)}
        samples = samples.assign(_rank=rank, _place=samples.subtask.map(place))
        return samples.sort_values(["_rank", "_place"], kind="stable").drop(columns=["_rank", "_place"])

    def text(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def answered(samples: pd.DataFrame) -> Asked:
    """What some sample rows are a complete answer to."""
    counts = samples.groupby("subtask", sort=False).example_id.nunique()
    variants = samples[["method", "variant"]].drop_duplicates()
    return Asked({subtask: int(number) for subtask, number in counts.items()}, variants.values.tolist())


def read(run: Path) -> Asked:
    """Of the last command that worked on a run; subtasks in the order of its protocol, however the file has them."""
    try:
        found = document(run / FILE)
        examples = {str(k): int(n) for k, n in found["examples"].items()}
        place = {subtask: i for i, subtask in enumerate(_protocol(run))}
        asked = Asked(dict(sorted(examples.items(), key=lambda e: place.get(e[0], len(place)))), [list(map(str, v)) for v in found["variants"]])
        numbers = asked.examples.values()
        if any(not 0 <= n <= _MOST for n in numbers) or sum(numbers) > _MOST_TOGETHER or any(len(v) != 2 for v in asked.variants):
            raise ValueError("numbers out of range")
        return asked
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError("RUN", run, f"has no usable {FILE} ({one_line(error)}); run its command again") from None


def _protocol(run: Path) -> list[str]:
    """Subtasks as the run's protocol has them; none where that cannot be read."""
    try:
        return [str(subtask) for subtask in document(run / "environment.json")["protocol"]["subtasks"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []
