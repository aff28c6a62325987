"""Random uuids by the thousand, and their pieces: regular expressions and dictionaries would take half of a sample's time."""

from itertools import product

import numpy as np

from macbench.tasks.ruler.pieces import Pieces
from macbench.tasks.ruler.rng import Rng

_HEXADECIMAL = [i for i in range(36) if i not in (8, 13, 18, 23)]  # places of a uuid that hold no hyphen
_SEPARATORS = ("", " ", "-")
_SHORT = 4  # letters or digits of the pieces that have a place in the lookup table; longer runs are rare


def _lookup(values: dict[str, int]) -> np.ndarray:
    table = np.zeros(256, np.int64)
    table[[ord(character) for character in values]] = list(values.values())
    return table


_SEPARATOR = _lookup({" ": 1, "-": 2})
_NIBBLE = _lookup({character: i for i, character in enumerate("0123456789abcdef")})
_KIND = _lookup(dict.fromkeys("0123456789", 1) | dict.fromkeys("abcdef", 2))  # 0 is a separator


def uuid_letters(raw: np.ndarray) -> np.ndarray:
    """Version 4 uuids from pairs of random words, uint64 [n, 2], as their letters, uint8 [n, 36]."""
    high = raw[:, 0] & ~np.uint64(0xF000) | np.uint64(0x4000)  # the version
    low = raw[:, 1] & ~np.uint64(0xC0 << 56) | np.uint64(0x80 << 56)  # the variant of RFC 4122
    hexadecimal = np.stack([high, low], axis=1).astype(">u8").tobytes().hex().encode()
    letters = np.full((len(raw), 36), ord("-"), np.uint8)
    letters[:, _HEXADECIMAL] = np.frombuffer(hexadecimal, np.uint8).reshape(-1, 32)
    return letters


def random_uuid(rng: Rng) -> str:
    return uuid_letters(rng.raw(2).reshape(1, 2)).tobytes().decode()


class UuidPieces:
    """Cuts uuids into runs of letters and runs of digits in threes from the left, each with the space or hyphen before it."""

    def __init__(self, pieces: Pieces):
        self._pieces = pieces
        self._table = np.full(len(_SEPARATORS) * _SHORT << 4 * _SHORT, -1)  # code of a short piece -> table entry, -1 not asked yet
        runs = ["".join(run) for n in range(1, _SHORT + 1) for run in product("abcdef", repeat=n)]
        runs += [f"{i:0{n}d}" for n in range(1, 4) for i in range(10**n)]
        for i, separator in enumerate(_SEPARATORS):
            codes = [i * _SHORT + len(run) - 1 << 4 * _SHORT | int(run[::-1], 16) for run in runs]
            self._table[codes] = pieces.add(separator + run for run in runs)

    def entries(self, letters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Table entries of uuids, uint8 [n, 36], each with a space before it; and where each uuid begins among them, int64 [n]."""
        text = np.insert(letters, 0, ord(" "), axis=1).ravel()
        kind, place = _KIND[text], np.arange(len(text))
        changes = np.diff(kind, prepend=-1) != 0
        in_run = place - np.maximum.accumulate(np.where(changes, place, 0))
        cut = changes | ((kind == 1) & (in_run % 3 == 0))
        cut[1:] &= kind[:-1] != 0  # what follows a separator belongs to it
        starts = np.flatnonzero(cut)
        separator = _SEPARATOR[text[starts]]
        first = starts + (separator > 0)
        size = np.append(starts[1:], len(text)) - first
        code = separator * _SHORT + np.minimum(size, _SHORT) - 1 << 4 * _SHORT
        for i in range(_SHORT):
            code |= np.where(size > i, _NIBBLE[text[np.minimum(first + i, len(text) - 1)]], 0) << 4 * i
        entries = self._table[code]
        short = size <= _SHORT
        ask = np.flatnonzero((entries < 0) | ~short)
        if len(ask):
            string = text.tobytes().decode()
            entries[ask] = self._pieces.add(string[starts[i] : first[i] + size[i]] for i in ask)
            self._table[code[short]] = entries[short]
        return entries, np.flatnonzero(separator == 1)
