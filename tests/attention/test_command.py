"""task=attention from a configuration."""

import sys
from types import SimpleNamespace

import pyarrow.parquet as pq
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


@pytest.mark.parametrize("backend", ["flashinfer", "flashinfer_tc", "flash_attn", "triton"])
def test_backends_that_do_not_run_on_a_cpu_say_so(backend, monkeypatch, tmp_path, capsys):
    """Asked for by name, they are not replaced by torch; the rest of the table is measured."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert run(task(), METHOD, [200], backend, "cpu", 1, str(tmp_path)) == 0
    out = capsys.readouterr().out.splitlines()
    (line,) = [line for line in out if f"full:{backend} " in line]
    assert "not installed" in line or "not on a CPU" in line
    assert not any("full:torch" in line for line in out)
    assert any("mac:torch" in line for line in out)


def test_installed_gpu_packages_need_a_gpu(monkeypatch, tmp_path, capsys):
    for name in ("flashinfer", "flash_attn"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(flash_attn_with_kvcache=None))
    assert run(task(backends=["flash_attn", "flashinfer"]), METHOD, [200], "auto", "cpu", 1, str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert out.count("not on a CPU") == 2
    assert out.count("full:torch") == 1


def test_the_method_s_knobs_reach_the_rows(tmp_path, capsys):
    knobs = {"sink": 4, "max_chain": 2, "min_context": 150}
    assert run(task(backends=["torch"]), METHOD | knobs, [200], "auto", "cpu", 1, str(tmp_path)) == 0
    (path,) = tmp_path.glob("attention/mac-*.parquet")
    row = pq.read_table(path).to_pylist()[-1]
    assert {key: row[key] for key in knobs} == knobs
    assert row["kv_tokens"] >= 2 * (4 + 16)


def test_a_context_below_the_method_s_least_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"^ctx=200: is below method\.min_context=2048"):
        run(task(), METHOD | {"min_context": 2048}, [200], "auto", "cpu", 1, str(tmp_path))
