"""Prompts as pieces whose tokens are known: the reason why a prompt of 128K tokens takes milliseconds.

Tokenising a whole prompt costs tenths of a second, again and again for the same sentences. But a byte-level BPE tokenizer first
splits its text with a regular expression and merges only inside the parts, so a text may be cut wherever that expression always cuts,
and ``encode(a + b) == encode(a) + encode(b)``. Where it cuts depends on the tokenizer; `CUTS` lists the kinds of cut that the
generators use, each with texts to try it on. A generator that needs a kind of cut that fails works on `WholeTexts` instead.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import chain

import numpy as np

from macbench.models.chat import Chat

_WORD = re.compile(r" ?[^ ]+")
_ODD_SPACE = re.compile(r" \s|\s ")  # a space beside other white space is no safe cut


def _sentence(text: str) -> list[str]:
    return re.split(r"(?<=\S)(?= )", text)


_UUIDS = """One of the uuids for 5f0c32b8-71da-4e05-9b1f-000123abcdef is: c9a646d3-9c61-4cb7-bfcd-ee2522c8f633.
One of the uuids for 12345678-9012-4345-8678-901234567890 is: abcdefab-cdef-4bcd-aaaa-f0e1d2c3b4a5.
"""
_NUMBERS = [str(1_000_000 + 8_999_999 * i // 96) for i in range(97)]
# Kind of cut -> texts, each in pieces.
CUTS: dict[str, list[list[str]]] = {
    # before a space that follows no white space: everything else rests on this one
    "space": [
        _sentence("The grass is \"green\" (or 3.5% blue), isn't it? We'd say: no -- not £20, $1,000 or e.g. 2024... naïve — so."),
        ["afterwards.\nJuly", " 2010", " One", " of is: 1234567.", "  One", " of", " 1. word", " 2. word\nQuestion: x"],
        ["Memorize\n\nThe", " grass again.\nVAR", " AAAAA = VAR BBBBB \nThe", " grass again.\nVAR", " XYZZY = 12345\nQuestion: x"],
        ["given documents.\n\nDocument", " 1:\nThe Normans.)  \n\nDocument", " 12:\nx"],
    ],
    # after a single newline that follows punctuation, before a letter or a digit
    "line": [["text:\n", "One of.\n", "The grass again.\n", "Übung:\n", "14 things.\n", "What is it?"]],
    # before a hyphen between letters
    "hyphen": [["One of the magic numbers for happy", "-go-lucky is:", " x", "-ray is:", " contact", "-lens is:"]],
    # in threes from the left of a number, with the space before and the end of the line after it
    "digits": [[piece for n in _NUMBERS for piece in ("is:", f" {n[:3]}", n[3:6], f"{n[6:]}.\n")]],
    # around the runs of letters and of digits of a uuid, and in threes inside a run of digits
    "uuid": [re.findall(r"One of .*? for| is:|\.\n|[ -]?(?:[a-f]+|[0-9]{1,3})", _UUIDS)],
}


def exact_cuts(chat: Chat) -> frozenset[str]:
    """The kinds of cut that hold for a tokenizer, tried on the texts of `CUTS`."""

    def adds_up(pieces: list[str]) -> bool:
        return chat.encode_piece("".join(pieces)) == [token for ids in chat.encode_pieces(pieces) for token in ids]

    return frozenset(kind for kind, texts in CUTS.items() if all(map(adds_up, texts)))


class Pieces:
    """A growing table of texts with their token ids.

    A prompt is a list of parts; a part is a text (encoded as it is, and remembered for a while) or an int array of table entries.
    """

    additive = True  # lengths of entries add up to the length of the prompt
    _remembered = 64  # texts outside the table whose tokens are kept: those of a sample and a few more

    def __init__(self, chat: Chat):
        self.chat = chat
        self.encode = lru_cache(self._remembered)(self._encode)
        self._index: dict[str, int] = {}
        self._texts: list[str] = []
        self._flat = np.empty(1 << 12, np.int32)
        self._ends = np.zeros(1 << 8, np.int64)  # entry i is _flat[_ends[i]:_ends[i + 1]]

    def _encode(self, text: str) -> np.ndarray:
        return np.array(self.chat.encode_pieces([text])[0], np.int32)

    def add(self, texts: Iterable[str]) -> np.ndarray:
        """Entries of ``texts``, int64 [len(texts)]; unknown ones are tokenised, all in one batch."""
        texts = list(texts)
        entries = list(map(self._index.get, texts))
        if None in entries:
            self._append([text for text in dict.fromkeys(texts) if text not in self._index])
            entries = list(map(self._index.get, texts))
        return np.array(entries, np.int64)

    def add_words(self, text: str) -> np.ndarray:
        """Entries of a text with single spaces that begins with one, a word each."""
        return self.add(_WORD.findall(text))

    def add_documents(self, texts: list[str]) -> np.ndarray:
        """The same for different long texts, put together from their words: most words are known from other documents."""
        words = [_WORD.findall(text) if not _ODD_SPACE.search(text) else [text] for text in texts]
        entries = self.add(word for one in words for word in one)
        ends = np.cumsum([len(one) for one in words])
        running = np.cumsum(self.lengths(entries))[ends - 1]
        self._store(texts, self._gather(entries), np.diff(running, prepend=0))
        return np.arange(len(self._texts) - len(texts), len(self._texts))

    def _append(self, texts: list[str]) -> None:
        encoded = self.chat.encode_pieces(texts)
        lengths = np.fromiter(map(len, encoded), np.int64, len(texts))
        self._store(texts, np.fromiter(chain.from_iterable(encoded), np.int32, lengths.sum()), lengths)

    def _store(self, texts: list[str], flat: np.ndarray, lengths: np.ndarray) -> None:
        first, last = len(self._texts), len(self._texts) + len(texts)
        self._ends = _grown(self._ends, last + 1)
        self._ends[first + 1 : last + 1] = self._ends[first] + np.cumsum(lengths)
        self._flat = _grown(self._flat, self._ends[last])
        self._flat[self._ends[first] : self._ends[last]] = flat
        self._index.update(zip(texts, range(first, last), strict=True))
        self._texts += texts

    def lengths(self, entries: np.ndarray) -> np.ndarray:
        """Tokens of each entry, int64, the shape of ``entries``."""
        return self._ends[entries + 1] - self._ends[entries]

    def count(self, parts: list) -> int:
        """Tokens of a prompt, without BOS."""
        return sum(len(self.encode(part)) if isinstance(part, str) else int(self.lengths(part).sum()) for part in parts)

    def text(self, parts: list) -> str:
        """The prompt as text."""
        lookup = self._texts.__getitem__
        return "".join(part if isinstance(part, str) else "".join(map(lookup, part.tolist())) for part in parts)

    def ids(self, parts: list) -> np.ndarray:
        """Token ids of a prompt without BOS, int32 [count(parts)]."""
        return np.concatenate([self.encode(part) if isinstance(part, str) else self._gather(part) for part in parts])

    def _gather(self, entries: np.ndarray) -> np.ndarray:
        lengths = self.lengths(entries)
        ends = np.cumsum(lengths)
        # Token t of the result is in entry e(t), at its start plus t's distance from the start of e(t) in the result.
        shift = self._ends[entries] - (ends - lengths)
        return self._flat[np.repeat(shift, lengths) + np.arange(ends[-1] if len(ends) else 0)]


class WholeTexts(Pieces):
    """The same table for a tokenizer that cannot be cut: it keeps texts only, and every count tokenises the whole prompt."""

    additive = False
    _remembered = 2  # whole prompts

    def add_documents(self, texts: list[str]) -> np.ndarray:
        return self.add(texts)

    def _append(self, texts: list[str]) -> None:
        self._index.update(zip(texts, range(len(self._texts), len(self._texts) + len(texts)), strict=True))
        self._texts += texts

    def count(self, parts: list) -> int:
        return len(self.ids(parts))

    def ids(self, parts: list) -> np.ndarray:
        return self.encode(self.text(parts))


def _grown(array: np.ndarray, size: int) -> np.ndarray:
    if size <= len(array):
        return array
    bigger = np.zeros(max(int(size), 2 * len(array)), array.dtype)
    bigger[: len(array)] = array
    return bigger
