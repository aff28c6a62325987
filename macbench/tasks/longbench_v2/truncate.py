"""Middle truncation as the official code does it, but with every context tokenised once and only as far as it is needed.

Official (pred.py): encode the raw prompt; if it has more than ``most`` tokens, decode its first ``most // 2`` and as many of its last as make
``most`` (one more than the first if that is odd), and send that text through the chat template, which encodes all of it again. For
texts of millions of words most of that work is thrown away. Byte-level BPE tokenizers always cut at the places that `_CUT` describes. So here
only the two ends of a context are encoded, once for all prompts about it, and everything is encoded in pieces, without offsets and by all
threads. Where a tokenizer does not cut there (tried on `PROBE`), everything is done the official way: same tokens, more time.
"""

import re
from dataclasses import dataclass

import numpy as np

from macbench.models.chat import Chat

# After a single newline, and before a word's own space; no other white space near. (U+FFFD is also what half a character decodes to.)
_CUT = re.compile("(?<=[^\\s\ufffd]\n)(?=[^\\s\ufffd])|(?<=[^\\s\ufffd])(?= [A-Za-z])")
_CHARACTERS_PER_TOKEN = 6  # of plain text about 4.5; a piece that turns out too short is made again twice as long
_PIECE = 1 << 12  # characters that are encoded at a time

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
    """Tokens of a context, int32: all of them in ``head`` (``tail`` is None), or enough from either end for truncations to ``need``."""

    head: np.ndarray
    tail: np.ndarray | None
    need: int


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
        return whole == pieces

    # -- the official way ---------------------------------------------------------------------------------------------

    def plain(self, prompt: str, most: int) -> Cut:
        """Encode, cut, decode, encode. ``most``: tokens of the raw prompt, BOS included."""
        ids = self.chat.encode(prompt)
        truncated = len(ids) > most
        if truncated:
            prompt = self.chat.decode(ids[: most // 2] + ids[-most // 2 :])
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
        opening, closing = self.bos + self._encode(before).tolist(), self._encode(after).tolist()
        if ends.tail is None and len(opening) + len(ends.head) + len(closing) <= most:
            first, last = self._encode(self.chat.head + before).tolist(), self._encode(after + self.chat.tail).tolist()
            return Cut(before + body + after, self._with_bos([*first, *ends.head.tolist(), *last]), False)
        first, last = most // 2, most - most // 2
        kept = [*opening, *ends.head[:first].tolist(), *([] if ends.tail is not None else closing)][:first]
        tail = ends.head if ends.tail is None else ends.tail
        rest = [*([] if ends.tail is not None else opening), *tail[-last:].tolist(), *closing]
        text = self.chat.decode(kept + rest[-last:])
        return Cut(text, self._with_bos(self._encode(self.chat.render(text)).tolist()), True)

    def _with_bos(self, ids: list[int]) -> list[int]:
        return ids if ids[: len(self.bos)] == self.bos else self.bos + ids

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
                return Ends(head[:enough].copy(), tail[len(tail) - enough :].copy(), most)
            size *= 2
        return Ends(self._encode(body), None, most)

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
