"""Middle truncation as the official code does it, but with every context tokenised once and only as far as it is needed.

Official (pred.py): encode the raw prompt; if it has more than ``most`` tokens, decode its first and last ``most // 2`` and send that text
through the chat template, which encodes all of it again. For texts of millions of words most of that work is thrown away. Byte-level
BPE tokenizers always cut at the places that `_CUT` describes, so here the two ends of a context are encoded up to such a cut, put
between the tokens of the question, and after a truncation only the words around the seam are encoded again. Where a tokenizer does not
cut there (tried on `PROBE`), or a text has no such places or does not survive a round trip, everything is done the official way: same
tokens, more time.
"""

import re
from dataclasses import dataclass

import numpy as np

from macbench.models.chat import Chat

# After a single newline, and before a word's own space; no other white space near. (U+FFFD is also what half a character decodes to.)
_CUT = re.compile("(?<=[^\\s\ufffd]\n)(?=[^\\s\ufffd])|(?<=[^\\s\ufffd])(?= [A-Za-z])")
_CHARACTERS_PER_TOKEN = 6  # of plain text about 4.5; a piece that turns out too short is made again twice as long
_PIECE = 1 << 16  # characters that a thread encodes at a time
_SEAM = 4096  # tokens that are looked through for a line start on either side of a seam

PROBE = """Title (1984)
It isn't "so" simple: 3.14, 1,000,000 and e.g. 20% -- naïve café . Isn 't it ?

	indented	tab  
  two spaces
12345 digits
\u3000wide space
- bullet...\r
'quote'
}; // code \\
if (a  !=  b) { return x[0]; }
中文。
<text>

# Heading

"Quote," he said .
...
_end_
"""


@dataclass(frozen=True)
class Ends:
    """Tokens of a context, int32: all of them in ``head`` (``tail`` is None), or enough from either end for truncations to ``need``.

    ``faithful``: whether they decode to the text. They do not where it spells out special tokens, or has bytes that the tokenizer lacks.
    """

    head: np.ndarray
    tail: np.ndarray | None
    need: int
    faithful: bool


@dataclass(frozen=True)
class Cut:
    """A prompt as it is sent. ``text``: the user turn; ``ids``: with the chat template; ``truncated``: whether its middle is gone."""

    text: str
    ids: list[int]
    truncated: bool


class Truncator:
    """Encodes prompts for one chat. Remembers the tokens of contexts by key: at most ``need`` * 2 int32 each."""

    def __init__(self, chat: Chat):
        self.chat = chat
        self.bos = chat.encode("")
        self.exact = self._tried()
        self.overhead = len(chat.encode_piece(chat.head)) + len(chat.encode_piece(chat.tail))  # tokens around the user turn
        self._ends: dict[str, Ends] = {}

    def _tried(self) -> bool:
        parts = _CUT.split(PROBE)
        whole = self.chat.encode_piece(PROBE)
        pieces = [token for ids in self.chat.encode_pieces(parts) for token in ids]
        return whole == pieces and self.chat.decode(whole) == PROBE

    # -- the official way ---------------------------------------------------------------------------------------------

    def plain(self, prompt: str, most: int) -> Cut:
        """Encode, cut, decode, encode. ``most``: tokens of the raw prompt, BOS included."""
        ids = self.chat.encode(prompt)
        truncated = len(ids) > most
        if truncated:
            half = most // 2
            prompt = self.chat.decode(ids[:half] + ids[len(ids) - half :])
        return Cut(prompt, self.chat.encode(self.chat.render(prompt)), truncated)

    # -- the same from pieces -----------------------------------------------------------------------------------------

    def around(self, key: str, before: str, document: str, after: str, most: int, need: int | None = None) -> Cut:
        """``plain(before + document + after)``, the document's tokens taken from memory under ``key``.

        ``before`` ends with a newline, ``after`` starts with one. ``need``: the largest ``most`` that this document will be asked for.
        """
        return self._pieced(key, before, document, after, most, need or most) or self.plain(before + document + after, most)

    def _pieced(self, key: str, before: str, document: str, after: str, most: int, need: int) -> Cut | None:
        body, after = document + "\n", after[1:]
        if not self.exact or not all(_visible(text) for text in (before, body, after)):
            return None
        ends = self.ends(key, body, max(need, most))
        encode = self.chat.encode_piece
        opening, closing = self.chat.encode(self.chat.head + before), encode(after + self.chat.tail)
        left, right = len(self.bos) + len(encode(before)), len(encode(after))
        if ends.tail is None and left + len(ends.head) + right <= most:
            return Cut(before + body + after, [*opening, *ends.head.tolist(), *closing], False)
        left, right = most // 2 - left, most // 2 - right  # tokens of the document that stay on either side
        tail = ends.head if ends.tail is None else ends.tail
        if left < 1 or right < 1 or left > len(ends.head) or right > len(tail) or not ends.faithful:
            return None  # the seam lies in the question, or decoding changes the text elsewhere, too
        first, last = ends.head[:left], tail[len(tail) - right :]
        i, j = self._cut(first, range(left - 1, 0, -1)), self._cut(last, range(1, right))
        if i is None or j is None:
            return None
        middle = self.chat.decode([*first[i:].tolist(), *last[:j].tolist()])
        ids = [*opening, *first[:i].tolist(), *encode(middle), *last[j:].tolist(), *closing]
        text = before + self.chat.decode(first[:i].tolist()) + middle + self.chat.decode(last[j:].tolist()) + after
        return Cut(text, ids, True)

    def _cut(self, ids: np.ndarray, order: range) -> int | None:
        """The first index in ``order`` that lies at a cut, or None."""
        texts: dict[int, str] = {}

        def text(index: int) -> str:
            if index not in texts:
                texts[index] = self.chat.decode([int(ids[index])]) if index >= 0 else ""
            return texts[index]

        def cut(index: int) -> bool:
            before = text(index - 2) + text(index - 1)
            return any(found.start() == len(before) for found in _CUT.finditer(before + text(index), max(len(before) - 1, 0)))

        return next((i for i in order[:_SEAM] if cut(i)), None)

    def ends(self, key: str, body: str, most: int) -> Ends:
        """Tokens of a document that ends with a newline, enough for any truncation to at most ``most``."""
        known = self._ends.get(key)
        if known is None or (known.tail is not None and known.need < most):
            known = self._ends[key] = self._encode_ends(body, most)
        return known

    def _encode_ends(self, body: str, most: int) -> Ends:
        enough = most // 2 + 1  # from both ends: more than ``most`` in all
        size = _CHARACTERS_PER_TOKEN * enough
        while 2 * size < len(body):
            stop, start = _next_cut(body, size), _previous_cut(body, len(body) - size)
            if stop is None or start is None or stop > start:
                break
            head, tail = self._encode(body[:stop]), self._encode(body[start:])
            if len(head) >= enough and len(tail) >= enough:
                faithful = self._survives(head, body[:stop]) and self._survives(tail, body[start:])
                return Ends(head[:enough].copy(), tail[len(tail) - enough :].copy(), most, faithful)
            size *= 2
        whole = self._encode(body)
        return Ends(whole, None, most, self._survives(whole, body))

    def _survives(self, ids: np.ndarray, text: str) -> bool:
        return self.chat.decode(ids.tolist()) == text

    def _encode(self, text: str) -> np.ndarray:
        """Tokens of a text, cut into pieces so that threads share the work."""
        starts = [0]
        while len(text) - starts[-1] > _PIECE and (start := _next_cut(text, starts[-1] + _PIECE)) is not None:
            starts.append(start)
        pieces = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
        return np.concatenate([np.array(ids, np.int32) for ids in self.chat.encode_pieces(pieces)])


def _visible(text: str) -> bool:
    return bool(text) and not text[0].isspace() and text[0] != "\ufffd"


def _next_cut(text: str, position: int) -> int | None:
    """The first cut at or after ``position``."""
    found = _CUT.search(text, position)
    return found.start() if found else None


def _previous_cut(text: str, position: int) -> int | None:
    """A cut at or before ``position``: the last one, unless there is none for a long way back."""
    reach = 1 << 12
    while True:
        low = max(position - reach, 0)
        found = [cut.start() for cut in _CUT.finditer(text, low, position + 2) if cut.start() <= position]
        if found or low == 0:
            return found[-1] if found else None
        reach *= 8
