"""The list of files beside the reference records, and what is said of those that are gone or are others."""

import shutil
import subprocess

import pytest

from analysis import figures, manifest
from analysis.records import Records
from macbench.errors import ConfigError
from tests.analysis.test_numbers import REFERENCE


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(REFERENCE, tmp_path / "runs" / "reference")


def lines(root) -> list[str]:
    """What drawing says of the records below a folder."""
    return [item.lack for item in figures.draw(Records(root), root.parent / "out", ()) if item.name.startswith("records")]


def test_the_committed_list_is_of_the_committed_files():
    listed = (REFERENCE / manifest.NAME).read_text()
    assert listed == manifest.text(REFERENCE), "records changed: python -m analysis.manifest runs/reference"


def test_sha256sum_reads_it(tmp_path):
    (tmp_path / "a folder").mkdir()
    (tmp_path / "a folder" / "x").write_bytes(b"abc")
    (tmp_path / ".writing-1").write_bytes(b"half")
    manifest.main([str(tmp_path)])
    manifest.main([str(tmp_path)])  # it does not list itself
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert (tmp_path / manifest.NAME).read_text() == f"{abc}  a folder/x\n"
    assert subprocess.run(["sha256sum", "-c", "--strict", manifest.NAME], cwd=tmp_path, capture_output=True, text=True).stdout == "a folder/x: OK\n"


def test_every_file_and_run_that_is_gone_has_a_line(copy):
    assert lines(copy.parent) == []
    h100 = copy / "h100"
    (h100 / "attention" / "mac-56bc9272.parquet").unlink()
    (h100 / "decode" / "llama31_8b.parquet").write_bytes((copy / "h200" / "decode" / "llama31_8b.parquet").read_bytes())
    shutil.rmtree(h100 / "longgenbench_16k")
    said = lines(copy.parent)
    assert len(said) == 3
    assert any(line.startswith(f"{h100}/attention/mac-56bc9272.parquet is not there; {copy}/SHA256SUMS lists it") for line in said)
    assert any(line.startswith(f"{h100}/longgenbench_16k is not there; {copy}/SHA256SUMS lists ") and "files in it" in line for line in said)
    assert f"{h100}/decode/llama31_8b.parquet is not the file that {copy}/SHA256SUMS lists" in said


def test_a_damaged_list_and_a_wrong_folder(tmp_path):
    (tmp_path / manifest.NAME).write_text("what is this\n")
    assert manifest.lacks(tmp_path) == [f"{tmp_path}/SHA256SUMS has a line 1 that is not one of sha256sum"]
    (tmp_path / manifest.NAME).write_bytes(b"\xff")
    assert "cannot be read" in manifest.lacks(tmp_path)[0]
    with pytest.raises(ConfigError, match="must be one folder"):
        manifest.main([str(tmp_path / "nothing")])
