"""Question answering: the documents that hold the answer among others of SQuAD (qa_1) or HotpotQA (qa_2)."""

from functools import cached_property

import numpy as np

from macbench.errors import ConfigError
from macbench.tasks.ruler import protocol
from macbench.tasks.ruler.data import QuestionSet
from macbench.tasks.ruler.fit import Draft
from macbench.tasks.ruler.generator import Generator, Kit
from macbench.tasks.ruler.rng import Rng

_WARM_CHARACTERS = 2_000_000  # about half a second of tokenising


class QuestionAnswering(Generator):
    """As qa.py: sample i asks question i; documents come in the order gold, near, others until the context is full, then shuffled.

    The shuffle is random for every sample. RULER's has one seed, so that with equal numbers of documents the gold one is always
    at the same place.
    """

    def __init__(self, name: str, kit: Kit):
        super().__init__(name, kit, {"space", "line"})
        before, self.after = self.wording.template.split("{context}")
        # "Document {i}:\n{document}" is cut before and after " {i}:\n", so its first word goes with what is before it.
        word, _, self._after_number = protocol.DOCUMENT.removesuffix("{document}").partition(" {i}")
        self.first, self.next = before + word, "\n\n" + word
        self._numbers = np.empty(0, np.int64)

    @cached_property
    def questions(self) -> QuestionSet:
        return self.kit.data.squad if self.name == "qa_1" else self.kit.data.hotpot

    def load(self) -> None:
        _ = self.questions

    @cached_property
    def _characters(self) -> np.ndarray:
        return np.array([len(doc) for doc in self.questions.docs])

    @cached_property
    def _known(self) -> np.ndarray:
        """Table entry of each document, or -1 if no sample has needed it yet; int64 [documents].

        An even sample of the documents is tokenised at once; the others share most of their words, and cost little when they come.
        """
        known = np.full(len(self.questions.docs), -1)
        if self.pieces.additive:
            some = np.arange(0, len(known), int(self._characters.sum()) // _WARM_CHARACTERS + 1)
            known[some] = self._add(some)
        return known

    def _add(self, docs: np.ndarray) -> np.ndarray:
        return self.pieces.add_documents([self.questions.docs[i] + self.next for i in docs])

    def _entries(self, docs: np.ndarray) -> np.ndarray:
        new = docs[self._known[docs] < 0]
        if len(new):
            self._known[new] = self._add(new)
        return self._known[docs]

    def _number(self, i: int) -> str:
        return f" {i}{self._after_number}"

    def _number_entries(self, n: int) -> np.ndarray:
        if n > len(self._numbers):
            self._numbers = self.pieces.add(self._number(i) for i in range(1, n + 1))
        return self._numbers[:n]

    def _candidates(self, index: int, rng: Rng) -> tuple[np.ndarray, int]:
        """All documents in the order in which they enter the context of a sample, int64 [documents]; and how many must enter."""
        _, _, gold, near = self.questions.questions[index]
        others = np.ones(len(self.questions.docs), bool)
        others[gold + near] = False
        others = np.flatnonzero(others)
        near = np.array(near, np.int64)
        return np.concatenate([gold, near[rng.permutation(len(near))], others[rng.permutation(len(others))]]), len(gold)

    def _tokens(self, candidates: np.ndarray) -> np.ndarray:
        """Tokens of the first n candidates for every n that may fit; no other document is tokenised."""
        characters = np.cumsum(self._characters[candidates])
        n, per_token = 0, 4  # English has more characters per token, so this is a first step that seldom suffices
        while True:
            n = max(n + 1, int(np.searchsorted(characters, per_token * self.kit.ctx)) + 1)
            tokens = self.pieces.lengths(self._entries(candidates[:n])) + self.pieces.lengths(self._number_entries(len(candidates[:n])))
            tokens = np.concatenate([[0], np.cumsum(tokens)])
            if tokens[-1] > self.kit.ctx or n >= len(candidates):
                return tokens
            per_token += 1

    def draft(self, index: int) -> Draft:
        if index >= len(self.questions.questions):
            most = len(self.questions.questions)
            raise ConfigError("limit", index + 1, f"{self.name} has {most} questions in this data, so it must be at most {most}")
        rng, docs = self.rng(index), self.questions.docs
        question, answers, _, _ = self.questions.questions[index]
        candidates, smallest = self._candidates(index, rng)
        after = self.after.replace("{query}", question)
        tail = after + self.chat.tail + self.wording.answer_prefix

        def shuffled(n: int) -> np.ndarray:
            return candidates[:n][rng.child("order", n).permutation(n)]

        def parts(n: int) -> list:
            order = shuffled(n)
            pairs = np.stack([self._number_entries(n), self._entries(order)], axis=1)
            result, start = [self.chat.head + self.first], 0
            # No cut before a document that begins with white space or a sign, nor before what follows the last one.
            for i in [i for i in range(n - 1) if not docs[order[i]][0].isalnum()]:
                result += [pairs[start:i].ravel(), self._number(i + 1) + docs[order[i]] + self.next]
                start = i + 1
            return [*result, pairs[start : n - 1].ravel(), self._number(n) + docs[order[-1]] + tail]

        def meta(n: int) -> dict:
            gold = np.flatnonzero(np.isin(shuffled(n), candidates[:smallest])) + 1
            return {"gold_documents": gold.tolist(), "all_documents": n == len(docs)}

        tokens = self._tokens(candidates) if self.pieces.additive else None
        largest = len(tokens) - 1 if self.pieces.additive else len(docs)
        return Draft(answers, parts, smallest, max(largest, smallest), tokens, meta)
