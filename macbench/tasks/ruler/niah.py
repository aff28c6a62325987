"""Needles in a haystack: eight tasks of keys and values hidden in noise, in essays or among other needles."""

from functools import cached_property
from itertools import pairwise

from macbench.tasks.ruler import protocol
from macbench.tasks.ruler.fit import Draft
from macbench.tasks.ruler.generator import Generator, Kit
from macbench.tasks.ruler.haystack import Distractors, Essays, NeedleTables, Noise
from macbench.tasks.ruler.rng import Rng
from macbench.tasks.ruler.uuids import random_uuid


def wording(task: protocol.Needles) -> tuple[str, str, str]:
    """Task text before and after the context, and the answer prefix, all with {query} still open.

    The official generator makes the *whole* prompt singular, and with it a model's system prompt: "You are" becomes "You is".
    Here only the words of the task change, and the chat template stays as its authors wrote it.
    """
    texts, value = [protocol.NIAH.template, protocol.NIAH.answer_prefix], task.value
    if task.q * task.v == 1:
        for old, new in protocol.SINGULAR:
            texts = [text.replace(old, new) for text in texts]
        value = value[:-1]
    template, prefix = (text.replace("{type_needle_v}", value) for text in texts)
    before, after = template.split("{context}")
    return before, after, prefix


class Niah(Generator):
    """One needle task, as niah.py makes it: needles of random keys and values, one question about some of the keys."""

    def __init__(self, name: str, kit: Kit):
        task = self.task = protocol.NIAH_TASKS[name]
        cuts = {"essay": {"space"}, "noise": {"space", "line"}, "needle": {"space", "line"}}[task.haystack]
        if task.haystack == "needle":
            cuts = cuts | ({"uuid"} if task.key == "uuids" else {"hyphen", "digits"})
        super().__init__(name, kit, cuts)
        self.before, self.after, self.prefix = wording(task)

    def load(self) -> None:
        if self.task.key == "words":
            _ = self.kit.data.words
        if self.task.haystack == "essay":
            _ = self.kit.data.essays

    @cached_property
    def _essays(self) -> Essays:
        return Essays(self.pieces, self.kit.ctx, self.kit.data.essays)

    @cached_property
    def _noise(self) -> Noise:
        return Noise(self.pieces, self.kit.ctx)

    @cached_property
    def _tables(self) -> NeedleTables:
        return NeedleTables(self.pieces, self.task, self.kit.data.words if self.task.key == "words" else None)

    def draft(self, index: int) -> Draft:
        task, rng = self.task, self.rng(index)
        keys: dict[str, int] = {}  # different keys in the order of their drawing, with their pair numbers
        while len(keys) < task.k:
            key, number = self._key(rng)
            keys[key] = number
        values = {key: [self._value(rng) for _ in range(task.v)] for key in keys}
        # The plural stays, whatever the number of needles: that is how RULER writes it.
        needles = [protocol.NEEDLE.format(type_needle_v=task.value, key=key, value=v) for key in keys for v in values[key]]
        needles = [needles[i] for i in rng.permutation(len(needles))]
        asked = [list(keys)[i] for i in rng.sample(task.k, task.q)]
        query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
        tail = self.after.replace("{query}", query) + self.chat.tail + self.prefix.replace("{query}", query)
        references = [value for key in asked for value in values[key]]
        hide = self._in_essays if task.haystack == "essay" else self._in_lines
        return hide(rng, needles, references, tail, list(keys.values()))

    def _key(self, rng: Rng) -> tuple[str, int]:
        if self.task.key == "uuids":
            return random_uuid(rng), -1
        number = rng.below(self.kit.data.words.pairs)
        return self.kit.data.words.pair(number), number

    def _value(self, rng: Rng) -> str:
        return random_uuid(rng) if self.task.value == "uuids" else str(rng.integers(10**6, 10**7, 1)[0])

    def _in_lines(self, rng: Rng, needles: list[str], references: list[str], tail: str, taken: list[int]) -> Draft:
        """Needles before random lines of a haystack of ``n`` lines."""
        if self.task.haystack == "noise":
            lines = self._noise
        else:
            lines = Distractors(self._tables, self.kit.ctx, rng.child("haystack"), taken)

        def places(n: int) -> list[int]:
            return sorted(rng.child("places", n).sample(n, len(needles)))

        def parts(n: int) -> list:
            result, last = [self.chat.head + self.before], 0
            for needle, place in zip(needles, places(n), strict=True):
                result += [lines.entries(last, place), needle + "\n"]
                last = place
            return [*result, lines.entries(last, n), tail[1:]]  # the tail's first character is the newline of the last line

        return Draft(references, parts, len(needles), lines.size, lines.tokens, lambda n: {"needle_units": places(n)})

    def _in_essays(self, rng: Rng, needles: list[str], references: list[str], tail: str, taken: list[int]) -> Draft:
        """Needles between sentences of the first ``n`` words of the essays, at depths in percent of the sentences."""
        essays = self._essays
        depths = sorted(protocol.DEPTHS[i] for i in rng.sample(len(protocol.DEPTHS), len(needles)))

        def places(n: int) -> list[int]:
            bounds = essays.bounds(n)
            return [bounds[int((len(bounds) - 1) * (depth / 100))] for depth in depths]

        def parts(n: int) -> list:
            return self._between_words(needles, [0, *places(n), n], tail)

        def meta(n: int) -> dict:
            return {"needle_units": places(n), "needle_depths_percent": depths}

        return Draft(references, parts, 2, essays.size, essays.tokens, meta)

    def _between_words(self, needles: list[str], bounds: list[int], tail: str) -> list:
        """Stretches of words with a needle between every two, joined by spaces; RULER joins empty stretches like others, and so do we.

        A text may be cut before a space that follows no white space. So the first word is one with what is before it, the last with
        what is after it, and the space that an empty stretch leaves with the needle after it.
        """
        words, entries = self._essays.words, self._essays.entries
        result, loose = [], self.chat.head + self.before
        for i, (start, end) in enumerate(pairwise(bounds)):
            if start == end:
                loose += " " if i else ""
            elif i == 0:
                result, loose = [loose + words[0], entries[1:end]], ""
            else:
                result.append(entries[start:end])
            if i < len(needles):
                result.append(f"{loose} {needles[i]}")
                loose = ""
        if start == end:
            result[-1] += loose + tail
        else:
            result[-1:] = [entries[start : end - 1], f" {words[end - 1]}{tail}"]
        return result
