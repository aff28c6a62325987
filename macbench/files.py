"""Files that are there whole or not at all, and stay there once they are: neither a kill nor a power cut takes them back."""

import errno
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import IO

# How the name of a file begins that is being written, or whose writer was killed.
SCRATCH = ".writing-"
# What says that a disk did not keep a folder; anything else, that its file system keeps folders by itself or cannot be asked to.
_LOST = (errno.EIO, errno.ENOSPC, errno.EDQUOT)
_THREADS = 16  # that wait for the disk
_MASK = os.umask(0o077)  # the one way to read it is to set it
os.umask(_MASK)
_MODE = 0o666 & ~_MASK  # as any program's files: who works on a run beside this user reads them, too
Write = Callable[[IO[bytes]], object]
Stamp = tuple[int, int]


def write_whole(target: Path, write: Write) -> None:
    """``write(file)`` into a temporary file beside ``target`` that then takes its place: there is never half a file."""
    write_in_order([(target, write)])


def write_in_order(files: list[tuple[Path, Write]]) -> list[Stamp]:
    """Several files, each as by ``write_whole``. They appear one after the other once all are safe on the disk, and then their names are made
    safe, too; a journal that is asked for all of them at once writes them for little more than the price of one. Returns their stamps."""
    with ExitStack() as stack:
        opened = []
        for target, write in files:
            file = stack.enter_context(tempfile.NamedTemporaryFile(dir=target.parent, prefix=SCRATCH, delete=False))
            stack.callback(Path(file.name).unlink, missing_ok=True)  # there only if it has not taken its place
            os.fchmod(file.fileno(), _MODE)  # a temporary file is its owner's alone
            write(file)
            file.flush()
            opened.append(file)
        with ThreadPoolExecutor(min(len(files), _THREADS)) as threads:
            list(threads.map(os.fsync, [file.fileno() for file in opened]))
            for (target, _), file in zip(files, opened, strict=True):
                os.replace(file.name, target)
            list(threads.map(_keep, {target.parent for target, _ in files}))
        return [stamp(os.fstat(file.fileno())) for file in opened]


def stamp(found: os.stat_result) -> Stamp:
    """Tells a file from every other one that takes its place."""
    return found.st_ino, found.st_mtime_ns


def make_folder(path: Path) -> None:
    """A folder and those above it, as far as they are not there yet, as safe on the disk as what will be written into it."""
    new = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        _keep(folder.parent)


def _keep(folder: Path) -> None:
    """Have the names in a folder written to the disk."""
    file = None
    try:
        file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(file)
    except OSError as error:
        if error.errno in _LOST:
            raise
    finally:
        if file is not None:
            os.close(file)
