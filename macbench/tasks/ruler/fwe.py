"""Frequent words: made-up words whose frequencies follow a Zipf law; which three are the most frequent?"""

import math
import string

import numpy as np

from macbench.tasks.ruler import protocol
from macbench.tasks.ruler.fit import Draft
from macbench.tasks.ruler.generator import Generator, Kit

# Below this many words the fourth and the fifth rank can be equally frequent, and there is no right answer.
_FEWEST = 53
_ANSWERS = 3


class FrequentWords(Generator):
    """As freq_words_extraction.py. The size grows in steps of 1/32 of the context from 1/6 of it, so up to a step stays unused.

    The order of the words is random for every sample; RULER shuffles all of them with one seed.
    """

    def __init__(self, name: str, kit: Kit):
        super().__init__(name, kit, {"space"})
        self.before, self.after = self.wording.template.split("{context}")
        room = max(kit.ctx - self.wording.tokens_to_generate, 5 * 50)  # below this nothing fits anyway
        self.step = room // 32
        self.start = room // 6 % self.step  # words before the first step
        self.vocabulary = room // 50  # different words, noise included

    def _words(self, steps: int) -> int:
        return self.start + steps * self.step

    def _counts(self, words: int) -> np.ndarray:
        """How often the words of rank 1, 2, ... appear in a text of about ``words`` words, int64 [vocabulary]."""
        ranks = np.arange(1, self.vocabulary + 1)
        zeta = math.pi**2 / 6  # zeta(FWE_ALPHA)
        return (words * ranks**-protocol.FWE_ALPHA / zeta).astype(np.int64)

    def draft(self, index: int) -> Draft:
        rng = self.rng(index)
        smallest = max(0, math.ceil((_FEWEST - self.start) / self.step))
        largest = max(smallest, self.kit.ctx // self.step)  # a word is at least a token
        # RULER draws the whole vocabulary and shuffles it; words too rare to appear need no name.
        kinds = max(int(np.count_nonzero(self._counts(self._words(largest)))), _ANSWERS + 1)
        names = [protocol.FWE_NOISE, *rng.letters(string.ascii_lowercase, protocol.FWE_WORD, kinds - 1)]
        entries = self.pieces.add(f" {name}" for name in names)
        head = self.chat.head + self.before.rstrip(" ")
        tail = self.after + self.chat.tail + self.wording.answer_prefix

        def parts(steps: int) -> list:
            order = np.repeat(np.arange(kinds), self._counts(self._words(steps))[:kinds])
            order = order[rng.child("order", steps).permutation(len(order))]
            return [head, entries[order[:-1]], f" {names[order[-1]]}{tail}"]

        tokens = None
        if self.pieces.additive:
            lengths = self.pieces.lengths(entries)
            tokens = np.array([self._counts(self._words(steps))[:kinds] @ lengths for steps in range(largest + 1)])
        return Draft(names[1 : _ANSWERS + 1], parts, smallest, largest, tokens, lambda steps: {"words": self._words(steps)})
