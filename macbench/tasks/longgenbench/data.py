"""The 400 items of a split: from a local copy of the official file, or from where it is published, checked by hash."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from macbench.errors import ConfigError
from macbench.tasks import hub, inside
from macbench.tasks.longgenbench import protocol
from macbench.untrusted import content

KEY = "task.data_path"


@dataclass(frozen=True)
class Item:
    """One order. ``checks``: (kind, id of the part, what it should include) for everything that is judged."""

    prompt: str
    type: str
    prefix: str
    number: int
    checks: tuple[tuple[str, int, str], ...]

    @property
    def scenario(self) -> str:
        return protocol.TYPES[self.type]


@dataclass(frozen=True)
class Items:
    """Items by scenario, in file order. ``official``: whether the file is the published one."""

    by_scenario: dict[str, list[Item]]
    source: str
    sha256: str
    official: bool

    @property
    def checks(self) -> int:
        return sum(len(item.checks) for items in self.by_scenario.values() for item in items)


def load(split: str, data_path: str | None, sha256: str | None = None) -> Items:
    """``data_path``: folder with the official file of this split, or that file; None fetches it. ``sha256``: what the file must have, or None."""
    facts = protocol.SPLITS[split]
    if data_path is None:
        try:
            path, source = hub.download(facts.url, facts.sha256), facts.url
        except hub.Unreachable as error:
            raise ConfigError(KEY, "null", f"needs a folder with {facts.file}, because {error}") from None
    else:
        path = Path(data_path).expanduser()
        path = inside.find(KEY, path, (facts.file,)) or path / facts.file if path.is_dir() else path
        if not path.is_file():
            raise ConfigError(KEY, data_path, f"must be a folder with {facts.file}, or such a file")
        source = path.name
    raw = content(KEY, path)
    try:
        entries = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ConfigError(KEY, path, f"cannot be read as JSON ({error}); is it truncated?") from None
    found = hashlib.sha256(raw).hexdigest()
    if sha256 is not None and found != sha256:
        raise ConfigError("task.data_sha256", sha256, f"but {path} has {found}")
    other = next((name for name, split_ in protocol.SPLITS.items() if split_.sha256 == found and split_ is not facts), None)
    if other is not None:
        raise ConfigError("task.split", split, f"but {path} is the official file of task.split={other}")
    if not isinstance(entries, list) or not entries:
        raise ConfigError(KEY, path, "is not a list of items")
    items = [_item(path, index, entry) for index, entry in enumerate(entries)]
    if len({item.prompt for item in items}) < len(items):
        raise ConfigError(KEY, path, "has the same prompt twice")
    by_scenario = {scenario: [item for item in items if item.scenario == scenario] for scenario in protocol.SCENARIOS}
    return Items(by_scenario, source, found, found == facts.sha256)


def _item(where: Path, index: int, entry: object) -> Item:
    def field(name: str, kind: type):
        value = entry.get(name) if isinstance(entry, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ConfigError(KEY, where, f"item {index} has no {kind.__name__} named {name!r}")
        return value

    checks = []
    for kind in protocol.KINDS:
        for part, event in field(f"checks_{kind}", dict).items():
            if not part.isdecimal() or len(part) > protocol.MOST_DIGITS or not isinstance(event, str):
                raise ConfigError(KEY, where, f"item {index} has a check of {part[:40]!r} that is not a number with a text")
            checks.append((kind, int(part), event))
    item = Item(field("prompt", str), field("type", str), field("prefix", str), field("number", int), tuple(checks))
    if item.type not in protocol.TYPES:
        raise ConfigError(KEY, where, f"item {index} has type {item.type!r}, must be one of {', '.join(protocol.TYPES)}")
    if not 1 <= item.number < 10**protocol.MOST_DIGITS:
        raise ConfigError(KEY, where, f"item {index} orders {item.number} parts, must be from 1 to {10**protocol.MOST_DIGITS - 1}")
    try:
        "".join([item.prompt, *(event for _, _, event in checks)]).encode()
    except UnicodeEncodeError:
        raise ConfigError(KEY, where, f"item {index} has half a character (a lone surrogate), which no tokenizer takes") from None
    if not item.prompt.endswith(item.prefix):
        raise ConfigError(KEY, where, f"item {index} has a prompt that does not end with its prefix")
    return item
