"""Random numbers that never change: the raw stream of PCG64, seeded by a hash of what the numbers are for.

numpy promises the raw bits of a bit generator for ever, but not what its distributions make of them, and Python promises only
``random()``. So the few distributions RULER needs are made here from raw bits.
"""

import hashlib

import numpy as np


def scaled(raw: np.ndarray, low: int, high: int) -> np.ndarray:
    """Integers of [low, high) made of random words, int64, the shape of ``raw``."""
    unit = (raw >> np.uint64(11)) * 2.0**-53
    return low + np.minimum((unit * (high - low)).astype(np.int64), high - low - 1)


class Rng:
    """A stream of its own for every key, for instance ``Rng("vt", seed, index)``; equal keys give equal streams on any machine."""

    def __init__(self, *key: object):
        self.key = key
        digest = hashlib.sha256(repr(tuple(map(str, key))).encode()).digest()
        self._bits = np.random.PCG64(int.from_bytes(digest[:16], "big"))

    def child(self, *key: object) -> "Rng":
        """An independent stream for a part of the same sample; drawing from one never shifts the other."""
        return Rng(*self.key, *key)

    def raw(self, n: int) -> np.ndarray:
        """``n`` random words, uint64 [n]. Two calls give the same words as one call for both."""
        return self._bits.random_raw(n)

    def integers(self, low: int, high: int, n: int) -> np.ndarray:
        """``n`` integers of [low, high), int64 [n]; one raw word each."""
        return scaled(self.raw(n), low, high)

    def below(self, n: int) -> int:
        """One integer of [0, n)."""
        return int(self.integers(0, n, 1)[0])

    def permutation(self, n: int) -> np.ndarray:
        """A random order of range(n), int64 [n]: the order in which n random words sort."""
        return np.argsort(self.raw(n), kind="stable")

    def sample(self, n: int, k: int) -> list[int]:
        """``k`` different integers of range(n), in random order."""
        if 4 * k > n:
            return self.permutation(n)[:k].tolist()
        found: dict[int, None] = {}  # the first k different ones of many draws
        while len(found) < k:
            found.update(dict.fromkeys(self.integers(0, n, k + 8).tolist()))
        return list(found)[:k]

    def letters(self, alphabet: str, length: int, n: int) -> list[str]:
        """``n`` different random words of ``length`` letters of ``alphabet``."""
        words: dict[str, None] = {}
        while len(words) < n:
            missing = n - len(words)
            draws = self.integers(0, len(alphabet), missing * length).reshape(missing, length).tolist()
            words.update(dict.fromkeys("".join(alphabet[i] for i in draw) for draw in draws))
        return list(words)
