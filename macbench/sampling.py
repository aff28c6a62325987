"""How the next token is chosen, and when a text ends: greedy or sampled with one random number per token; strings that end an answer."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from macbench.errors import ConfigError

# Special tokens and halves of characters decode to nothing: look at a few tokens more than the string has bytes.
_SPARE_TOKENS = 4


def greedy(logits: torch.Tensor) -> int:
    """The most likely token of logits [vocab]."""
    return int(logits.argmax())


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 keep every token. Top-k is applied before top-p, as in vLLM."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self):
        _require(_is_number(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "must be a number of at least 0")
        _require(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "must be above 0 and at most 1")
        _require(isinstance(self.top_k, int) and self.top_k >= 0, "top_k", self.top_k, "must be an integer of at least 0 (0: every token)")
        _require(isinstance(self.seed, int) and 0 <= self.seed < 2**63, "seed", self.seed, "must be an integer of at least 0")

    def sampler(self, skip: int = 0) -> Callable[[torch.Tensor], int]:
        """Chooses from logits [vocab], call by call. ``skip``: how many tokens of the same stream were chosen before.

        Each call takes exactly one uniform number from the stream of ``seed``: the same example gives the same text, methods are
        compared on the same random numbers, and an interrupted generation goes on where it was.
        """
        if self.temperature == 0:
            return greedy
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(skip):
            torch.rand((), generator=generator, dtype=torch.float64)

        def choose(logits: torch.Tensor) -> int:
            uniform = torch.rand((), generator=generator, dtype=torch.float64).to(logits.device)
            values, order = logits.double().topk(min(self.top_k or len(logits), len(logits)))
            share = torch.softmax(values / self.temperature, 0)
            below = share.cumsum(0) - share
            mass = (share * (below < self.top_p)).cumsum(0)
            place = torch.searchsorted(mass, uniform * mass[-1], right=True)
            return int(order[place.clamp(max=len(order) - 1)])

        return choose


class StopStrings:
    """True for token ids whose text has just come to contain one of ``strings``; only the last few tokens are looked at."""

    def __init__(self, decode: Callable[[list[int]], str], strings: tuple[str, ...]):
        self.decode, self.strings = decode, tuple(strings)
        self.tail = max((len(s.encode()) for s in self.strings), default=0) + _SPARE_TOKENS

    def __call__(self, tokens: list[int]) -> bool:
        if not self.strings:
            return False
        text = self.decode(tokens[-self.tail :])
        return any(string in text for string in self.strings)

    def cut(self, text: str) -> str:
        """The text before the first of the strings."""
        return text[: min((at for s in self.strings if (at := text.find(s)) >= 0), default=len(text))]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require(holds: bool, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"task.{key}", value, allowed)
