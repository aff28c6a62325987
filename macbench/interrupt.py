"""Ctrl-C, and the SIGTERM that a cluster sends before it kills: one line instead of a traceback from wherever it hit."""

import os
import signal
import sys
import threading

MESSAGE = b"macbench: interrupted; finished examples are kept, the same command continues\n"


def exit_at_once() -> None:
    """From now on SIGINT ends the process with code 130; nothing is being written yet."""

    def stop(signum, frame):
        os.write(2, MESSAGE)
        os._exit(130)

    signal.signal(signal.SIGINT, stop)


class Terminated(KeyboardInterrupt):
    """SIGTERM."""


def raise_again() -> None:
    """From now on SIGINT and SIGTERM raise KeyboardInterrupt, so that open files, caches and leases are left in order."""
    if threading.current_thread() is not threading.main_thread():
        return  # a launcher's worker thread, where signals never arrive
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # else a launcher has its own way

        def terminate(signum, frame):
            raise Terminated

        signal.signal(signal.SIGTERM, terminate)


# Imported first by macbench.run; acts only where that module is the program, not where it is a library.
if getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", None) == "macbench.run":
    exit_at_once()
