"""What a record says about the code that made it."""

import shutil
import subprocess

import pytest

from macbench import environment


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The module as if it lay alone in a folder outside any checkout."""
    target = tmp_path / "environment.py"
    shutil.copy(environment.__file__, target)
    monkeypatch.setattr(environment, "__file__", str(target))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("MACBENCH_COMMIT", raising=False)
    return target


def git(folder, *args) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *who, *args], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_a_checkout_gives_its_commit_and_whether_it_was_changed(copy, monkeypatch):
    monkeypatch.setenv("MACBENCH_COMMIT", "what somebody says")
    git(copy.parent, "init")
    git(copy.parent, "add", copy.name)
    git(copy.parent, "commit", "-m", "first")
    head = git(copy.parent, "rev-parse", "HEAD")
    assert environment.commit() == {"commit": head, "dirty": False}
    copy.write_text(copy.read_text() + "\n")
    changed = environment.commit()
    assert len(changed.pop("diff_sha256")) == 64 and changed == {"commit": head, "dirty": True}


def test_somebody_elses_checkout_is_not_ours(copy):
    git(copy.parent, "init")
    git(copy.parent, "commit", "--allow-empty", "-m", "first")
    assert environment.commit() is None


def test_a_copy_without_history_is_what_the_variable_says(copy, monkeypatch):
    assert environment.commit() is None
    monkeypatch.setenv("MACBENCH_COMMIT", "abc123")
    assert environment.commit() == {"commit": "abc123", "dirty": None}
