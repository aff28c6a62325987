"""Jobs of a Hydra sweep, wherever a launcher runs them: one that fails does not end the others, and the command's exit code tells."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from macbench.errors import ConfigError

_FOLDER = "MACBENCH_SWEEP"  # environment variable that jobs inherit: where they note exit codes


def begin(folder: Path) -> None:
    """Before the jobs; ``folder`` must be on a file system that they share."""
    try:
        os.environ[_FOLDER] = tempfile.mkdtemp(prefix="codes-", dir=folder.resolve())
    except OSError as error:
        raise ConfigError("runs_dir", folder, f"cannot be written ({error.strerror})") from error


def note(code: int) -> None:
    """A job's exit code. A job that did not inherit the folder has said on its own output what went wrong."""
    folder = os.environ.get(_FOLDER)
    if folder and Path(folder).is_dir():
        try:
            os.close(tempfile.mkstemp(prefix=f"{code}-", dir=folder)[0])
        except OSError:  # no room for a note: the other jobs would find none either
            sys.exit(code)


def end() -> int:
    """The largest exit code of all jobs."""
    folder = Path(os.environ.pop(_FOLDER))
    codes = [int(path.name.partition("-")[0]) for path in folder.iterdir()]
    shutil.rmtree(folder, ignore_errors=True)
    return max(codes, default=0)
