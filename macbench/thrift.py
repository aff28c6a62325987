"""Structures in Thrift's compact protocol, which is what headers of parquet files are written in.

https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md: a field is (steps to its number << 4 | kind), integers are
zigzag varints. What readers could take in two ways is refused: a field that is there twice, numbers beyond what their kind holds.
"""

_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCTURE = 1, 2, 3, 7, 8, 9, 10, 12
_BITS = {4: 16, 5: 32, 6: 64}
_DEEPEST = 16  # structures and lists in each other; a parquet footer has six


def structure(content: bytes, at: int = 0, depth: int = 0) -> tuple[dict[int, object], int]:
    """What a structure that begins at ``at`` holds, by the numbers of its fields, and where it ends. ValueError, IndexError: it is none."""
    found, number = {}, 0
    if depth > _DEEPEST:
        raise ValueError("it is nested too deeply")
    while kind := content[at]:
        if kind >> 4:
            number, at = number + (kind >> 4), at + 1
        else:
            number, at = _integer(content, at + 1, 16)
        if number in found or not 0 < number < 1 << 15:
            raise ValueError("a field is there twice, or has no number")
        found[number], at = _value(content, at, kind & 15, depth)
    return found, at + 1


def _value(content: bytes, at: int, kind: int, depth: int) -> tuple[object, int]:
    if kind in (_TRUE, _FALSE):
        return kind == _TRUE, at
    if kind in _BITS:
        return _integer(content, at, _BITS[kind])
    if kind in (_BYTE, _DOUBLE):
        return None, at + (1 if kind == _BYTE else 8)
    if kind == _BINARY:
        length, at = _varint(content, at)
        return content[at : at + length], at + length
    if kind == _STRUCTURE:
        return structure(content, at, depth + 1)
    if kind in (_LIST, _SET) and depth < _DEEPEST:
        return _list(content, at, depth + 1)
    raise ValueError("a field is of an unknown kind")


def _list(content: bytes, at: int, depth: int) -> tuple[list, int]:
    kind, length, at = content[at] & 15, content[at] >> 4, at + 1
    if length == 15:
        length, at = _varint(content, at)
    if length > len(content) - at:  # each takes a byte or more
        raise ValueError("a list is longer than what it is in")
    found = []
    for _ in range(length):
        value, at = (None, at + 1) if kind in (_TRUE, _FALSE) else _value(content, at, kind, depth)
        found.append(value)
    return found, at


def _integer(content: bytes, at: int, bits: int) -> tuple[int, int]:
    value, at = _varint(content, at)
    if value >> bits:
        raise ValueError("a number is too large")
    return value >> 1 ^ -(value & 1), at


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while (byte := content[at]) & 128:
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if shift > 63:
            raise ValueError("a number has no end")
    return value | byte << shift, at + 1
