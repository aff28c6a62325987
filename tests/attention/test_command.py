"""task=attention from a configuration."""

import pytest
from omegaconf import OmegaConf

from macbench.attention.command import run
from macbench.cli import CONF
from macbench.errors import ConfigError

METHOD = {"name": "mac", "band": 16, "tau": 0.45, "window": 32}


def task(**changes) -> dict:
    default = OmegaConf.to_container(OmegaConf.load(CONF / "task" / "attention.yaml"))
    return default | {"heads": "4/2", "hit_rate": [1], "head_dim": 64, "steps": 4} | changes


def test_a_run_prints_its_table_and_leaves_parquet(tmp_path, capsys):
    assert run(task(), METHOD, [200], "auto", "cpu", 1, str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "mac:torch" in printed
    assert "records:" in printed
    assert len(list(tmp_path.glob("attention/mac-*.parquet"))) == 1


@pytest.mark.parametrize(
    ("changes", "backend", "ctx", "key"),
    [
        ({"heads": "4/3"}, "auto", 200, "task.heads"),
        ({"hit_rate": 2}, "auto", 200, "task.hit_rate"),
        ({"misses": "rand"}, "auto", 200, "task.misses"),
        ({"batch": 0}, "auto", 200, "task.batch"),
        ({"dtype": "int8"}, "auto", 200, "task.dtype"),
        ({}, "cudnn", 200, "backend"),
        ({}, "auto", 40, "ctx"),
    ],
)
def test_wrong_values_are_one_line(changes, backend, ctx, key, tmp_path):
    with pytest.raises(ConfigError) as error:
        run(task(**changes), METHOD, [ctx], backend, "cpu", 1, str(tmp_path))
    assert str(error.value).startswith(f"{key}=")
    assert "\n" not in str(error.value)
