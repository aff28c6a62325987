"""Input that somebody else wrote: models, data, run folders, half random. One line or a result, never a traceback, a hang or a leak."""

import json
import os
import random
import re
import shutil
import struct
import sys
from urllib.parse import quote

import numpy as np
import pytest
from gguf import GGUFWriter
from omegaconf import OmegaConf
from safetensors.numpy import load_file, save_file

from macbench import asked, cli, environment, merge, report, verify
from macbench import run as run_module
from macbench.errors import ConfigError
from macbench.judging.cache import Answers
from macbench.models import gguf_header, lora, smollm2
from macbench.models.trust import check_folder
from macbench.models.weights import load, load_chat
from macbench.probe import text as background
from macbench.redact import by_name, redact
from macbench.regenerate import regenerate
from macbench.tasks.longbench_v2 import data as longbench
from macbench.tasks.longgenbench import data as longgenbench
from macbench.tasks.recorded import task_class
from macbench.tasks.ruler.data import Data
from tests import real
from tests.test_cli import macbench, tiny_args, tiny_model  # noqa: F401
from tests.within import within

# -- secrets ----------------------------------------------------------------------------------------------------------


def test_a_key_in_the_environment_appears_nowhere(macbench, tiny_args, tmp_path, monkeypatch):  # noqa: F811
    """Not from the environment, the command line, the configuration or an exception; in no record, log or line that is printed."""
    key = "sk-fake-0123456789abcdefXYZ"
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, key)
    decode = run_module.Engine.decode_batch

    def leaks(self, requests, *args, **kwargs):
        if len(requests[0].prompt.queries) and leaks.calls:
            raise RuntimeError(f"401 for url https://host/?token={key}")
        leaks.calls += 1
        return decode(self, requests, *args, **kwargs)

    leaks.calls = 0
    monkeypatch.setattr(run_module.Engine, "decode_batch", leaks)
    args = [a for a in tiny_args if a != "logger=none"]
    code, out, err = macbench(*args, "method=full", "limit=2", f"logger.project={key}", "logger.entity=${oc.env:HF_TOKEN}", "logger.mode=offline")
    assert code == 1, err
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert {"config.yaml", "environment.json"} <= {path.name for path in files} and any("wandb" in str(path) for path in files)
    assert not [str(path) for path in files if key.encode() in path.read_bytes()]
    assert key not in out + err
    assert all("_KEY>" in next(path for path in files if path.name == name).read_text() for name in ("config.yaml", "environment.json"))


@pytest.mark.parametrize("name", ["HFTOKEN", "openai_apikey", "GITHUB_PAT", "DB_PASSWORDS", "MY_AUTH", "SECRET2"])
def test_names_of_secrets(monkeypatch, name):
    """Also within words, and as JSON or a URL spells the value."""
    value = 'pa ss"wörd/1'
    monkeypatch.setenv(name, value)
    for spelled in (value, json.dumps({"x": value}), f"https://host/?q={quote(value, safe='')}"):
        assert "rd/1" not in redact(spelled) and "rd%2F1" not in redact(spelled) and f"<{name}>" in redact(spelled)
    quoted = value.replace('"', '\\"')
    assert by_name(f'logger.project="a{quoted}"') == f'logger.project="a${{oc.env:{name}}}"'
    assert by_name(f"logger.project=a{value}") == f"logger.project=a${{oc.env:{name}}}"


@pytest.mark.parametrize("value", ["pa'ss: word-1", "correct horse battery staple " * 5 + "end", "begin\nmiddle\nend"])
def test_secrets_as_yaml_spells_them(monkeypatch, value):
    """Quotes that are doubled, lines that are broken."""
    monkeypatch.setenv("MY_SECRET", value)
    cfg = OmegaConf.create({"logger": {"project": f"a text before {value}", "tags": ["${logger.project}", 1]}})
    assert run_module.as_yaml(cfg) == "logger:\n  project: a text before <MY_SECRET>\n  tags:\n  - a text before <MY_SECRET>\n  - 1\n"


def test_what_is_no_secret_stays_readable(monkeypatch, tmp_path):
    """Where a key lies, how a tokenizer behaves, and what makes a keyboard."""
    for name, value in (("KEY_FILE", str(tmp_path)), ("TOKENIZERS_MODE", "parallel-2"), ("KEYBOARD", "qwertz-layout"), ("AUTHOR", "somebody-x")):
        monkeypatch.setenv(name, value)
        assert redact(f"{value} {tmp_path}/runs") == f"{value} {tmp_path}/runs" and by_name(f"runs_dir={value}") == f"runs_dir={value}"
    monkeypatch.setenv("HTTPS_PROXY", "http://me:pass-of-mine@proxy:80")
    assert redact("cannot reach me:pass-of-mine@proxy") == "cannot reach me:<HTTPS_PROXY>@proxy"
    assert by_name("model.path=pass-of-mine") == "model.path=pass-of-mine"  # the variable holds more than that
    monkeypatch.setenv("PIN_KEY", "12345678")
    assert by_name("seed=12345678") == "seed=12345678"


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tiny_model, tmp_path):  # noqa: F811
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path / "model"


def refused(folder, chat=None) -> str:
    """What is said about a model's folder; ``chat``: its tokenizer is good, and read already."""
    node = OmegaConf.merge(OmegaConf.load(cli.CONF / "model" / "smollm2.yaml"), {"path": str(folder)})
    with within(), pytest.raises(ConfigError) as caught:
        load(node, "cpu", chat or load_chat(node))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000"),
        ({"hidden_size": 3 * 10**11}, "hidden_size"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"vocab_size": 4 << 20, "hidden_size": 3 << 14}, "have only"),
        ({"num_hidden_layers": 1000, "hidden_size": 8190, "intermediate_size": 28672}, "have only"),
        ({"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"}, "cannot be loaded"),
    ],
)
def test_numbers_of_a_configuration_are_checked_before_memory_is_taken(model, change, said):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    (model / "evil.py").write_text("raise SystemExit('remote code ran')")
    assert said in refused(model)


def test_an_index_cannot_name_files_elsewhere(model, tmp_path):
    (model / "model.safetensors").rename(tmp_path / "outside.safetensors")
    names = load_file(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names ../outside.safetensors" in refused(model)
    (model / "model.safetensors.index.json").write_text('{"weight_map": 5}')
    assert "cannot be read" in refused(model)


# A product of a terabyte, out of factors of two megabytes.
ENORMOUS = {"q.A": np.ones((2, 1 << 19), np.int8), "q.B": np.ones((1 << 19, 2), np.int8), "q.B_scale": np.ones(1 << 19, np.float32)}


@pytest.mark.parametrize(
    ("change", "head", "said"),
    [
        (lambda x: x.pop("q.B"), {}, "q.B"),
        (lambda x: x.pop("q.A_scale"), {}, "q.A_scale"),
        (lambda x: x.update({"q.A_scale": np.ones(7, np.float32)}), {}, "another shape"),
        (lambda x: x.update({"q.A_scale": np.ones((), np.float32)}), {}, "another shape"),
        (lambda x: x.update({"q.B": np.ones(48, np.float32)}), {}, "another shape"),
        (lambda x: [x.pop(name) for name in ("q.A", "q.B")], {}, "no factors"),
        (lambda x: x.update(ENORMOUS), {}, "another shape"),
        (lambda x: None, {"positions": 10**15}, "positions"),
        (lambda x: None, {"positions": "x"}, "is none"),
        (lambda x: None, {"rope_theta": 0}, "is none"),
        (lambda x: None, {"scale": float("nan")}, "is none"),
    ],
)
def test_adapters_that_nobody_trained(model, tmp_path, change, head, said):
    name, path = "model.layers.0.self_attn.q_proj", tmp_path / "adapter.safetensors"
    x = {"q.A": np.ones((2, 48), np.float32), "q.A_scale": np.ones(2, np.float32)}
    x |= {"q.B": np.ones((48, 2), np.float32), "q.B_scale": np.ones(48, np.float32)}
    change(x)
    good = {"base_sha256": "", "rope_theta": 1e5, "positions": 8192, "scale": 1.0}
    metadata = {"format": lora.FORMAT, "adapter": json.dumps(good | head)}
    save_file({key.replace("q.", f"{name}."): value for key, value in x.items()}, path, metadata=metadata)
    node = OmegaConf.merge(OmegaConf.load(cli.CONF / "model" / "smollm2.yaml"), {"path": str(model), "adapter": str(path)})
    with within(), pytest.raises(ConfigError) as caught:
        load(node, "cpu", real.chat())
    assert said.replace("q.", f"{name}.") in str(caught.value)


def test_a_folder_named_from_beside_it(tmp_path, monkeypatch):
    """The name alone does not say what lies above."""
    (tmp_path / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "snapshots" / "abc" / "dev-v2.0.json").write_text(json.dumps(SQUAD))
    monkeypatch.chdir(tmp_path / "snapshots")
    assert Data("abc").squad.docs == ["some words"]
    check_folder("abc")


def test_links_stay_in_the_folder(model, tmp_path):
    (tmp_path / "elsewhere.json").write_text("{}")
    (model / "generation_config.json").unlink(missing_ok=True)
    (model / "generation_config.json").symlink_to(tmp_path / "elsewhere.json")
    assert "outside of the model's folder" in refused(model)


def test_a_tensor_larger_than_its_file(model):
    header = json.dumps({"model.embed_tokens.weight": {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 42]}}).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(1 << 20))
    refused(model)
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + bytes(1 << 20))
    refused(model)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than"),
        ("{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}", "MemoryError"),
        ("{{ 'a' * 99999 }}{{ messages[0].content }}", "characters"),
        ("{{ 'system prompt' }}", "leaves out what the user says"),
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('not\nme') }}", "not"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ],
)
def test_chat_templates_end(model, monkeypatch, template, said):
    """Loops in loops, texts that double, and what a sandbox forbids."""
    monkeypatch.setattr("macbench.models.template._SECONDS", 1)
    (model / "chat_template.jinja").write_text(template)
    assert said in refused(model)


# -- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> bytes:
    """A small valid file by the reference writer; what it leaves out makes transformers think of a model of 7B."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_token_list(["a", "bc", "def"])
    writer.add_token_scores([0.0, 1.0, 2.0])
    writer.add_tensor("token_embd.weight", np.ones((3, 32), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path.read_bytes()


def test_a_valid_gguf_passes(gguf, tmp_path):
    (tmp_path / "model.gguf").write_bytes(gguf)
    gguf_header.check(tmp_path / "model.gguf")


@pytest.mark.parametrize("at", [0, 4, 8, 16, 24])
def test_every_number_of_the_header_counts(gguf, tmp_path, at):
    """Magic, version, number of tensors, number of entries, length of the first key: the largest value of each."""
    content = bytearray(gguf)
    content[at : at + (4 if at < 8 else 8)] = b"\xff" * (4 if at < 8 else 8)
    (tmp_path / "model.gguf").write_bytes(content)
    with within(), pytest.raises(ConfigError, match=r"model\.gguf"):
        gguf_header.check(tmp_path / "model.gguf")


def test_items_of_all_arrays_count(tmp_path):
    """24 arrays of half a million empty texts each, in a file that is a hole; the real vocabulary passes."""
    path, strings = tmp_path / "model.gguf", struct.pack("<IIQ", 9, 8, 1 << 19)
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 24))
        for _ in range(24):
            file.write(struct.pack("<Q", 1) + b"k" + strings)
            file.seek(8 << 19, os.SEEK_CUR)
        file.truncate()
    with within(), pytest.raises(ConfigError, match="items in arrays, at most"):
        gguf_header.check(path)
    gguf_header.check(smollm2._wheel_gguf())
    with path.open("r+b") as file:
        file.truncate(8 << 40)
    with within(), pytest.raises(ConfigError, match="bytes, at most"):
        smollm2.converted(str(path))


@pytest.mark.parametrize("value", [None, 3, "", "0" * 63])
def test_a_hash_that_is_none(value):
    with pytest.raises(ConfigError, match=r"model\.gguf_sha256=.*must be 64 hexadecimal digits"):
        smollm2.converted(None, value)


def test_a_gguf_that_transformers_cannot_read_is_one_line(gguf, macbench, tmp_path, monkeypatch):  # noqa: F811
    import hashlib

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(gguf)
    sha = hashlib.sha256(gguf).hexdigest()
    code, _, err = macbench(f"model.gguf={tmp_path / 'model.gguf'}", f"model.gguf_sha256={sha}", f"runs_dir={tmp_path}/runs")
    assert code == 2 and "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("macbench: model.gguf=") and "declares about" in last and f"only {len(gguf)} bytes" in last
    assert not list((tmp_path / "cache").rglob(".converting-*"))


# -- data -------------------------------------------------------------------------------------------------------------

SQUAD = {
    "data": [
        {"title": "t", "paragraphs": [{"context": "some words", "qas": [{"question": "q?", "is_impossible": False, "answers": [{"text": "a"}]}]}]}
    ]
}


def test_data_cannot_leave_its_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    for name, read in (
        ("dev-v2.0.json", lambda folder: Data(str(folder)).squad),
        ("data.json", lambda folder: longbench.load(str(folder))),
        ("Dataset_short.json", lambda folder: longgenbench.load("16k", str(folder))),
    ):
        (tmp_path / name).write_text("private")
        (tmp_path / "folder" / name).symlink_to(tmp_path / name)
        with pytest.raises(ConfigError, match="outside of its folder"):
            read(tmp_path / "folder")


def test_a_hash_without_its_adapter_is_no_base_model():
    with pytest.raises(ConfigError, match=r"model\.adapter=null: must be a file"):
        lora.find(OmegaConf.create({"adapter": None, "adapter_sha256": "0" * 64}))


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("dev-v2.0.json", lambda path: Data(str(path.parent)).squad),
        ("Dataset_short.json", lambda path: longgenbench.load("16k", str(path))),
        ("verdicts.jsonl", Answers),
        ("text.txt", lambda path: background.read([str(path)], None, False)),
        ("adapter.safetensors", lambda path: lora.find(OmegaConf.create({"adapter": str(path), "adapter_sha256": "0" * 64}))),
        ("vocab.txt", lambda path: check_folder(str(path.parent))),
    ],
)
def test_a_file_that_is_a_hole_of_terabytes(tmp_path, name, read):
    """Its size is looked at before anything is read or hashed."""
    with (tmp_path / name).open("wb") as file:
        file.truncate(8 << 40)
    with within(), pytest.raises(ConfigError) as caught:
        read(tmp_path / name)
    said = str(caught.value)
    assert str(tmp_path / name) in said and re.search(rf"has {8 << 40} bytes, at most \d+ are read", said)


def test_a_snapshot_of_the_hubs_cache_is_inside(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "1234").write_text(json.dumps(SQUAD))
    (snapshot / "dev-v2.0.json").symlink_to("../../blobs/1234")
    assert Data(str(snapshot)).squad.docs == ["some words"]


# -- run folders ------------------------------------------------------------------------------------------------------


def test_a_run_folder_cannot_name_code(tmp_path):
    (tmp_path / "config.yaml").write_text("task: {_target_: subprocess.Popen, args: [touch, ran]}")
    (tmp_path / "environment.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no task of macbench"):
        report.recomputed(tmp_path)


BOMB = "\n".join([f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9 if i else ['x'] * 9)}]" for i in range(12)])


@pytest.mark.parametrize("text", [BOMB, "a: ${oc.env:HOME}", "a: b\n" * 100_000, "[" * 60_000, "{a: " * 900, "- 1", "\0", "task: 1"])
def test_configurations_of_run_folders(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with within(), pytest.raises(ConfigError, match="is not a run folder") as caught:
        task_class(tmp_path)
    assert "\n" not in str(caught.value)


# -- the command line -------------------------------------------------------------------------------------------------


def test_a_run_that_is_verified_names_no_code(tmp_path, monkeypatch):
    """The name is looked at before anything is imported."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass X: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    for key in ("method", "task"):
        for target in ("evil.X", "subprocess.Popen", "X"):
            (tmp_path / "config.yaml").write_text(f"{key}: {{_target_: {target}, name: x}}\ndevice: cpu\n")
            with pytest.raises(ConfigError, match="_target_"):
                regenerate(tmp_path, {}, 1, random.Random(0), "cpu", None, {})
    assert not (tmp_path / "ran").exists() and "evil" not in sys.modules


@pytest.mark.parametrize("kind", ["device", "pipe", "long", "nested", "number"])
def test_files_of_run_folders_are_files(tmp_path, kind):
    """Links that lead to something without an end, pipes that wait for a writer, JSON that is something else."""
    path, run = tmp_path / "environment.json", tmp_path / "run"
    run.mkdir()
    for name in ("environment.json", "config.yaml", asked.FILE):
        path = run / name
        if kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.write_text({"long": "[" + " " * (17 << 20) + "]", "nested": "[" * 100_000, "number": "5"}[kind])
    with within():
        for read in (lambda: environment.continued(run, {}), lambda: asked._protocol(run)):
            assert read() == []
        for read in (asked.read, task_class, merge._environment, verify._environment, report.recomputed):
            with pytest.raises(ConfigError) as caught:
                read(run)
            assert "\n" not in str(caught.value)


def test_what_was_asked_is_bounded(tmp_path):
    many = json.dumps({"examples": {str(i): 100_000 for i in range(5000)}, "variants": [["full", ""]]})
    for text in (
        many,
        "[" * 100_000,
        '{"examples": {"a": 1000000000}, "variants": [["full", ""]]}',
        '{"examples": {"a": 1}, "variants": [["full"]]}',
    ):
        (tmp_path / asked.FILE).write_text(text)
        with pytest.raises(ConfigError, match=asked.FILE):
            asked.read(tmp_path)
