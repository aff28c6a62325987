"""Files that are there whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

# How the name of a file begins that is being written, or whose writer was killed.
SCRATCH = ".writing-"


def write_whole(target: Path, write: Callable[[IO[bytes]], object]) -> None:
    """``write(file)`` into a temporary file beside ``target`` that then takes its place: there is never half a file."""
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=SCRATCH, delete=False) as file:
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise
