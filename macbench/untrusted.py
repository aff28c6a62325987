"""Files that somebody else may have written, read without being run: bounded, nothing but files; configurations without aliases or references."""

import json
import os
import stat
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from macbench.errors import ConfigError, one_line

_MOST = 1 << 16  # bytes; a resolved configuration has four thousand
_MOST_JSON = 16 << 20  # bytes; the summary of a large grid has 300,000
_MOST_DATA = 128 << 20  # bytes; HotpotQA's questions have 46 million
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def bounded(path: Path, most: int = _MOST_JSON) -> str:
    """The text of a file. ValueError: it is longer than ``most`` bytes, or a link to a device, which has no end, or to a pipe, which waits."""
    return _read(path, most).decode()


def content(key: str, path: Path, most: int = _MOST_DATA) -> bytes:
    """All bytes of a data file; a ConfigError for ``key`` if it cannot be read, or has more than ``most``."""
    try:
        return _read(path, most)
    except (OSError, ValueError) as error:
        raise ConfigError(key, path, f"cannot be read: {one_line(error)}") from None


def _read(path: Path, most: int) -> bytes:
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path.name} is no file")
        read = file.read(most + 1) if found.st_size <= most else None
    if read is None or len(read) > most:
        raise ValueError(f"{path.name} has {found.st_size} bytes, at most {most} are read")
    return read


def document(path: Path) -> dict:
    """A JSON file that holds an object; anything else is a ValueError."""
    try:
        found = json.loads(bounded(path))
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no object")
    return found


def configuration(run: Path) -> DictConfig:
    """``config.yaml`` of a run folder, which a run writes resolved; anything else is a ConfigError.

    A line of aliases to lines of aliases is gigabytes, and so is a reference to texts of references; ``${oc.env:...}`` reads secrets.
    """
    path = run / "config.yaml"
    try:
        text = bounded(path, _MOST)
        if "${" in text or any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=_LOADER)):
            raise ValueError(f"{path.name} has aliases or references")
        found = OmegaConf.create(text)
        if not isinstance(found, DictConfig):
            raise ValueError(f"{path.name} is no configuration")
        return found
    except (OSError, ValueError, TypeError, AttributeError, AssertionError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError("RUN", run, f"is not a run folder ({one_line(error)})") from None
