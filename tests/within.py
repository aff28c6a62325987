"""The end of a hang."""

import faulthandler
import signal
from contextlib import contextmanager

import pytest

LONGEST = 10  # seconds
STDERR = [2]  # descriptors; the last one is that of the terminal, where pytest keeps what tests print


@contextmanager
def within(seconds: float = LONGEST):
    """Fails what takes longer, and ends it: Python by an alarm that no ``except Exception`` takes for its own, a loop inside of a library,
    which hears no alarm, a second later with the process and every thread's traceback."""

    def late(*_):
        pytest.fail(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + 1, exit=True, file=STDERR[-1])
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
