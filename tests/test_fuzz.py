"""Input that is random, or a good one with something random in it: one line or a result, never a traceback or a hang."""

import json
import os
import shutil
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.numpy import save_file

from macbench import cli
from macbench import run as run_module
from macbench.attention import command as attention
from macbench.errors import ConfigError
from macbench.latency import command as latency
from macbench.models import gguf_header
from macbench.partial import Partial
from macbench.tasks.base import Example
from macbench.tasks.longbench_v2 import data as longbench
from macbench.tasks.longgenbench import data as longgenbench
from macbench.tasks.ruler.data import Data
from tests import real
from tests.tasks import longbench_v2_data, longgenbench_data
from tests.test_cli import macbench, tiny_args, tiny_model  # noqa: F401
from tests.test_hostile import SQUAD, gguf, refused  # noqa: F401
from tests.within import within

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


# -- models -----------------------------------------------------------------------------------------------------------


@given(st.data())
@settings(QUICK, max_examples=15)
def test_damaged_safetensors(tiny_model, tmp_path_factory, data):  # noqa: F811
    """Random bytes over the header; the configuration is good, so that the file itself is opened."""
    folder = tmp_path_factory.mktemp("damaged")
    for path in tiny_model.iterdir():
        if path.name != "model.safetensors":
            shutil.copy(path, folder)
    save_file({"model.norm.weight": np.ones(48, np.float32)}, folder / "model.safetensors")
    content = bytearray((folder / "model.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / "model.safetensors").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    refused(folder, real.chat())
    shutil.rmtree(folder)


@given(data=st.data())
@settings(QUICK, max_examples=300)
def test_random_gguf_headers(gguf, tmp_path_factory, data):  # noqa: F811
    """Cut, overwritten or made of nothing: an answer in time, and what passes lies within the file."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.gguf"
    content = bytearray(gguf)
    for _ in range(data.draw(st.integers(0, 6))):
        where = data.draw(st.integers(0, 400))
        some = data.draw(st.sampled_from([b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 1 << 40), struct.pack("<Q", 1 << 20), b"GGUF", b"\x09\0\0\0"]))
        content[where : where + len(some)] = some
    path.write_bytes(
        data.draw(st.one_of(st.just(bytes(content)), st.just(bytes(content[: data.draw(st.integers(0, 500))])), st.binary(max_size=200)))
    )
    with within():
        try:
            gguf_header.check(path)
        except ConfigError as error:
            assert "\n" not in str(error)


# -- data -------------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


def mangled(good: list | dict):
    """A good document with one value at a random depth replaced, or something else altogether."""

    @st.composite
    def build(draw):
        whole = json.loads(json.dumps(good))
        node = whole
        while isinstance(node, list | dict) and node:
            key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else list(range(len(node)))))
            if not isinstance(node[key], list | dict) or not node[key] or draw(st.booleans()):
                node[key] = draw(JSON)
                break
            node = node[key]
        return whole

    return st.one_of(build(), JSON)


HOTPOT = [{"question": "q?", "answer": "a", "context": [["title", ["one.", "two."]]]}]
ESSAYS = {"text": "many words"}
WORDS = {"0": "word", "1": "other"}


@pytest.mark.parametrize(
    ("name", "good", "read"),
    [
        ("data.json", longbench_v2_data.items(3), lambda folder: longbench.load(str(folder)).item(0)),
        ("Dataset_short.json", longgenbench_data.items(), lambda folder: longgenbench.load("16k", str(folder))),
        ("dev-v2.0.json", SQUAD, lambda folder: Data(str(folder)).squad),
        ("hotpot_dev_distractor_v1.json", HOTPOT, lambda folder: Data(str(folder)).hotpot),
        ("PaulGrahamEssays.json", ESSAYS, lambda folder: Data(str(folder)).essays),
        ("english_words.json", WORDS, lambda folder: Data(str(folder)).english_words),
    ],
)
def test_random_items(tmp_path, name, good, read):
    good = good if name != "Dataset_short.json" else good[:2]
    for short in [i for i in good if name == "data.json"] if isinstance(good, list) else []:
        short["context"] = short["context"][:200]

    @given(mangled(good))
    @QUICK
    def check(content):
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")
        os.utime(tmp_path / name, ns=(check.count, check.count))  # readers keep what they read by time
        check.count += 1
        with within():
            try:
                read(tmp_path)
            except ConfigError as error:
                assert "\n" not in str(error) and name in str(error)

    check.count = 0
    (tmp_path / name).write_text(json.dumps(good))
    read(tmp_path)
    check()
    for text in ("[" * 100_000, '{"a":' * 100_000, "[1" + "0" * 5000 + "]", "", "\0", "NaN"):
        (tmp_path / name).write_text(text)
        with within(), pytest.raises(ConfigError):
            read(tmp_path)


# -- run folders ------------------------------------------------------------------------------------------------------


@given(content=st.binary(max_size=300), cut=st.integers(0, 600))
@QUICK
def test_damaged_partial_generations_are_dropped(tmp_path_factory, content, cut):
    run = tmp_path_factory.mktemp("partial")
    made = Example("a", "0", "", [1, 2], [], 3)
    kept = Partial(run, "full", "", made)
    kept.folder.mkdir(parents=True)
    np.savez_compressed(kept.folder / "part-00000.npz", tokens=np.arange(3))
    path = kept.folder / "part-00000.npz"
    path.write_bytes(path.read_bytes()[:cut] + content)
    assert Partial(run, "full", "", made).earlier is None and not path.exists()
    shutil.rmtree(run)


# -- the command line -------------------------------------------------------------------------------------------------


@given(st.text(max_size=12) | st.from_regex(r"-?[0-9]{1,30}[kKmM.]?[0-9]?", fullmatch=True))
@settings(QUICK, max_examples=300)
def test_random_contexts(text):
    try:
        assert cli.parse_ctx(text) >= 1
    except ConfigError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("value", ["9" * 5000, "9" * 5000 + "k", "[" * 3000 + "]" * 3000, "{a:" * 3000 + "1" + "}" * 3000])
def test_values_without_an_end(macbench, tmp_path, value):  # noqa: F811
    for key in ("ctx", "seed", "++grid.tau"):
        with within():
            code, _, err = macbench(f"{key}={value}", f"runs_dir={tmp_path}")
        assert code == 2 and err.count("\n") == 1 and err.startswith("macbench: ")


def _keys() -> list[str]:
    """Every knob of conf/, groups and nodes among them, and what is none."""
    found = {"hydra.verbose", "hydra.run.dir", "no_such", "grid.tau", "task.sources.ruler"}
    for path in sorted(cli.CONF.rglob("*.yaml")):
        group = path.parent.relative_to(cli.CONF).as_posix().strip(".")
        if group != "experiment":
            node = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
            found |= {f"{group}.{key}".strip(".") for key in node} | {group} | {f"{k}.{sub}" for k in node if k == "engine" for sub in node[k]}
    return sorted(found - {"", "defaults"})


KEYS = _keys()
VALUES = st.one_of(
    st.sampled_from(["null", "true", "-1", "0", "1", "1e99", "nan", "inf", "[]", "{}", "[1,2]", "{a:1}", "''", "full", "mac", "ruler", "4k"]),
    st.sampled_from(["${ctx}", "${nothing}", "${oc.env:HOME}", "../..", "/dev/null", "os.getcwd", "1/4", "failed", "0.1", "999999999999999999999"]),
    st.sampled_from(["attention", "decode", "trace", "cpu", "[nan]", "[[1]]", "['']", "[{a:1}]", "0/0", "{ruler:5}", "{ruler:{limit:x}}", "1_000"]),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12),
)


def test_random_configurations(macbench, tiny_args, monkeypatch, tmp_path):  # noqa: F811
    """Up to three random overrides. Where they make a valid run, it ends where the model would be loaded or kernels timed."""

    def stop(*args):
        raise ConfigError("model", "tiny", "is not loaded in this test")

    for module, name in ((run_module, "load"), (attention, "measure"), (latency, "load"), (latency.random_weights, "build")):
        monkeypatch.setattr(module, name, stop)
    monkeypatch.chdir(tmp_path)

    @given(st.lists(st.tuples(st.sampled_from(["", "", "", "+", "++", "~"]), st.sampled_from(KEYS), VALUES), min_size=1, max_size=3))
    @example([("", "model.path", "null"), ("", "model.gguf_sha256", "null")])
    @example([("", "model.path", "null"), ("", "model.gguf", "[1,2]")])
    @example([("", "hydra.verbose", "[{a:1}]")])
    @example([("++", "hydra.job.chdir", "${oc.env:HOME}")])
    @settings(QUICK, max_examples=50)
    def check(overrides):
        args = [f"{sign}{key}" + ("" if sign == "~" else f"={value}") for sign, key, value in overrides]
        with within():
            code, out, err = macbench(*tiny_args, "limit=1", *args)
        assert code in (0, 1, 2), (args, err)
        assert "Traceback" not in out + err, (args, err)
        assert code == 0 or err.strip().splitlines()[-1].startswith("macbench: "), (args, err)

    check()
