"""Batches made by processes in the background, so that the GPU never waits for text."""

import multiprocessing
import os
import signal
from collections import deque
from concurrent.futures import ProcessPoolExecutor

from macbench.probe import regular
from macbench.probe.mixture import Mixture
from macbench.probe.steps import Part

_mixture: Mixture  # of this process; a forked worker has its parent's

EVERY = 4  # steps between two of ordinary text


def _outlive(parent: int) -> None:
    """Ctrl-C and a cluster's SIGTERM reach every process of a group; what the parent still waits for is made all the same."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None if os.getppid() == parent else os._exit(143))


def work(part: int, step: int, length: int, rows: int, ordinary: int) -> Part:
    """Part number ``part`` of step ``step``; ``ordinary``: tokens of a row of ordinary text, 0 for none."""
    try:
        return _work(part, step, length, rows, ordinary)
    except Exception as error:  # not every exception survives the way to another process, and one that does not would stall it
        raise RuntimeError(f"step {step}, {rows} x {length} tokens: {type(error).__name__}: {error}") from None


def _work(part: int, step: int, length: int, rows: int, ordinary: int) -> Part:
    extra = regular.make(_mixture.dialogue, _mixture.text, _mixture.seed, step, ordinary, part) if ordinary and step % EVERY == 0 else None
    return _mixture.batch(step, length, rows, part * rows), extra


class Stream:
    """A queue of steps in order, ``parts`` of each. ``workers`` processes make them, or this one (0). They fork: make it before CUDA is used."""

    def __init__(self, mixture: Mixture, workers: int, parts: range = range(1)):
        global _mixture
        _mixture, self.parts = mixture, parts
        fork = multiprocessing.get_context("fork")
        self.pool = ProcessPoolExecutor(workers, fork, _outlive, (os.getpid(),)) if workers else None
        self.queue: deque = deque()
        if self.pool:
            self.pool.submit(int)  # the first call forks them all

    def ask(self, step: int, length: int, rows: int, ordinary: int) -> None:
        request = (step, length, rows, ordinary)
        self.queue.append((request, [self.pool.submit(work, part, *request) for part in self.parts] if self.pool else None))

    def get(self) -> tuple[tuple[int, int, int, int], list[Part]]:
        """The oldest request and what was asked for."""
        request, results = self.queue.popleft()
        return request, [result.result() for result in results] if results else [work(part, *request) for part in self.parts]

    def close(self) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)
