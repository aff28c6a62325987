"""What a task is: prompts with references, a generation limit and a score. Tasks know no model and no method."""

from dataclasses import dataclass, field
from typing import Protocol

import pandas as pd

from macbench.sampling import Sampling


@dataclass(frozen=True)
class Example:
    """One prompt.

    ``prompt``: rendered text (chat template and answer prefix included). ``input_ids``: its tokens, one BOS.
    ``references``: accepted strings, what they mean is the task's scorer's business. ``max_new_tokens``: generation limit.
    ``example_id`` is unique within a subtask and stable across runs. ``sampling``: greedy unless a protocol says otherwise.
    ``stop``: strings that end the answer and are no part of it; ``ignore_eos``: the model's end-of-sequence tokens do not end it.
    ``question``: how many of the last ``input_ids`` ask the question, chat template and answer prefix included; 0 if no text is asked about.
    ``meta``: facts of the example, kept as JSON in its sample row.
    """

    subtask: str
    example_id: str
    prompt: str
    input_ids: list[int]
    references: list[str]
    max_new_tokens: int
    meta: dict = field(default_factory=dict)
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    question: int = 0


@dataclass(frozen=True)
class Question:
    """Something to ask a judge about a text: does ``context`` include ``event``? ``prompt``: the benchmark's words for it."""

    context: str
    event: str
    prompt: str


class Task(Protocol):
    """A benchmark. ``version`` changes whenever a prompt or a score can change.

    A task may also have any of these:
    ``size(subtask) -> int``: how many examples there are, for a benchmark that has a last one.
    ``follow_up(example, text) -> Example | None``: a second call whose prompt is made from the first answer; its text is what is scored.
    ``tables(samples) -> list[tuple[str, DataFrame]]``: more tables with their titles, made from the sample rows of a run;
    ``layer_tables(layers)``: from its layer rows.
    ``reaches_limit``: whether texts are expected to be as long as they may be.
    ``follow``: for how many steps every method follows full attention's text.
    ``guesses(samples) -> dict[str, float]``: scores that take no reading, by name: the chance level, the best constant answer. Static.
    ``checks(samples)``, ``verdict(answer)``, ``judged(texts, checks)`` and ``official_judge``: questions for a judge about the texts of a
    run and what becomes of the answers (see ``macbench/judging``); none of them needs an instance.
    """

    name: str
    version: int
    subtasks: tuple[str, ...]

    def example(self, subtask: str, index: int) -> Example:
        """Example ``index`` of a subtask, made alone: a pure function of the task's settings and the index. Its id is ``str(index)``."""

    def score(self, example: Example, text: str) -> float:
        """Score of a generated text, 0 to 1."""

    def protocol(self) -> dict:
        """What a reader must know to repeat the numbers: template hash, lengths, data and its hash, version."""


def count(task: Task, subtask: str, limit: int) -> int:
    """How many examples of a subtask ``limit`` asks for."""
    return min(limit, task.size(subtask)) if hasattr(task, "size") else limit


def guesses(task: Task | type, samples: pd.DataFrame) -> dict[str, float]:
    """The task's ``guesses`` for the examples of these sample rows; none if it has no such thing."""
    return task.guesses(samples) if hasattr(task, "guesses") and len(samples) else {}


def card(task: Task, source: str, template_sha256: str) -> dict:
    """What a protocol begins with: which benchmark at which version, whose prompts, and how much of it. ``task`` has ``ctx`` and ``seed``."""
    return {
        "task": task.name,
        "version": task.version,
        "source": source,
        "template_sha256": template_sha256,
        "ctx": task.ctx,
        "seed": task.seed,
        "subtasks": list(task.subtasks),
    }
