"""What a task is: prompts with references, a generation limit and a score. Tasks know no model and no method."""

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Example:
    """One prompt.

    ``prompt``: rendered text (chat template and answer prefix included). ``input_ids``: its tokens, one BOS.
    ``references``: accepted strings, what they mean is the task's scorer's business. ``max_new_tokens``: generation limit.
    ``example_id`` is unique within a subtask and stable across runs.
    """

    subtask: str
    example_id: str
    prompt: str
    input_ids: list[int]
    references: list[str]
    max_new_tokens: int
    meta: dict = field(default_factory=dict)


class Task(Protocol):
    """A benchmark. ``version`` changes whenever a prompt or a score can change."""

    name: str
    version: int
    subtasks: tuple[str, ...]

    def example(self, subtask: str, index: int) -> Example:
        """Example ``index`` of a subtask, made alone: a pure function of the task's settings and the index. Its id is ``str(index)``."""

    def score(self, example: Example, text: str) -> float:
        """Score of a generated text, 0 to 1."""

    def protocol(self) -> dict:
        """What a reader must know to repeat the numbers: template hash, lengths, data and its hash, version."""
