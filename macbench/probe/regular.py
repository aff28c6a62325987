"""Ordinary text and prompts on which the adapted model must stay near the base model."""

from dataclasses import dataclass

import numpy as np

from macbench.probe.sequence import Dialogue
from macbench.probe.text import Background
from macbench.tasks.ruler import protocol

LENGTH, ROWS = 4096, 2
LAST, OTHERS = 256, 384  # compared positions of a row: the last ones and random others
_TASKS = (
    "Summarise the following text in a few sentences.",
    "Explain what happens in this text.",
    "Rewrite the following passage in plain English.",
    "What is this passage about?",
)
_QUESTIONS = (
    "What do the documents say about {}?",
    "Who speaks of {} in the documents?",
    "What happened to {}?",
    "Why is {} mentioned?",
    "Where is {}?",
)


@dataclass
class Ordinary:
    """``ids``: int32 [ROWS, LENGTH]. ``columns``: int64 [ROWS, LAST + OTHERS], positions whose next-token distributions are compared."""

    ids: np.ndarray
    columns: np.ndarray


def make(dialogue: Dialogue, text: Background, seed: int, step: int, length: int = LENGTH, part: int = 0) -> Ordinary:
    """Rows for one part of a step: bare text, an instruction about a text with text as its answer, or a question over documents in RULER's words."""
    ids, columns = [], []
    for row in range(part * ROWS, (part + 1) * ROWS):
        rng = np.random.default_rng([seed, step, row, 1])
        writers = (_bare, _instruction, _documents)
        parts = writers[rng.choice(len(writers), p=(0.25, 0.3, 0.45))](dialogue, text, rng, length)
        ids.append(np.concatenate(parts)[-length:])
        others = rng.choice(length - LAST, min(OTHERS, length - LAST), replace=False)
        columns.append(np.concatenate([np.sort(others), np.arange(length - LAST, length)]))
    return Ordinary(np.stack(ids), np.stack(columns))


def _passage(dialogue: Dialogue, text: Background, rng: np.random.Generator, tokens: int) -> np.ndarray:
    """At least ``tokens`` tokens of text, as long as there are so many."""
    first, _ = text.passage(rng, min(tokens + 64, int(text.ends[-1]) // 2))
    found = text.tokens[text.ends[first] : text.ends[first] + tokens]
    return np.resize(found, tokens)


def _bare(dialogue: Dialogue, text: Background, rng: np.random.Generator, length: int) -> list[np.ndarray]:
    return [_passage(dialogue, text, rng, length)]


def _instruction(dialogue: Dialogue, text: Background, rng: np.random.Generator, length: int) -> list[np.ndarray]:
    head, tail = dialogue.encode(dialogue.head + _TASKS[rng.integers(len(_TASKS))] + "\n\n", dialogue.tail)
    answer = LAST // 2
    room = length - len(head) - len(tail) - answer
    return [head, _passage(dialogue, text, rng, room), tail, _passage(dialogue, text, rng, answer)]


def _documents(dialogue: Dialogue, text: Background, rng: np.random.Generator, length: int) -> list[np.ndarray]:
    before, after = protocol.QA.template.split("{context}")
    docs, sentences, tokens = [], [], 0
    while tokens < length:
        first, last = text.passage(rng, int(rng.integers(60, 250)))
        sentences += text.sentences[first:last]
        docs.append(protocol.DOCUMENT.format(i=len(docs) + 1, document=" ".join(text.sentences[first:last])))
        tokens += int(text.ends[last] - text.ends[first])
    sentence = sentences[int(rng.integers(len(sentences)))]
    names = [word.strip(".,;:!?\"'") for word in sentence.split()[1:] if word[:1].isupper()] or sentence.split()[-1:]
    question = _QUESTIONS[rng.integers(len(_QUESTIONS))].format(names[int(rng.integers(len(names)))])
    tail = after.replace("{query}", question) + dialogue.tail + protocol.QA.answer_prefix
    head, context, end, answer = dialogue.encode(dialogue.head + before, "\n\n".join(docs), tail, f" {sentence}")
    answer = answer[:48]
    return [head, context[: length - len(head) - len(end) - len(answer)], end, answer]
