"""What a judge is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from macbench.tasks.base import Question


@dataclass(frozen=True)
class Verdict:
    """A judge's ``answer`` in its own words, or the ``error`` that kept it from one."""

    answer: str | None
    error: str | None = None


class Judge(Protocol):
    """Answers questions. ``facts`` are everything that can change an answer: they name the folder that answers are kept in."""

    name: str

    def prepare(self) -> None:
        """Raise a ConfigError now for what would go wrong later."""

    def facts(self) -> dict: ...

    def ask(self, questions: list[Question], device: str, settled: Callable[[str], bool]) -> Iterator[tuple[int, Verdict]]:
        """(index, verdict) of every question, in any order. Once ``settled(answer)`` holds, more words cannot change the verdict."""
