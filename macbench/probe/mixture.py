"""Which family a sequence belongs to, and the rows of a training step. Row (step, row) is a function of the seed alone."""

from dataclasses import dataclass

import numpy as np

from macbench.errors import ConfigError
from macbench.models.chat import Chat
from macbench.probe import chains
from macbench.probe.needles import KINDS, NeedleSequences
from macbench.probe.official import Official
from macbench.probe.sequence import Dialogue, Sequence
from macbench.probe.text import Background

POSITIONS = 131072
# Share of sequences by family: (up to 8K tokens, 16K and 32K, above). One needle is learnt fast, so the harder families have more;
# counting words helps nothing at long context, so it stays short.
MIX = {
    "noise": (0.03, 0.03, 0.04),
    "text": (0.06, 0.07, 0.08),
    "text_uuids": (0.06, 0.07, 0.08),
    "needles": (0.10, 0.12, 0.14),
    "needles_uuids": (0.14, 0.16, 0.20),
    "multivalue": (0.17, 0.17, 0.18),
    "multiquery": (0.12, 0.13, 0.14),
    "vt": (0.14, 0.14, 0.07),
    "chains": (0.05, 0.05, 0.04),
    "cwe": (0.04, 0.01, 0.0),
    "fwe": (0.05, 0.02, 0.01),
    "qa_1": (0.04, 0.03, 0.02),
}
FAMILIES = tuple(MIX)
SINGLE = 0.3  # share of needle sequences up to 16K tokens with one question
STRETCHED, MOST_STRETCHED = 0.5, 65536  # share of sequences whose positions have gaps, of those up to so many tokens
# Of the first question, the only one that follows its context as in an evaluation: times another one's weight, and least share of a sequence's.
FIRST_WEIGHT, FIRST_SHARE = 4.0, 0.25


@dataclass
class Batch:
    """Rows of one step. ``ids``, ``positions``: int32 [rows, length], padded with the end-of-turn token behind the last answer.

    The targets, one entry a token: ``rows`` and ``columns`` int64 say where the *predicted* token is, ``weights`` float32 sum to 1,
    ``question`` int64 numbers the answer it belongs to. ``first`` bool and ``family`` int64 have one entry an answer.
    """

    ids: np.ndarray
    positions: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    weights: np.ndarray
    question: np.ndarray
    first: np.ndarray
    family: np.ndarray


class Mixture:
    """All families over one background text."""

    def __init__(self, chat: Chat, text: Background, seed: int):
        self.dialogue = Dialogue(chat)
        self.seed = seed
        self.text = text
        self._needles, self._official = NeedleSequences(self.dialogue, text), Official(self.dialogue, text, f"probe {seed}")

    def sequence(self, family: str, length: int, rng: np.random.Generator, single: bool = False) -> Sequence:
        """At most ``length`` tokens of a family. ``single``: one question only."""
        if family in KINDS:
            return self._needles.make(family, length, rng, single)
        if family == "chains":
            return chains.make(self.dialogue, length, rng)
        return self._official.make(family, length, rng)

    def batch(self, step: int, length: int, rows: int, first: int = 0) -> Batch:
        """``rows`` rows of training step ``step`` from row ``first`` on."""
        sequences, positions = [], []
        shares = np.array([MIX[family][0 if length <= 8192 else 1 if length <= 32768 else 2] for family in FAMILIES])
        for row in range(first, first + rows):
            rng = np.random.default_rng([self.seed, step, row])
            family = FAMILIES[rng.choice(len(FAMILIES), p=shares / shares.sum())]
            single = length <= 16384 and rng.random() < SINGLE
            try:
                sequences.append(self.sequence(family, length, rng, single))
            except ConfigError:  # below about 1K tokens some families have no smallest sample
                sequences.append(self.sequence("text", length, rng, single))
            gaps = length <= MOST_STRETCHED and rng.random() < STRETCHED
            positions.append(stretched(length, sequences[-1].answers[0][0], rng) if gaps else np.arange(length))
        return collate(sequences, np.stack(positions), length, self.dialogue.eos)


def stretched(length: int, context: int, rng: np.random.Generator) -> np.ndarray:
    """Positions of ``length`` tokens with up to seven gaps in the context, below ``POSITIONS``; int64 [length].

    Short sequences learn long distances so (Zhu et al., PoSE, ICLR 2024). The last 256 tokens before the first answer have no gap.
    """
    positions = np.arange(length)
    spare = POSITIONS - length
    if context < 512 or spare < 1:
        return positions
    cuts = rng.integers(1, context - 256, int(rng.integers(1, 8)))
    total = rng.integers(1, spare + 1)
    bounds = np.sort(rng.integers(0, total + 1, len(cuts)))
    bounds[-1] = total
    for cut, gap in zip(np.sort(cuts), np.diff(bounds, prepend=0), strict=True):
        positions[cut:] += gap
    return positions


def collate(sequences: list[Sequence], positions: np.ndarray, length: int, pad: int) -> Batch:
    """Pad sequences of at most ``length`` tokens. Every sequence weighs the same, and its first answer more than another."""
    ids = np.full((len(sequences), length), pad, np.int32)
    rows, columns, weights, question, first, family = [], [], [], [], [], []
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence.ids)] = sequence.ids
        own, others = [], len(sequence.answers) - 1
        heavy = max(FIRST_WEIGHT, others * FIRST_SHARE / (1 - FIRST_SHARE))
        for i, (start, end) in enumerate(sequence.answers):
            rows.append(np.full(end - start, row))
            columns.append(np.arange(start, end))
            question.append(np.full(end - start, len(first)))
            own.append(np.full(end - start, heavy if i == 0 else 1.0))
            first.append(i == 0)
            family.append(FAMILIES.index(sequence.family))
        own = np.concatenate(own)
        weights.append(own / own.sum() / len(sequences))
    joined = [np.concatenate(parts) for parts in (rows, columns, weights, question)]
    return Batch(ids, positions.astype(np.int32), *joined[:2], joined[2].astype(np.float32), joined[3], np.array(first), np.array(family))
