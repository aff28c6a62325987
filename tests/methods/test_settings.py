"""Files of ``conf/method`` and wrong values of their knobs."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from macbench.errors import ConfigError
from macbench.methods.base import Method
from macbench.methods.multipole import Multipole
from macbench.methods.oracle_topk import OracleTopK
from macbench.methods.quest import Quest
from macbench.methods.rocketkv import RocketKV
from macbench.methods.streaming_llm import StreamingLLM
from macbench.methods.tidaldecode import TidalDecode
from macbench.settings import build


@pytest.mark.parametrize("file", sorted(Path("conf/method").glob("*.yaml")), ids=lambda f: f.stem)
def test_settings_files_build_their_method(file):
    node = OmegaConf.load(file)
    method = build(node, "method", Method)
    settings = {k for k in node if k not in ("_target_", "name")}
    assert node.name == file.stem
    assert settings == set(method.__dataclass_fields__)
    lines = file.read_text().splitlines()
    assert all("#" in line for line in lines if not line.startswith(("_target_", "name")))


def test_settings_beyond_all_memory_get_one_line():
    """Numbers that no tensor could have: a traceback from the depths otherwise."""
    tried = 0
    for file in Path("conf/method").glob("*.yaml"):
        node = OmegaConf.load(file)
        for key in (k for k, value in node.items() if isinstance(value, int) and not isinstance(value, bool)):
            for value in (2**31, 10**30):
                with pytest.raises(ConfigError, match=f"method.{key}={value}: must be .*") as error:
                    build(OmegaConf.merge(node, {key: value}), "method", Method)
                assert "\n" not in str(error.value)
                tried += 1
    assert tried > 50


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        (StreamingLLM, "sinks", -1),
        (StreamingLLM, "recent", 0),
        (StreamingLLM, "mode", "fast"),
        (StreamingLLM, "positions", "new"),
        (Quest, "budget", 15),
        (Quest, "budget", 100.5),
        (Quest, "page", 0),
        (Quest, "min_pages", 0),
        (Quest, "dense_layers", "0"),
        (Quest, "gqa", "mean"),
        (Quest, "mode", "kernel"),
        (Multipole, "budget", 0),
        (Multipole, "replacement", 1),
        (Multipole, "mode", "fast"),
        (Multipole, "seed", -1),
        (OracleTopK, "budget", 0),
        (OracleTopK, "variant", "head"),
        (OracleTopK, "count", "free"),
        (OracleTopK, "page", -4),
        (RocketKV, "budget", 15),
        (RocketKV, "window", 0),
        (RocketKV, "max_new", 1.5),
        (RocketKV, "mode", "mt"),
        (TidalDecode, "budget", True),
        (TidalDecode, "reselect", 2),
        (TidalDecode, "gqa", "sum"),
        (TidalDecode, "mode", None),
    ],
)
def test_wrong_settings_get_one_line(kind, key, value):
    with pytest.raises(ConfigError, match=f"method.{key}={'null' if value is None else value}: must be ") as error:
        kind(**{key: value})
    assert "\n" not in str(error.value)
