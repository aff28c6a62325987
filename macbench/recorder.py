"""Examples on their way to the disk, beside whatever the caller does meanwhile: one group of them at a time."""

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from macbench.errors import one_line, printable
from macbench.redact import redact


class Recorder:
    """A context manager, at whose end everything that was put in has been written, or was tried to be, also after an error or any number of
    Ctrl-C. Of what then fails a line says so, where another error is raised already."""

    def __init__(self):
        self._thread = ThreadPoolExecutor(1, "recorder")
        self._begun: list[tuple[Future, Callable]] = []  # in order; two at most

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        failures, stop, busy = [], None, True
        while busy:
            try:
                while self._begun:
                    failures += filter(None, [self._begun[0][0].exception()])
                    del self._begun[0]
                self._thread.shutdown()  # after all of it: a Ctrl-C makes it forget that its thread is at work
                busy = False
            except KeyboardInterrupt as again:  # not before the leases of what is being written can be given back
                stop = again
        if failures and (error or stop) is None:
            raise failures[0]
        for said in {one_line(failure): None for failure in failures}:
            if error is None or said != one_line(error):  # a full disk is for all of them
                print(f"macbench: {printable(redact(said))}", file=sys.stderr)
        if stop is not None and error is None:
            raise stop

    def put(self, write: Callable[[], object], then: Callable[[object], None]) -> None:
        """Have ``write()`` follow in the thread; ``then(result)`` is called when it is settled. Returns when what was put in before is: if
        that has failed, it is raised here, and this is written nevertheless."""
        self._begun.append((self._thread.submit(write), then))
        self._settle(1)

    def settle(self) -> None:
        """Wait until everything is written. What went wrong there is raised here."""
        self._settle(0)

    def _settle(self, left: int) -> None:
        while len(self._begun) > left:
            writing, then = self._begun[0]
            wait([writing])
            del self._begun[0]
            then(writing.result())
