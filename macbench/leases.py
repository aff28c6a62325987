"""Who makes which example, when several processes work on one run.

    <run>/leases/worker-<id>     a process: who it is. It holds a lock on the file, and its heartbeat counts up in it.
    <run>/leases/<part>.<n>      a link to the worker that makes the example; n grows when a dead worker's lease is taken over

A lease is taken by creating its link, which only one process can do. On one machine the kernel tells at once that a worker is gone: the
lock goes with the process. Any other one counts as dead when its heartbeat has stood still for ``STALE`` seconds on the clock of who
watches: it died on another machine, or is stopped and may wake up again. No two clocks are compared, so a wrong one does no harm.

Leases save work and nothing else. Rows are right without them: parts are named by their example and written whole. A worker that wakes up
finds its examples recorded, or ``lost`` to who makes them now.
"""

import contextlib
import fcntl
import json
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic

BEAT = 10.0  # seconds between heartbeats
STALE = 120.0  # seconds without one after which a worker counts as dead; network file systems cache for a minute
_DIGITS = 20  # of the heartbeat, which begins the worker's file
_MOST = 1 << 12  # bytes of that file


class Leases:
    """The leases of this process on a run; a context manager that gives them back. ``claim`` and ``release`` take the names of parts."""

    def __init__(self, run: Path, beat: float = BEAT, stale: float = STALE):
        self.folder, self.beat, self.stale = run / "leases", beat, stale
        self._worker = self.folder / f"worker-{secrets.token_hex(6)}"
        self.last = False  # whether, after ``close``, no process works on the run any more
        self._held: set[str] = set()
        self._seen: dict[Path, tuple[bytes, float]] = {}  # heartbeats of other workers, and since when they stand still
        self._writing = threading.Lock()  # of the heartbeat
        self._file = self._register()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def __enter__(self) -> "Leases":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def claim(self, part: str) -> bool:
        """Whether this process may make the example now; False as long as a live worker has it."""
        self._rejoin()
        taken = self._numbers(part)
        if taken and self.alive(self.folder / f"{part}.{taken[-1]}"):
            return False
        try:
            (self.folder / f"{part}.{taken[-1] + 1 if taken else 0}").symlink_to(self._worker.name)
        except FileExistsError:
            return False
        self._held.add(part)
        return True

    def lost(self, part: str) -> bool:
        """Whether another worker has taken the example over from this one and makes it now."""
        path = held(self.folder.parent).get(part)
        return path is not None and not self._mine(path) and self.alive(path)

    def release(self, part: str) -> None:
        """The example is recorded, or given up. What another worker has taken over stays its own."""
        links = [self.folder / f"{part}.{number}" for number in self._numbers(part)]
        newest = max((i for i, link in enumerate(links) if self._mine(link)), default=-1)
        for link in links[: newest + 1]:
            link.unlink(missing_ok=True)
        self._held.discard(part)

    def alive(self, path: Path) -> bool:
        """Whether the worker of a lease, or of a worker's file, lives as far as one can know."""
        known, worker = look(path)
        if known is False:
            return False
        now, beat = monotonic(), worker["beat"]
        seen = self._seen.setdefault(path.resolve(), (beat, now))
        if seen[0] != beat:
            self._seen[path.resolve()] = (beat, now)
            return True
        return now - seen[1] < self.stale

    def close(self) -> None:
        """Give everything back, and clear away what dead workers left."""
        self._ended.set()
        self._thread.join()
        for part in list(self._held):
            self.release(part)
        self._worker.unlink(missing_ok=True)
        os.close(self._file)
        self.last = clear(self.folder, lambda path: look(path)[0] or self.alive(path))  # who is stopped may come back

    def _mine(self, lease: Path) -> bool:
        try:
            return lease.readlink().name == self._worker.name
        except OSError:
            return False

    def _rejoin(self) -> None:
        """Be known again after a sleep so long that another machine has cleared this worker away."""
        if not self._worker.exists():
            with self._writing:
                gone, self._file = self._file, self._register()
                os.close(gone)

    def _register(self) -> int:
        """The worker's file, which appears under its name with the lock already held. Returns its descriptor."""
        me = {"host": socket.gethostname(), "pid": os.getpid(), "started": datetime.now(UTC).isoformat(timespec="seconds")}
        while True:
            try:
                self.folder.mkdir(exist_ok=True)
                return self._appear(me)
            except FileNotFoundError:  # the last process before us has just removed the folder, or the file, which was not locked yet
                continue

    def _appear(self, me: dict) -> int:
        scratch = self.folder / f".{self._worker.name}"
        file = os.open(scratch, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with contextlib.suppress(OSError):  # a file system without locks: the heartbeat alone tells
                fcntl.flock(file, fcntl.LOCK_EX)
                me = me | {"kernel": kernel()}
            os.write(file, f"{0:0{_DIGITS}}\n{json.dumps(me)}\n".encode())
            scratch.rename(self._worker)
        except OSError:
            os.close(file)
            scratch.unlink(missing_ok=True)
            raise
        return file

    def _beat(self) -> None:
        beat = 0
        while not self._ended.wait(self.beat):
            beat += 1
            with self._writing, contextlib.suppress(OSError):  # whoever writes rows will say what is wrong with the disk
                os.pwrite(self._file, f"{beat:0{_DIGITS}}".encode(), 0)
                os.fsync(self._file)

    def _numbers(self, part: str) -> list[int]:
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            self.folder.mkdir(exist_ok=True)
            return []
        return sorted(int(n) for name, _, n in (name.rpartition(".") for name in names) if name == part and n.isdecimal())


def clear(folder: Path, alive: Callable[[Path], bool]) -> bool:
    """Clear away what dead workers left. Returns whether that was all, and with it the folder is gone."""
    try:
        for path in folder.iterdir():
            if not alive(path):
                path.unlink(missing_ok=True)
        folder.rmdir()
    except OSError:  # another process still needs the folder, or cleared it away as well
        return False
    return True


def leftovers(run: Path) -> bool:
    """Clear away the leases of a finished run whose last worker died before it could. As ``clear``; who may live on another machine, stays."""
    return clear(run / "leases", lambda path: look(path)[0] is not False)


def look(path: Path) -> tuple[bool | None, dict]:
    """Whether the worker of a lease or a worker's file lives, and what the file says; None if only its heartbeat can tell."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a copied folder may hold anything
            worker = describe(file.read(_MOST))
            # Nothing is in it: nobody holds it who began to write it, or will at once, and then begins anew.
            same = not worker["beat"] or (worker.get("kernel") and worker["kernel"] == kernel())
            return (_locked(file) if same else None), worker
    except OSError:
        return False, {}  # it cleaned up, or somebody copied the run without it


def describe(content: bytes) -> dict:
    """What a worker's file says: ``beat``, and ``host``, ``pid``, ``started``, ``kernel``."""
    beat, _, rest = content.partition(b"\n")
    try:
        return json.loads(rest) | {"beat": beat}
    except (ValueError, TypeError, RecursionError):
        return {"beat": content}


def held(run: Path) -> dict[str, Path]:
    """Part by part, the newest lease that there is, dead or alive."""
    found: dict[str, tuple[int, Path]] = {}
    folder = run / "leases"
    try:
        names = os.listdir(folder)
    except FileNotFoundError:  # nobody works on the run, or no longer
        names = []
    for name in names:
        if match := re.fullmatch(r"(part-\w+)\.(\d+)", name):
            path = folder / name
            found[match[1]] = max(found.get(match[1], (-1, path)), (int(match[2]), path))
    return {part: path for part, (_, path) in found.items()}


def kernel() -> str | None:
    """What processes share that can see each other's locks: one boot of one machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _locked(file) -> bool:
    """Whether another process holds the lock of an open file."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
