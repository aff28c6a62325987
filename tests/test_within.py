"""Tests of what other tests rely on: a hang ends."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.within import within


def test_what_takes_every_exception_for_its_own_is_ended():
    with pytest.raises(pytest.fail.Exception, match=r"took more than 0\.05 s"), within(0.05):
        while True:
            with contextlib.suppress(Exception):
                time.sleep(9)


def test_who_waits_for_a_pipe_is_ended_and_the_next_alarm_is_its_own(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for seconds in (0.05, 0.1):
        with pytest.raises(pytest.fail.Exception, match=f"{seconds} s"), within(seconds):
            (tmp_path / "pipe").read_bytes()
    with within(0.05):
        pass
    time.sleep(0.1)


def test_a_loop_inside_of_a_library_is_ended():
    script = "import itertools; from tests.within import within\nwith within(0.1): sum(itertools.repeat(0))"
    root = Path(__file__).resolve().parents[1]
    ended = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and ended.stderr.startswith("Timeout") and "took more" not in ended.stderr
