"""Leases: one process per example, whoever dies, sleeps or has a wrong clock."""

import os
import threading
from datetime import datetime

import pytest

from macbench import leases as module
from macbench.leases import Leases, held

PART = "part-0123456789abcdef"


@pytest.fixture
def elsewhere(monkeypatch):
    """``elsewhere(make)``: what ``make()`` returns on another machine, whose locks cannot be seen from here."""

    def call(make):
        with monkeypatch.context() as patch:
            patch.setattr(module, "kernel", lambda: "another boot")
            return make()

    return call


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock, set by hand: ``clock[0]``."""
    time = [1000.0]
    monkeypatch.setattr(module, "monotonic", lambda: time[0])
    return time


def die(worker: Leases) -> None:
    """End like a killed process: no heartbeat, no lock, everything left where it is."""
    worker._ended.set()
    worker._thread.join()
    os.close(worker._file)


def test_an_example_has_one_worker_at_a_time(tmp_path):
    one, two = Leases(tmp_path), Leases(tmp_path)
    assert one.claim(PART) and not two.claim(PART)
    assert two.claim(PART.replace("0", "f"))
    one.release(PART)
    assert two.claim(PART) and not one.claim(PART)
    two.close()
    assert not two.last and one.claim(PART)
    one.close()
    assert one.last and not (tmp_path / "leases").exists()


def test_of_many_claims_one_succeeds(tmp_path):
    workers = [Leases(tmp_path) for _ in range(8)]
    parts = [f"part-{i:016x}" for i in range(40)]
    won: list[tuple[str, int]] = []

    def claim(i):
        won.extend((part, i) for part in parts if workers[i].claim(part))

    threads = [threading.Thread(target=claim, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(part for part, _ in won) == parts
    for worker in workers:
        worker.close()
    assert not (tmp_path / "leases").exists()


def test_on_one_machine_a_dead_workers_lease_is_free_at_once(tmp_path):
    dead, one, two = Leases(tmp_path), Leases(tmp_path), Leases(tmp_path)
    assert dead.claim(PART)
    assert not one.claim(PART)
    die(dead)
    assert one.claim(PART) and not two.claim(PART)
    assert held(tmp_path)[PART].name == PART + ".1"
    for worker in (one, two):
        worker.close()
    assert not (tmp_path / "leases").exists()  # what the dead one left is gone, too


def test_a_worker_elsewhere_is_dead_when_its_heartbeat_stands_still(tmp_path, elsewhere, clock):
    other = elsewhere(lambda: Leases(tmp_path, beat=1e9))
    assert other.claim(PART)
    mine = Leases(tmp_path)
    for now in (1000, 1060, 1119):
        clock[0] = now
        assert not mine.claim(PART)
    os.pwrite(other._file, b"00000000000000000001", 0)  # it lives
    for now in (1121, 1200, 1240):
        clock[0] = now
        assert not mine.claim(PART)
    clock[0] = 1241
    assert mine.claim(PART)
    mine.close()
    other.close()


def test_a_stopped_worker_of_this_machine_is_taken_over_and_wakes_up_harmless(tmp_path, clock):
    """Its lock stays, its heartbeat does not; afterwards the example is the new worker's until that one gives it back."""
    stopped, mine, third = Leases(tmp_path, beat=1e9), Leases(tmp_path, beat=1e9), Leases(tmp_path, beat=1e9)
    assert stopped.claim(PART) and not mine.claim(PART) and not stopped.lost(PART)
    clock[0] += 119
    assert not mine.claim(PART)
    clock[0] += 2
    assert mine.claim(PART)
    assert stopped.lost(PART) and not mine.lost(PART)
    stopped.release(PART)
    assert held(tmp_path)[PART].name == PART + ".1" and not third.claim(PART) and not stopped.claim(PART)
    mine.close()
    assert not mine.last and (tmp_path / "leases" / stopped._worker.name).exists()  # it lives, after all
    assert stopped.claim(PART) and not stopped.lost(PART)
    for worker in (stopped, third):
        worker.close()
    assert third.last


def test_who_was_cleared_away_elsewhere_comes_back(tmp_path, elsewhere, clock):
    asleep = elsewhere(lambda: Leases(tmp_path, beat=1e9))
    assert asleep.claim(PART)
    mine = Leases(tmp_path)
    assert not mine.claim(PART)
    clock[0] += 121
    mine.close()
    assert mine.last and not (tmp_path / "leases").exists()
    assert asleep.claim(PART)
    late = Leases(tmp_path)
    assert not late.claim(PART)
    late.close()
    asleep.close()
    assert asleep.last


def test_heartbeats_are_written(tmp_path, elsewhere):
    other = elsewhere(lambda: Leases(tmp_path, beat=0.01))
    assert other.claim(PART)
    seen = set()
    for _ in range(1000):
        seen.add(module.describe(held(tmp_path)[PART].read_bytes())["beat"])
        if len(seen) > 2:
            break
        threading.Event().wait(0.01)
    assert len(seen) > 2
    other.close()


def test_a_clock_set_back_changes_nothing(tmp_path, elsewhere, clock, monkeypatch):
    """Times of day and of files may say anything: only a monotonic clock of who watches decides."""
    other = elsewhere(lambda: Leases(tmp_path, beat=1e9))
    assert other.claim(PART)
    mine = Leases(tmp_path)
    assert not mine.claim(PART)

    class Yesterday(datetime):
        @classmethod
        def now(cls, zone=None):
            return datetime(2001, 1, 1, tzinfo=zone)

    monkeypatch.setattr(module, "datetime", Yesterday)
    for path in (tmp_path / "leases").iterdir():
        os.utime(path, (0, 0))
    clock[0] += 100
    assert not mine.claim(PART)
    late = Leases(tmp_path)  # whoever comes later begins to watch later
    assert not late.claim(PART)
    clock[0] += 30
    assert not late.claim(PART)
    assert mine.claim(PART)
    for worker in (mine, late, other):
        worker.close()


def test_a_file_system_without_locks(tmp_path, clock, monkeypatch):
    def refuses(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(module.fcntl, "flock", refuses)
    one, two = Leases(tmp_path, beat=1e9), Leases(tmp_path, beat=1e9)
    assert one.claim(PART) and not two.claim(PART)
    clock[0] += 121
    assert two.claim(PART)
    one.close()
    two.close()


@pytest.mark.parametrize("content", ["", '00000000000000000000\n{"kernel": ' + f'"{module.kernel()}"' + "}\n"])
def test_who_was_killed_while_it_began_leaves_nothing(tmp_path, content):
    """Its file has no name yet that others know."""
    (tmp_path / "leases").mkdir()
    (tmp_path / "leases" / ".worker-0123456789ab").write_text(content)
    mine = Leases(tmp_path)
    mine.close()
    assert mine.last and not (tmp_path / "leases").exists()


def test_who_is_cleared_away_while_it_begins_begins_anew(tmp_path, monkeypatch):
    flock, times = module.fcntl.flock, []

    def slow(file, how):
        if not times:
            times.append(True)
            assert module.leftovers(tmp_path)
        flock(file, how)

    monkeypatch.setattr(module.fcntl, "flock", slow)
    late = Leases(tmp_path)
    assert times and late.claim(PART)
    late.close()
    assert late.last


def test_a_full_disk_leaves_no_worker(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "write", full)
    with pytest.raises(OSError, match="No space"):
        Leases(tmp_path)
    assert not list((tmp_path / "leases").iterdir())


@pytest.mark.parametrize("kind", ["device", "pipe", "nested"])
def test_files_of_workers_that_nobody_wrote(tmp_path, kind):
    (tmp_path / "leases").mkdir()
    path = tmp_path / "leases" / "worker-0123456789ab"
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_text("0\n" + "[" * 4000)
    assert module.look(path)[0] in (None, False)


def test_leases_of_a_copied_run_are_nobodys(tmp_path):
    (tmp_path / "leases").mkdir()
    (tmp_path / "leases" / f"{PART}.0").symlink_to("worker-that-stayed-behind")
    mine = Leases(tmp_path)
    assert mine.claim(PART)
    mine.close()
    assert not (tmp_path / "leases").exists()
