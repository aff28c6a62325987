"""Is a GGUF file what its header says? Checked before anything is allocated by its numbers.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: magic, version, counts, metadata, then a shape, a type and an offset
for every tensor. Every length is compared with what is left of the file.
"""

import mmap
import struct
from math import prod
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES

from macbench.errors import ConfigError

_VERSIONS = (2, 3)
_FIXED = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value by its type
_STRING, _ARRAY = 8, 9
# Less than takes a second or two. Items: of all arrays together; a vocabulary of 49,152 has 200,000, with its merges, scores and types.
_MOST_ENTRIES, _MOST_ITEMS, _MOST_DIMENSIONS = 1 << 16, 1 << 20, 4
_SIZES = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}  # (elements, bytes) of a block by type


class _Bad(Exception):
    pass


class _Reader:
    def __init__(self, data):
        self.data, self.at, self.items = data, 0, 0

    def skip(self, size: int) -> int:
        """Where the next ``size`` bytes begin; the reader goes past them."""
        if size > len(self.data) - self.at:
            raise _Bad(f"ends at byte {len(self.data)}, but needs {size} bytes from byte {self.at}")
        self.at += size
        return self.at - size

    def number(self, form: str) -> int:
        return struct.unpack_from("<" + form, self.data, self.skip(struct.calcsize(form)))[0]

    def count(self, what: str, most: int) -> int:
        number = self.number("Q")
        if number > most:
            raise _Bad(f"has {number} {what}, at most {most} are read")
        return number

    def value(self, kind: int) -> None:
        if kind in _FIXED:
            self.skip(_FIXED[kind])
        elif kind == _STRING:
            self.skip(self.number("Q"))
        elif kind == _ARRAY:
            inner, items = self.number("I"), self.number("Q")
            self.items += items
            if self.items > _MOST_ITEMS:
                raise _Bad(f"has {self.items} items in arrays, at most {_MOST_ITEMS} are read")
            if inner in _FIXED:
                self.skip(items * _FIXED[inner])
            elif inner == _STRING:
                for _ in range(items):
                    self.skip(self.number("Q"))
            else:
                raise _Bad(f"has an array of type {inner}")
        else:
            raise _Bad(f"has a value of type {kind}")


def check(path: Path) -> None:
    """Raises a ConfigError that says what is wrong with the file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _check(_Reader(data))
    except (OSError, ValueError, _Bad) as error:  # an empty file cannot be mapped
        raise ConfigError("model.gguf", path, f"is not a usable GGUF file: it {error}") from None


def _check(reader: _Reader) -> None:
    if (magic := reader.number("I")) != 0x46554747:
        raise _Bad(f"begins with {magic.to_bytes(4, 'little')!r}, not with GGUF")
    if (version := reader.number("I")) not in _VERSIONS:
        raise _Bad(f"has version {version}, must be 2 or 3")
    tensors, entries = reader.count("tensors", _MOST_ENTRIES), reader.count("metadata entries", _MOST_ENTRIES)
    for _ in range(entries):
        reader.value(_STRING)
        reader.value(reader.number("I"))
    ends = [_tensor(reader) for _ in range(tensors)]
    if max(ends, default=0) > len(reader.data) - reader.at:
        raise _Bad(f"has tensors up to {max(ends)} bytes after its header, but only {len(reader.data) - reader.at} bytes there")


def _tensor(reader: _Reader) -> int:
    """Where a tensor ends, in bytes after the header."""
    reader.value(_STRING)
    dimensions = reader.number("I")
    if dimensions > _MOST_DIMENSIONS:
        raise _Bad(f"has a tensor of {dimensions} dimensions")
    elements = prod(reader.number("Q") for _ in range(dimensions))
    kind, offset = reader.number("I"), reader.number("Q")
    if kind not in _SIZES:
        raise _Bad(f"has a tensor of the unknown type {kind}")
    block, size = _SIZES[kind]
    return offset + -(-elements // block) * size
