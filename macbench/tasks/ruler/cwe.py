"""Common words: ten words of a long numbered list appear more often than the others."""

from functools import cached_property

import numpy as np

from macbench.tasks.ruler import protocol
from macbench.tasks.ruler.fit import Draft
from macbench.tasks.ruler.generator import Generator, Kit
from macbench.tasks.ruler.rng import Rng


class CommonWords(Generator):
    """As common_words_extraction.py: a worked example, then the question; with a chat template the example is a whole exchange.

    The unit of haystack is a different word. The order of a list is random for every sample, RULER repeats one permutation.
    """

    def __init__(self, name: str, kit: Kit):
        super().__init__(name, kit, {"space"})
        self.before, self.after = self.wording.template.split("{context}")
        short = kit.ctx < protocol.CWE_SHORT
        self.example_size = protocol.CWE_EXAMPLE_SHORT if short else protocol.CWE_EXAMPLE
        self.repeats = protocol.CWE_REPEATS_SHORT if short else protocol.CWE_REPEATS
        self._numbers = np.empty(0, np.int64)

    def load(self) -> None:
        _ = self.kit.data.words, self.kit.data.english_words

    @cached_property
    def _words(self) -> tuple[list[str], np.ndarray]:
        """All words of wonderwords and their table entries: samples draw from all of them, so they are tokenised at once."""
        return self._tokenised(self.kit.data.words.shuffled)

    @cached_property
    def _more_words(self) -> tuple[list[str], np.ndarray]:
        return self._tokenised(self.kit.data.english_words)

    def _tokenised(self, words: list[str]) -> tuple[list[str], np.ndarray]:
        return words, self.pieces.add(f" {word}" for word in words)

    def draft(self, index: int) -> Draft:
        rng = self.rng(index)
        draft = self._draft(rng, *self._words)
        every = draft.largest == len(self._words[0])
        if every and self.kit.data.english_words and self.pieces.count(draft.parts(draft.largest)) <= self.room:
            # More words are wanted than there are: as in RULER, all of them come from the larger list then.
            return self._draft(rng.child("english"), *self._more_words)
        return draft

    def _draft(self, rng: Rng, vocabulary: list[str], entries: np.ndarray) -> Draft:
        size, *repeats = self.example_size
        # An item has a number and a word, so at least two tokens.
        largest = min(len(vocabulary), protocol.CWE_COMMON + max(1, self.kit.ctx // 2 // self.repeats[1]))
        shown = rng.sample(len(self._words[0]), size)
        chosen = rng.sample(len(vocabulary), largest)
        ask = self.chat.tail + self.wording.answer_prefix
        answers = " ".join(f"{i}. {self._words[0][word]}" for i, word in enumerate(shown[: protocol.CWE_COMMON], 1))
        example, last = self._list(self._words[1][shown], repeats, rng.child("example"))
        before = f"{self.chat.head}{self.before}1."
        between = f" {self._words[0][shown[last]]}{self.after}{ask} {answers}\n{self._second_head}{self.before}1."
        entries = entries[chosen]

        def parts(n: int) -> list:
            items, last = self._list(entries[:n], self.repeats, rng.child("order", n))
            return [before, example, between, items, f" {vocabulary[chosen[last]]}{self.after}{ask}"]

        def meta(n: int) -> dict:
            return {"vocabulary": len(vocabulary), "capped": n == len(vocabulary)}

        tokens = self._tokens(entries) if self.pieces.additive else None
        common = [vocabulary[word] for word in chosen[: protocol.CWE_COMMON]]
        return Draft(common, parts, protocol.CWE_COMMON + 1, largest, tokens, meta)

    def _number(self, items: int) -> np.ndarray:
        """Entries of " 2." to the number of the last item, int64 [items - 1]."""
        if items > len(self._numbers) + 1:
            self._numbers = self.pieces.add(f" {i}." for i in range(2, items + 1))
        return self._numbers[: items - 1]

    def _list(self, entries: np.ndarray, repeats: tuple[int, int], rng: Rng) -> tuple[np.ndarray, int]:
        """A numbered list in random order without its first number and last word: entries, and which word the last one is.

        The first ``CWE_COMMON`` words come ``repeats[0]`` times, the others ``repeats[1]`` times.
        """
        times = np.repeat(repeats, [protocol.CWE_COMMON, len(entries) - protocol.CWE_COMMON])
        order = np.repeat(np.arange(len(entries)), times)
        order = order[rng.permutation(len(order))]
        items = np.empty(2 * len(order) - 2, np.int64)
        items[0::2] = entries[order[:-1]]
        items[1::2] = self._number(len(order))
        return items, int(order[-1])

    def _tokens(self, entries: np.ndarray) -> np.ndarray:
        """Tokens of the list with the first n words, int64 [len(entries) + 1]; below CWE_COMMON words they are not used."""
        times = np.where(np.arange(len(entries)) < protocol.CWE_COMMON, *self.repeats)
        items = np.cumsum(times)
        numbers = np.cumsum(self.pieces.lengths(self._number(items[-1])))
        return np.concatenate([[0], np.cumsum(times * self.pieces.lengths(entries)) + numbers[items - 2]])

    @cached_property
    def _second_head(self) -> str:
        """The chat template's head for the question after the example: a BOS that it spells out belongs to the first one only."""
        tokenizer, head = self.chat.tokenizer, self.chat.head
        # Only where plain text gets one too: some models call the marker of every turn their BOS.
        wants_bos = self.chat.encode("a")[0] == tokenizer.bos_token_id
        return head.removeprefix(tokenizer.bos_token) if wants_bos else head
