"""What is written stays: which names are asked of the disk, and when."""

import errno
import os
import stat
from pathlib import Path

import pytest

from macbench import files
from macbench.errors import ConfigError
from macbench.files import make_folder, write_in_order, write_whole
from macbench.records import SCHEMAS, RunDirectory


@pytest.fixture
def synced(monkeypatch):
    """(path, names in it) of every folder that was written to the disk; ``answer`` is what its file system says."""
    fsync = os.fsync

    def record(file: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        if stat.S_ISDIR(os.fstat(file).st_mode):
            record.folders.append((path, set(os.listdir(path))))
            if record.answer:
                raise OSError(record.answer, os.strerror(record.answer))
        fsync(file)

    record.folders, record.answer = [], None
    monkeypatch.setattr(files.os, "fsync", record)
    return record


def test_folders_are_written_once_the_names_are_in_them(tmp_path, synced):
    for name in "ab":
        (tmp_path / name).mkdir()
    targets = [tmp_path / "a" / "1", tmp_path / "b" / "2", tmp_path / "a" / "3"]
    write_in_order([(target, lambda file: file.write(b"x")) for target in targets])
    assert sorted(synced.folders) == [(tmp_path / "a", {"1", "3"}), (tmp_path / "b", {"2"})]


def test_others_may_read_what_they_may_read_of_any_program(tmp_path):
    write_whole(tmp_path / "ours", lambda file: file.write(b"x"))
    (tmp_path / "plain").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_new_folders_are_named_in_those_above_them(tmp_path, synced):
    make_folder(tmp_path / "runs" / "task" / "model")
    assert [path for path, _ in synced.folders] == [tmp_path / "runs" / "task", tmp_path / "runs", tmp_path]
    synced.folders.clear()
    RunDirectory(tmp_path / "runs" / "task" / "model" / "mac-00000000")
    assert (tmp_path / "runs" / "task" / "model", {"mac-00000000"}) in synced.folders
    assert synced.folders[-1] == (tmp_path / "runs" / "task" / "model" / "mac-00000000", set(SCHEMAS))
    synced.folders.clear()
    make_folder(tmp_path / "runs")
    assert not synced.folders


@pytest.mark.parametrize("answer", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES])
def test_a_file_system_that_keeps_no_folders_is_written_to(tmp_path, synced, answer):
    synced.answer = answer
    write_whole(tmp_path / "a", lambda file: file.write(b"x"))
    assert (tmp_path / "a").read_bytes() == b"x" and synced.folders


def test_a_disk_that_lost_a_folder_is_one_line(tmp_path, synced):
    directory = RunDirectory(tmp_path / "mac-00000000")
    synced.answer = errno.EIO
    with pytest.raises(ConfigError, match=r"cannot be written \(Input/output error\)"):
        directory.write_text("a", "b")
