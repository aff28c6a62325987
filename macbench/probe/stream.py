"""Batches made by processes in the background, so that the GPU never waits for text."""

import multiprocessing
from collections import deque

from macbench.probe import regular
from macbench.probe.mixture import Batch, Mixture
from macbench.probe.regular import Ordinary

_mixture: Mixture  # of this process; a forked worker has its parent's

EVERY = 4  # steps between two of ordinary text


def work(step: int, length: int, rows: int, ordinary: int) -> tuple[Batch, Ordinary | None]:
    """What step ``step`` needs; ``ordinary``: tokens of a row of ordinary text, 0 for none."""
    try:
        return _work(step, length, rows, ordinary)
    except Exception as error:  # not every exception survives the way to another process, and one that does not would stall it
        raise RuntimeError(f"step {step}, {rows} x {length} tokens: {type(error).__name__}: {error}") from None


def _work(step: int, length: int, rows: int, ordinary: int) -> tuple[Batch, Ordinary | None]:
    extra = regular.make(_mixture.dialogue, _mixture.text, _mixture.seed, step, ordinary) if ordinary and step % EVERY == 0 else None
    return _mixture.batch(step, length, rows), extra


class Stream:
    """A queue of batches in order. ``workers`` processes make them, or this one (0). They fork, so make it before CUDA is used."""

    def __init__(self, mixture: Mixture, workers: int):
        global _mixture
        _mixture = mixture
        self.pool = multiprocessing.get_context("fork").Pool(workers) if workers else None
        self.queue: deque = deque()

    def ask(self, step: int, length: int, rows: int, ordinary: int) -> None:
        request = (step, length, rows, ordinary)
        self.queue.append((request, self.pool.apply_async(work, request) if self.pool else None))

    def get(self) -> tuple[tuple[int, int, int, int], tuple[Batch, Ordinary | None]]:
        """The oldest request and its batch."""
        request, result = self.queue.popleft()
        return request, result.get() if result else work(*request)

    def close(self) -> None:
        if self.pool:
            self.pool.terminate()
            self.pool.join()
