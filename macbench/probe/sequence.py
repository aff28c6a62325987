"""A training sequence: tokens, and which of them the model must have said itself."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from macbench.models.chat import Chat

Span = tuple[int, int]


@dataclass
class Sequence:
    """``ids``: int32 [n]. ``answers``: token ranges of the answers, the end of turn after each included; the first one comes first.

    ``evidence``: for each answer the token ranges of what it is read from; empty where a family does not say.
    """

    family: str
    ids: np.ndarray
    answers: list[Span]
    evidence: list[list[Span]] = field(default_factory=list)


class Dialogue:
    """Texts around the turns of one conversation in a chat template: ``head`` question ``tail`` answer ``between`` question ..."""

    def __init__(self, chat: Chat):
        self.chat, self.head, self.tail = chat, chat.head, chat.tail
        self.bos = chat.encode(chat.head or "a")[: chat.bos_count]

    @cached_property
    def _closing(self) -> list[int]:
        """Tokens between an answer and the next question. A tokenizer's own idea of its end-of-turn token may be another than its template's."""
        if not self.tail:
            return [self.chat.tokenizer.eos_token_id, *self.chat.encode_piece("\n\n")]
        marks = [f"\x00{i}\x00" for i in range(3)]
        turns = [{"role": role, "content": mark} for role, mark in zip(("user", "assistant", "user"), marks, strict=True)]
        text = self.chat.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return self.chat.encode_piece(text.partition(marks[1])[2].partition(marks[2])[0])

    @property
    def eos(self) -> int:
        """The token that ends an answer."""
        return self._closing[0]

    @cached_property
    def between(self) -> str:
        """What stands between that token and the next question."""
        return self.chat.tokenizer.decode(self._closing[1:])

    def encode(self, *texts: str) -> list[np.ndarray]:
        return [np.array(ids, np.int32) for ids in self.chat.encode_pieces(list(texts))]

    def turns(self, asked: list[tuple[str, str]]) -> tuple[list[np.ndarray], list[Span]]:
        """Tokens of (text up to the answer, answer) pairs, an end-of-turn token after each answer; and the answers' ranges."""
        encoded = self.encode(*(text for turn in asked for text in turn))
        parts, answers, at = [], [], 0
        for prompt, answer in zip(encoded[0::2], encoded[1::2], strict=True):
            answer = np.append(answer, np.int32(self.eos))
            parts += [prompt, answer]
            answers.append((at + len(prompt), at + len(prompt) + len(answer)))
            at = answers[-1][1]
        return parts, answers


def shifted(spans: list[Span], by: int) -> list[Span]:
    return [(start + by, end + by) for start, end in spans]
