"""Ctrl-C while Python still imports torch and transformers: one line instead of a traceback from wherever it hit."""

import os
import signal
import sys

MESSAGE = b"macbench: interrupted; finished examples are kept, the same command continues\n"


def exit_at_once() -> None:
    """From now on SIGINT ends the process with code 130; nothing is being written yet."""

    def stop(signum, frame):
        os.write(2, MESSAGE)
        os._exit(130)

    signal.signal(signal.SIGINT, stop)


def raise_again() -> None:
    """From now on SIGINT raises KeyboardInterrupt, so that open files and caches are left in order."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Imported first by macbench.run; acts only where that module is the program, not where it is a library.
if getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", None) == "macbench.run":
    exit_at_once()
