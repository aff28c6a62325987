"""A judge without a model: an event is included if most of its words are in the text. For tests and a first look; not official."""

import re
from dataclasses import dataclass
from functools import lru_cache

from macbench.errors import ConfigError
from macbench.judging.base import Verdict

_WORD = re.compile(r"[^\W_]+")
_EMPTY = frozenset("a an and at by for from in into my of on or our s the their to use with your yourself featuring random".split())
_SUFFIXES = ("ing", "ed", "es", "s")
_SHORTEST_STEM = 4  # letters


@dataclass
class LexicalJudge:
    """Yes if at least ``share`` of the event's words, endings aside, occur in the text."""

    share: float = 0.75

    name = "lexical"

    def __post_init__(self):
        if not isinstance(self.share, int | float) or not 0 < self.share <= 1:
            raise ConfigError("judge.share", self.share, "must be above 0 and at most 1")

    def prepare(self) -> None:
        """Nothing is needed."""

    def facts(self) -> dict:
        return {"judge": self.name, "share": self.share, "rule": 1}

    def ask(self, questions, device, settled):
        for index, question in enumerate(questions):
            wanted, there = stems(question.event), stems(question.context)
            enough = bool(wanted) and len(wanted & there) >= self.share * len(wanted)
            yield index, Verdict("yes" if enough else "no")


@lru_cache(maxsize=4096)
def stems(text: str) -> frozenset[str]:
    """The words of a text that mean something, without plural and tense endings."""
    return frozenset(stem(word) for word in set(_WORD.findall(text.lower())) if word not in _EMPTY)


def stem(word: str) -> str:
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= _SHORTEST_STEM:
            word = word.removesuffix(suffix)
            break
    word = word.removesuffix("e") if len(word) > _SHORTEST_STEM else word
    return word[:-1] + "i" if word.endswith("y") else word  # library, libraries
