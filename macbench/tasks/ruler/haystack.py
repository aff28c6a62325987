"""Haystacks of the needle tasks: noise, other needles, essays. Each knows its units as table entries and the tokens of the first n."""

import re
from functools import cached_property
from itertools import pairwise

import numpy as np

from macbench.tasks.ruler import protocol
from macbench.tasks.ruler.pieces import Pieces
from macbench.tasks.ruler.rng import Rng, scaled
from macbench.tasks.ruler.uuids import UuidPieces, uuid_letters
from macbench.tasks.ruler.words import WordLists

# The rule for ends of sentences, judged from a word and the one after it. RULER asks nltk's English punkt model, which is a download.
# In its essays punkt finds 31,394 ends: 30,770 are found here, and 453 are inside a word, where the scrape lost a space ("thing.We").
_END = re.compile(r"[.?!]+[\"')\]]*$")
_NO_END = re.compile(r"(?:^|[\"'(\[])(?:[A-Z]|Mr|Mrs|Ms|Dr|St|Jr|Sr|Prof|Inc|Co|Corp|Ltd|vs|cf|e\.g|i\.e|etc|al|No|Fig|U\.S)\.$")


def sentence_ends(words: list[str]) -> np.ndarray:
    """How many words stand before each end of a sentence, increasing, int64 [sentences - 1]: the end of the text is not among them."""
    pairs = enumerate(pairwise(words), 1)
    ends = [n for n, (word, after) in pairs if _END.search(word) and not after[:1].islower() and not _NO_END.search(word)]
    return np.array(ends, np.int64)


def _running(lengths: np.ndarray) -> np.ndarray:
    """Tokens of the first n units for n = 0, 1, ..."""
    return np.concatenate([[0], np.cumsum(lengths)])


class Noise:
    """The same line of noise again and again."""

    def __init__(self, pieces: Pieces, ctx: int):
        self._line = pieces.add([protocol.NOISE + "\n"])
        self.size = ctx  # more lines than tokens never fit
        self.tokens = np.arange(ctx + 1) * pieces.lengths(self._line) if pieces.additive else None

    def entries(self, start: int, end: int) -> np.ndarray:
        """Entries of lines start..end, each with the newline after it."""
        return np.repeat(self._line, end - start)


class Distractors:
    """Needles that nobody asks for, drawn line by line as more are wanted; none has a key of the ``taken`` pair numbers.

    RULER lets a distractor repeat the key that is asked for (once in 2000 samples of 128K tokens), which leaves no right answer.
    """

    def __init__(self, tables: "NeedleTables", ctx: int, rng: Rng, taken: list[int]):
        self._tables, self._rng, self._taken = tables, rng, taken
        self._entries = np.empty(0, np.int64)
        self._ends = np.zeros(1, np.int64)  # line i is _entries[_ends[i]:_ends[i + 1]]
        self.size, self.tokens = ctx, None
        if tables.pieces.additive:
            tokens = self._ends
            while tokens[-1] < ctx:
                self._grow(int(1.02 * (ctx - tokens[-1]) / tables.tokens_per_line) + 8)
                tokens = _running(tables.pieces.lengths(self._entries))[self._ends]
            self.size, self.tokens = len(tokens) - 1, tokens

    def entries(self, start: int, end: int) -> np.ndarray:
        """Entries of lines start..end, each with the newline after it."""
        if end >= len(self._ends):
            self._grow(max(end + 1 - len(self._ends), 64))
        return self._entries[self._ends[start] : self._ends[end]]

    def _grow(self, lines: int) -> None:
        raw = self._rng.raw(lines * self._tables.raw_words).reshape(lines, -1)
        entries, ends = self._tables.draw(raw, self._taken)
        self._ends = np.concatenate([self._ends, len(self._entries) + ends])
        self._entries = np.concatenate([self._entries, entries])


class NeedleTables:
    """Lines of needles as table entries, many at a time. ``task`` says what keys and values are; ``words`` only matter for word keys.

    ``draw(raw, taken)`` makes lines from ``raw`` [lines, raw_words] random words, with no key of the ``taken`` pair numbers; it
    returns the entries of all lines in one array and where each line ends in it, int64 [lines].
    """

    def __init__(self, pieces: Pieces, task: protocol.Needles, words: WordLists | None):
        self.pieces = pieces
        # "One of ... for" before the key, " is:" between key and value, and the end of the line
        start, middle, _ = protocol.NEEDLE.format(type_needle_v=task.value, key="|", value="|").split("|")
        start, middle = start.rstrip(), middle.rstrip()
        if task.key == "uuids":
            self.raw_words, self.draw = 4, self._draw_uuids
            self._uuids = UuidPieces(pieces)
            self._around = pieces.add([start, middle, ".\n"])
        else:
            self.raw_words, self.draw = 2, self._draw_words
            self._words = words
            # In this order the parts make "One of ... for big", "-dog is:", " 123", "456", "7.\n".
            self._first = pieces.add(f"{start} {word}" for word in words.adjectives)
            self._second = pieces.add(f"-{word}{middle}" for word in words.nouns)
            self._third = pieces.add(f" {n}" for n in range(100, 1000))
            self._fourth = pieces.add(f"{n:03d}" for n in range(1000))
            self._fifth = pieces.add(f"{n}.\n" for n in range(10))

    @cached_property
    def tokens_per_line(self) -> float:
        """Of a hundred random lines."""
        entries, ends = self.draw(Rng("ruler", "line").raw(100 * self.raw_words).reshape(100, -1), [])
        return self.pieces.lengths(entries).sum() / len(ends)

    def _draw_words(self, raw: np.ndarray, taken: list[int]) -> tuple[np.ndarray, np.ndarray]:
        pairs = scaled(raw[:, 0], 0, self._words.pairs)
        pairs = np.where(np.isin(pairs, taken), (pairs + 1) % self._words.pairs, pairs)
        adjectives, nouns = np.divmod(pairs, len(self._words.nouns))
        numbers = scaled(raw[:, 1], 10**6, 10**7)
        digits = self._third[numbers // 10**4 - 100], self._fourth[numbers // 10 % 1000], self._fifth[numbers % 10]
        table = np.stack([self._first[adjectives], self._second[nouns], *digits], axis=1)
        return table.ravel(), table.shape[1] * np.arange(1, len(raw) + 1)

    def _draw_uuids(self, raw: np.ndarray, taken: list[int]) -> tuple[np.ndarray, np.ndarray]:
        # ``taken`` does not matter: uuids never repeat.
        runs, starts = self._uuids.entries(uuid_letters(raw.reshape(-1, 2)))
        ends = np.append(starts[2::2], len(runs))
        where = np.stack([starts[0::2], starts[1::2], ends], axis=1).ravel()
        return np.insert(runs, where, np.tile(self._around, len(raw))), ends + 3 * np.arange(1, len(raw) + 1)


class Essays:
    """The words of the essays in their order, from the beginning again if they are too few."""

    def __init__(self, pieces: Pieces, ctx: int, text: str):
        words = text.split()
        self.words = (words * (ctx // len(words) + 2))[: max(ctx, 2)]  # a word is at least a token
        self.size = len(self.words)
        self.entries = pieces.add(f" {word}" for word in self.words)
        self.tokens = _running(pieces.lengths(self.entries)) if pieces.additive else None
        self.ends = sentence_ends(self.words)

    def bounds(self, n: int) -> list[int]:
        """Words before each sentence of the first ``n`` words, then n."""
        return [0, *self.ends[: np.searchsorted(self.ends, n)].tolist(), n]
