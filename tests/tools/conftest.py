"""A real run of a tiny model, finished, for the tests of what reads runs."""

import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from macbench import run as run_module
from macbench.records import part_name
from tests import kills
from tests.test_cli import macbench  # noqa: F401


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(runs, arguments) of a finished run of four examples; copied by every test."""
    folder = tmp_path_factory.mktemp("made")
    args = kills.arguments(kills.tiny_model(folder / "model"), folder / "runs", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["macbench", *args])
        run_module.main()
    return folder / "runs", args


@pytest.fixture
def run(made, tmp_path) -> Path:
    shutil.copytree(made[0], tmp_path / "runs")
    (config,) = (tmp_path / "runs").rglob("config.yaml")
    return config.parent


@pytest.fixture
def again(made, tmp_path):
    """The command of ``run``, on the copy."""
    return [a if not a.startswith("runs_dir=") else f"runs_dir={tmp_path / 'runs'}" for a in made[1]]


@pytest.fixture
def tool(monkeypatch, capsys):
    def call(module, *args):
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, args)])
        code = 0
        try:
            module.main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return code, captured.out, captured.err

    return call


def rewrite(path: Path, change) -> None:
    """Change a part's rows, as somebody with an editor would: a valid file, made by nobody."""
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def first(run: Path, table: str) -> Path:
    return run / table / f"{part_name('niah_single_1', '0')}.parquet"


def change(path: Path, how) -> None:
    pq.write_table(how(pq.read_table(path)), path)
