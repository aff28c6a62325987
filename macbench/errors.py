"""The one exception that user mistakes become: a single line that names the key, the value and what is allowed."""

import difflib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf.errors import OmegaConfBaseException

from macbench.redact import redact

# Line ends of every kind, and what would command a terminal.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

# What files that somebody else wrote can make of any reader, besides errors of its own.
FOREIGN = (TypeError, ValueError, KeyError, IndexError, AttributeError, RecursionError, MemoryError, OSError, OmegaConfBaseException)


class ConfigError(Exception):
    """Wrong input. ``str(error)`` is one line; the command line prints it and exits with code 2."""

    def __init__(self, key: str, value: object, allowed: str):
        self.key, self.value, self.allowed = key, value, allowed
        shown = "null" if value is None else value
        super().__init__(printable(redact(f"{key}={shown}: {allowed}")))


def printable(text: str) -> str:
    """On one line, and without what would command a terminal."""
    return _UNPRINTABLE.sub(" ", text)


def choose(key: str, value: str, choices: Iterable[str]) -> str:
    """Return ``value`` if it is among ``choices``, else raise a ConfigError that suggests the nearest one."""
    choices = list(choices)
    if value in choices:
        return value
    raise ConfigError(key, value, one_of(value, choices))


def one_of(value: str, choices: list[str]) -> str:
    """What is said of a ``value`` that is not among ``choices``: those, and the nearest one."""
    near = difflib.get_close_matches(str(value), choices, n=1)
    return f"must be one of {', '.join(choices)}" + (f" (did you mean {near[0]}?)" if near else "")


def one_line(error: Exception) -> str:
    """The first line of an exception's text, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextmanager
def ending(done: str = "read") -> Iterator[Callable[[Path], None]]:
    """How a command on run folders ends that cannot go on: one line, exit code 2. Wrong input says what is wrong; of what somebody else's files
    make of a reader, the line says which folder cannot be ``done``: the last one that the value of this context was called with."""
    at: list[Path] = []
    try:
        yield at.append
    except ConfigError as error:
        print(f"macbench: {error}", file=sys.stderr)
        sys.exit(2)
    except FOREIGN as error:
        said = f"cannot be {done} ({type(error).__name__}: {one_line(error)})"
        print(f"macbench: {ConfigError('RUN', at[-1] if at else '', said)}", file=sys.stderr)
        sys.exit(2)
