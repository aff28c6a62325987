"""Needles in text, in noise or among other needles, and many questions about them: the eight needle tasks of RULER in one generator.

Prompts are RULER's own (macbench.tasks.ruler.protocol); keys, values and texts are not.
"""

import uuid

import numpy as np

from macbench.probe.sequence import Dialogue, Sequence, Span, shifted
from macbench.probe.text import Background
from macbench.tasks.ruler import protocol
from macbench.tasks.ruler.niah import wording
from macbench.tasks.ruler.protocol import Needles

# Haystack, kinds of keys and values, v values a key, q keys a question; how many keys there are depends on the sequence.
KINDS = {
    "noise": Needles("noise"),
    "text": Needles("essay"),
    "text_uuids": Needles("essay", value="uuids"),
    "needles": Needles("needle"),
    "needles_uuids": Needles("needle", key="uuids", value="uuids"),
    "multivalue": Needles("essay", v=4),
    "multiquery": Needles("essay", q=4),
}
_FIRSTS = 900  # first words of keys in one sequence, about as many as RULER has adjectives: other keys then share a key's first word
QUESTION_SHARE, MOST_QUESTIONS = 0.25, 96  # of a sequence's tokens, and in number


class NeedleSequences:
    """Makes sequences of one of ``KINDS`` with exactly ``length`` tokens or up to one unit of haystack fewer."""

    def __init__(self, dialogue: Dialogue, text: Background):
        self.dialogue, self.text = dialogue, text

    def make(self, name: str, length: int, rng: np.random.Generator, single: bool) -> Sequence:
        """``single``: one question, as RULER asks it, and as many needles as RULER hides; else many of both."""
        kind = KINDS[name]
        key_words = self._key_words(rng)
        most = 1 if single else max(min(int(QUESTION_SHARE * length) // _turn_tokens(kind), MOST_QUESTIONS), 1)
        # Long sequences are dear, so they are asked all that they can be.
        count = kind.q * (most if length >= 32768 else int(rng.integers(1, most + 1)))
        others = int(rng.integers(0, 4)) if kind.haystack == "essay" else 0  # multikey_1 hides three that nobody asks for
        keys = self._keys(kind, rng, count + others, key_words)
        values = {key: [self._value(kind, rng) for _ in range(kind.v)] for key in keys}
        needles = [(key, value) for key in keys for value in values[key]]
        needles = [needles[i] for i in rng.permutation(len(needles))]
        asked = [keys[i : i + kind.q] for i in range(0, count, kind.q)]
        questions = self._questions(kind, asked, needles)
        return self._assemble(name, kind, length, rng, needles, asked, questions, key_words)

    def _questions(self, kind: Needles, asked: list[list[str]], needles: list[tuple[str, str]]) -> list[tuple[str, str]]:
        _, after, prefix = wording(kind)
        turns = []
        for i, keys in enumerate(asked):
            query = listed(keys)
            found = [value for key in keys for name, value in needles if name == key]  # several values of a key: in the order of the text
            # The first question begins with the newline that ends the context.
            question = after if i == 0 else self.dialogue.between + after.lstrip("\n")
            turns.append((question.replace("{query}", query) + self.dialogue.tail + prefix.replace("{query}", query), f" {listed(found)}."))
        return turns

    def _assemble(self, name, kind, length, rng, needles, asked, questions, key_words) -> Sequence:
        dialogue = self.dialogue
        before = wording(kind)[0]
        lines = [needle_text(kind, key, value) for key, value in needles]
        space, end = (" ", "") if kind.haystack == "essay" else ("", "\n")
        encoded = dialogue.encode(dialogue.head + before, *(f"{space}{line}{end}" for line in lines))
        head, hidden = np.concatenate([np.array(dialogue.bos, np.int32), encoded[0]]), encoded[1:]
        # In lines the last newline belongs to the haystack, in text it opens the question.
        if end:
            questions = [(questions[0][0].removeprefix("\n"), questions[0][1]), *questions[1:]]
        parts, answers = dialogue.turns(questions)
        room = length - len(head) - sum(map(len, hidden)) - sum(map(len, parts))
        # RULER's first depth is before all text: as many needles as it hides stand there as often.
        opens = kind.haystack == "essay" and rng.random() < min(len(hidden), 8) / len(protocol.DEPTHS)
        filler = self._filler(kind, rng, room, key_words, {key for key, _ in needles}, opens)
        first = min(len(filler), 1 if kind.haystack == "essay" else 0)  # short sequences may have room for needles alone
        places = np.sort(rng.integers(first, len(filler) + 1, len(hidden)))
        if opens:
            places[0] = 0
        context, spans, last = [head], {}, 0
        at = len(head)
        for (key, _), ids, place in zip(needles, hidden, places.tolist(), strict=True):
            stretch = filler[last:place]
            at += sum(map(len, stretch))
            context += [*stretch, ids]
            spans.setdefault(key, []).append((at, at + len(ids)))
            at, last = at + len(ids), place
        context += filler[last:]
        at += sum(map(len, filler[last:]))
        evidence: list[list[Span]] = [[span for key in keys for span in spans[key]] for keys in asked]
        return Sequence(name, np.concatenate([*context, *parts]), shifted(answers, at), evidence)

    def _filler(self, kind: Needles, rng, room: int, key_words: list[list[str]], taken: set[str], behind: bool) -> list[np.ndarray]:
        """Units of haystack with at most ``room`` tokens. ``behind``: something stands before a text's first sentence."""
        if kind.haystack == "essay":
            first, last = self.text.passage(rng, max(room - 8, 0))
            units = [self.text.tokens[self.text.ends[i] : self.text.ends[i + 1]] for i in range(first, last)]
            if not behind:  # RULER's context does not begin with a space
                units[0] = self.dialogue.encode(self.text.sentences[first])[0]
            return units[: _fitting(units, room)]
        if kind.haystack == "noise":
            line = self.dialogue.encode(protocol.NOISE + "\n")[0]
            return [line] * max(room // len(line), 0)
        units: list[np.ndarray] = []
        tokens = 0
        while tokens < room:
            n = max(int((room - tokens) / (70 if kind.key == "uuids" else 24)), 4)
            keys = self._keys(kind, rng, n, key_words, taken)
            new = self.dialogue.encode(*(needle_text(kind, key, self._value(kind, rng)) + "\n" for key in keys))
            units += new
            tokens += sum(map(len, new))
        return units[: _fitting(units, room)]

    def _key_words(self, rng: np.random.Generator) -> list[list[str]]:
        words = self.text.words
        return [[words[i] for i in rng.choice(len(words), min(_FIRSTS, len(words)), replace=False)], words]

    def _keys(self, kind: Needles, rng: np.random.Generator, n: int, key_words: list[list[str]], taken: set[str] = frozenset()) -> list[str]:
        if kind.key == "uuids":
            return [random_uuid(rng) for _ in range(n)]
        found: dict[str, None] = {}
        first, second = key_words
        while len(found) < n:
            pairs = zip(rng.integers(len(first), size=n).tolist(), rng.integers(len(second), size=n).tolist(), strict=True)
            found.update(dict.fromkeys(key for a, b in pairs if (key := f"{first[a]}-{second[b]}") not in taken))
        return list(found)[:n]

    def _value(self, kind: Needles, rng: np.random.Generator) -> str:
        return random_uuid(rng) if kind.value == "uuids" else str(rng.integers(10**6, 10**7))


def _turn_tokens(kind: Needles) -> int:
    """About how many tokens a question and its answer take, and what they add to the context."""
    key, value = (33 if kind.key == "uuids" else 6), (34 if kind.value == "uuids" else 9)
    hidden = 0 if kind.haystack == "needle" else kind.q * kind.v * (12 + key + value)
    return 36 + kind.q * (2 * key + kind.v * value) + hidden


def needle_text(kind: Needles, key: str, value: str) -> str:
    return protocol.NEEDLE.format(type_needle_v=kind.value, key=key, value=value)


def listed(items: list[str]) -> str:
    """``a`` or ``a, b, and c``, as RULER writes queries."""
    return ", ".join(items[:-1]) + ", and " + items[-1] if len(items) > 1 else items[0]


def random_uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def _fitting(units: list[np.ndarray], room: int) -> int:
    """How many of the first units have at most ``room`` tokens together."""
    return int(np.searchsorted(np.cumsum([len(unit) for unit in units]), room, side="right"))
