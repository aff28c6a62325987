"""The 503 items: from the hub, or from a data.json of which never more than one item is in memory."""

import hashlib
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from json import loads
from pathlib import Path

from macbench.errors import ConfigError
from macbench.tasks import hub, inside
from macbench.tasks.longbench_v2 import protocol

KEY = "task.data_path"
FILES = ("data.json", "sample_26.json")
FIELDS = (
    *("_id", "domain", "sub_domain", "difficulty", "length", "question"),
    *(f"choice_{letter}" for letter in protocol.LETTERS),
    *("answer", "context"),
)
_ALLOWED = {"answer": tuple(protocol.LETTERS), "difficulty": protocol.DIFFICULTIES, "length": protocol.LENGTHS}
# Of an item: bytes (two million words are 12 million, or twice that in escapes), and texts and brackets (ours have 26).
_LONGEST, _MOST_MARKS = 64 << 20, 10_000
_SPACE, _MARK, _REST = re.compile(rb"[ \n\r\t]*+"), re.compile(rb'["{}\[\]\0]'), re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


@dataclass(frozen=True)
class Facts:
    """What is kept of every item: everything that a score is grouped by, and the answer."""

    id: str
    domain: str
    sub_domain: str
    difficulty: str
    length: str
    answer: str


class Items:
    """Items by index, in the order of the data set. ``sha256``: over all fields of all items, the same from file and hub."""

    def __init__(self, where: str, source: str, items: Iterator[dict]):
        self.where, self.source = where, source
        self.facts: list[Facts] = []
        digest, seen = hashlib.sha256(), set()
        for index, item in enumerate(items):
            facts = _checked(where, index, item)
            if facts.id in seen:
                raise ConfigError(KEY, where, f"has two items with the _id {facts.id}")
            seen.add(facts.id)
            self.facts.append(facts)
            for field in FIELDS:
                digest.update(_bytes(where, index, field, item[field]) + b"\0")
        if not self.facts:
            raise ConfigError(KEY, where, "has no items")
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.facts)

    def item(self, index: int) -> dict:
        """All fields of an item."""
        raise NotImplementedError


class FileItems(Items):
    """A JSON array in a file. One pass notes where each item lies; an item is read again when it is needed."""

    def __init__(self, path: Path):
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ConfigError(KEY, path, f"cannot be read ({error})") from None
        self._spans: list[tuple[int, int]] = []
        super().__init__(str(path), path.name, self._scan(path))
        if hasattr(mmap, "MADV_DONTNEED"):
            self._bytes.madvise(mmap.MADV_DONTNEED)  # the pages of the pass do not count as this process's memory any more

    def _scan(self, path: Path) -> Iterator[dict]:
        for start, stop in objects(self._bytes, path):
            self._spans.append((start, stop))
            yield self._parse(path, start, stop)

    def _parse(self, path: object, start: int, stop: int) -> dict:
        try:
            return loads(self._bytes[start:stop])
        except (ValueError, RecursionError) as error:
            raise ConfigError(KEY, path, f"item {len(self._spans) - 1} is not JSON ({error})") from None

    def item(self, index: int) -> dict:
        return self._parse(self.where, *self._spans[index])


class HubItems(Items):
    """Rows of a data set of the package ``datasets``, which lie in files of its cache."""

    def __init__(self):
        try:
            self._rows = hub.rows(protocol.REPO, None, "train", protocol.REVISION)
        except hub.Unreachable as error:
            raise ConfigError(KEY, "null", f"needs a folder with {FILES[0]} of {protocol.REPO}, because {error}") from None
        super().__init__(protocol.REPO, f"huggingface.co/datasets/{protocol.REPO}@{protocol.REVISION}", iter(self._rows))

    def item(self, index: int) -> dict:
        return dict(self._rows[index])


def load(data_path: str | None, sha256: str | None = None) -> Items:
    """From a folder with data.json, from a JSON file, or from the hub. ``sha256``: what ``Items.sha256`` must be, or None."""
    if data_path is None:
        items = _hub()
    else:
        path = Path(data_path).expanduser()
        if path.is_dir():
            path = inside.find(KEY, path, FILES) or path / FILES[0]
        if not path.is_file():
            raise ConfigError(KEY, data_path, f"must be a folder with {FILES[0]}, or such a file")
        stat = path.stat()
        items = _file(path.resolve(), stat.st_size, stat.st_mtime_ns)
    if sha256 is not None and items.sha256 != sha256:
        raise ConfigError("task.data_sha256", sha256, f"but the items of {items.where} have {items.sha256}")
    return items


@lru_cache(maxsize=2)
def _file(path: Path, size: int, changed: int) -> FileItems:
    return FileItems(path)


@lru_cache(maxsize=1)
def _hub() -> HubItems:
    return HubItems()


def objects(data: mmap.mmap | bytes, where: object) -> Iterator[tuple[int, int]]:
    """(start, stop) of each object of a JSON array, in bytes, without parsing what is inside."""
    position = _skip(data, 0)
    if data[position : position + 1] != b"[":
        raise ConfigError(KEY, where, "is not a JSON list of items")
    position, number = _skip(data, position + 1), 0
    while data[position : position + 1] == b"{":
        stop = _end(data, position, where, number)
        yield position, stop
        number += 1
        position = _skip(data, stop)
        if data[position : position + 1] != b",":
            break
        position = _skip(data, position + 1)
        if data[position : position + 1] == b"]":
            raise ConfigError(KEY, where, f"has a comma but no item after item {number - 1}")
    if not data[position : position + 1]:
        raise ConfigError(KEY, where, f"ends after item {number - 1}; the file is truncated")
    if data[position : position + 1] != b"]":
        raise ConfigError(KEY, where, f"has something else than an item at byte {position}")
    position = _skip(data, position + 1)
    if data[position : position + 1]:
        raise ConfigError(KEY, where, f"goes on after the list of items, at byte {position}")


def _skip(data, position: int) -> int:
    """The first byte at or after ``position`` that is no white space."""
    return _SPACE.match(data, position).end()


def _end(data, position: int, where: object, number: int) -> int:
    """One past the object that begins at ``position``. Only brackets and strings are looked at, and no more of them than an item has."""
    depth, last = 0, position + _LONGEST
    for _ in range(_MOST_MARKS):
        mark = _MARK.search(data, position, last)
        if mark is None:
            break
        position = mark.end()
        if mark[0] == b'"':
            position = _after_string(data, position, last)
            if position is None:
                break
        elif mark[0] in b"{[":
            depth += 1
        elif mark[0] == b"\0":
            raise ConfigError(KEY, where, f"has a zero byte in item {number}, at byte {position - 1}")
        else:
            depth -= 1
            if depth == 0:
                return position
    else:
        raise ConfigError(KEY, where, f"has more than {_MOST_MARKS} texts and brackets in item {number}")
    if last < len(data):
        raise ConfigError(KEY, where, f"has no end of item {number} within {_LONGEST} bytes")
    raise ConfigError(KEY, where, f"ends in the middle of item {number}; the file is truncated")


def _after_string(data, position: int, last: int) -> int | None:
    """One past the quote that ends a string, of which ``position`` is inside. A search for quotes makes a long text cost next to nothing; texts
    that are mostly quotes and backslashes are left to an expression, which is slower, but never slow."""
    for _ in range(1000):
        quote = data.find(b'"', position, last)
        if quote < 0:
            return None
        before = data[max(position, quote - 64) : quote]
        slashes = len(before) - len(before.rstrip(b"\\"))
        if slashes == 64:
            break
        if slashes % 2 == 0:  # an odd number of backslashes escapes the quote
            return quote + 1
        position = quote + 1
    rest = _REST.match(data, position, last)
    return rest and rest.end()


def _bytes(where: object, index: int, field: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ConfigError(KEY, where, f"item {index} has half a character (a lone surrogate) in {field!r}, which no tokenizer takes") from None


def _checked(where: object, index: int, item: object) -> Facts:
    for field in FIELDS:
        if not isinstance(item, dict) or not isinstance(item.get(field), str):
            raise ConfigError(KEY, where, f"item {index} has no text named {field!r}")
    for field in ("_id", "question", "context"):
        if not item[field].strip():
            raise ConfigError(KEY, where, f"item {index} has nothing in {field!r}")
    for field, allowed in _ALLOWED.items():
        if item[field] not in allowed:
            raise ConfigError(KEY, where, f"item {index} ({item['_id']}) has {field} {item[field]!r}, must be one of {', '.join(allowed)}")
    return Facts(item["_id"], *(item[field] for field in ("domain", "sub_domain", "difficulty", "length", "answer")))
