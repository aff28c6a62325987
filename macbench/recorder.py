"""Examples on their way to the disk, beside whatever the caller does meanwhile: one group of them at a time."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Recorder:
    """A context manager, at whose end everything that was put in has been written, also after an error or Ctrl-C."""

    def __init__(self):
        self._thread = ThreadPoolExecutor(1, "recorder")
        self._last: tuple[Future, Callable] | None = None

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()

    def put(self, write: Callable[[], object], then: Callable[[object], None]) -> None:
        """Begin ``write()`` in the thread, once what was put in before is settled; ``then(result)`` follows when this one is."""
        self.settle()
        self._last = self._thread.submit(write), then

    def settle(self) -> None:
        """Wait until everything is written. What went wrong there is raised here."""
        if self._last is not None:
            (writing, then), self._last = self._last, None
            then(writing.result())
