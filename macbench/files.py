"""Files that are there whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import IO

# How the name of a file begins that is being written, or whose writer was killed.
SCRATCH = ".writing-"
Write = Callable[[IO[bytes]], object]


def write_whole(target: Path, write: Write) -> None:
    """``write(file)`` into a temporary file beside ``target`` that then takes its place: there is never half a file."""
    write_in_order([(target, write)])


def write_in_order(files: list[tuple[Path, Write]]) -> None:
    """Several files, each as by ``write_whole``. They appear one after the other once all are safe on the disk; a journal that is asked for
    all of them at once writes them for little more than the price of one."""
    with ExitStack() as stack:
        opened = []
        for target, write in files:
            file = stack.enter_context(tempfile.NamedTemporaryFile(dir=target.parent, prefix=SCRATCH, delete=False))
            stack.callback(Path(file.name).unlink, missing_ok=True)  # there only if it has not taken its place
            write(file)
            file.flush()
            opened.append(file)
        with ThreadPoolExecutor(len(files)) as threads:
            list(threads.map(os.fsync, [file.fileno() for file in opened]))
        for (target, _), file in zip(files, opened, strict=True):
            os.replace(file.name, target)
