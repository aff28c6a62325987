"""The record of macbench.bench.same_tokens: which texts are the same, how far logits are apart, and what explains a difference."""

import pyarrow.parquet as pq
import pytest
import torch
from macbench_kernels import kernels

from macbench.attention import table
from macbench.bench import same_tokens
from macbench.bench.watched import Steps, Watched, decoded
from macbench.engine import Engine
from macbench.errors import ConfigError
from macbench.methods.full import Full
from tests.conftest import DEVICE
from tests.models.tiny import tiny

PROMPTS = [[int(x) for x in torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(n))] for n in (30, 50, 20)]
WAYS = [way for way in same_tokens.WAYS if DEVICE == "cuda" or way != "batch, invariant"]


@pytest.fixture(scope="module")
def network():
    return tiny("llama", torch.float32, head_dim=64, num_attention_heads=6, num_key_value_heads=2)


def test_all_ways_write_the_same_and_gaps_are_those_of_the_logits(network):
    methods = {"full": Full(), "mac": Watched(min_context=0, window=16, band=8)}
    rows = same_tokens.compare(network, PROMPTS, methods, [8, 6, 7], 64, 2, kernels("auto", DEVICE), WAYS)
    assert [(r["method"], r["way"], r["prompt"]) for r in rows] == [(m, way, i) for m in methods for way in WAYS for i in range(3)]
    assert all(r["same"] and r["first_differing"] is None and r["new_tokens"] == len(r["differences"]) == (8, 6, 7)[r["prompt"]] for r in rows)
    assert all(r["differences"][0] == 0 and max(r["differences"]) < 1e-3 for r in rows)  # a prompt's logits are the same ones
    assert all(r["first_other_match"] is None for r in rows)
    ids = list(PROMPTS[1])
    gaps = []
    for _ in range(6):
        with torch.inference_mode():
            top = network(torch.tensor([ids], device=DEVICE)).logits[0, -1].topk(2)
        gaps.append(float(top.values[0] - top.values[1]))
        ids.append(int(top.indices[0]))
    assert abs(rows[1]["smallest_gap"] - min(gaps)) < 1e-4


def test_what_heads_matched_is_what_was_counted(network, monkeypatch):
    """Positions and hits of every step beside the ledger's own hits, and distances beside the radius."""
    counted = []
    decode = Engine.decode_batch
    monkeypatch.setattr(Engine, "decode_batch", lambda *args, **options: counted.append(decode(*args, **options)) or counted[-1])
    method = Watched(min_context=0, window=16, band=8, tau=1.0)
    with torch.inference_mode():
        made = decoded(network, PROMPTS, method, [12, 11, 12], 64, 3, False, False, kernels("auto", DEVICE))
    for i, steps in enumerate(made):
        hit = steps.sources >= 0
        assert torch.equal(hit.sum(-1).cpu(), torch.tensor(counted[0][i].counts["hits"][..., 0]))
        assert torch.equal(hit, steps.distances < steps.radius) and 0 < hit.sum() < hit.numel()
        assert torch.equal(steps.logits.argmax(1).cpu(), torch.tensor(steps.tokens))
        position = len(PROMPTS[i]) + torch.arange(len(steps.tokens) - 1, device=DEVICE)[:, None, None]
        assert (steps.sources < position).all() and (steps.sources[hit] >= 8).all()


def steps(tokens, logits, sources=None, distances=None):
    tensor = lambda x, **kind: None if x is None else torch.tensor(x, **kind)[:, None]  # noqa: E731  one layer
    return Steps(tokens, torch.tensor(logits), tensor(sources), tensor(distances), 2.0)


def test_the_first_token_that_differs_and_what_explains_it(monkeypatch, tmp_path):
    """The captured batch differs in the third token of prompt 1, by less than its logits did before; a later step is not compared."""
    one = steps([1, 0], [[0.0, 3.0], [2.0, 0.0]], [[7, -1]], [[1.0, 3.0]])
    two = steps([0, 1, 0, 0], [[4.0, 0.0], [0.0, 2.0], [1.125, 1.0], [3.0, 0.0]], [[5, -1], [5, 9], [-1, -1]], [[1.0, 3.0], [1.0, 1.9], [3.0, 3.0]])
    off = steps([0, 1, 1, 1], [[4.0, 0.0], [0.25, 2.0], [1.0, 1.125], [0.0, 99.0]], [[5, -1], [6, -1], [9, 9]], [[1.0, 3.0], [1.0, 2.1], [1.0, 1.0]])

    def texts(network, prompts, method, new_tokens, ctx, size, graph, invariant, layer_kernels):
        return [one, off if size == 16 and graph and not invariant else two]

    monkeypatch.setattr(same_tokens, "decoded", texts)
    rows = same_tokens.compare(None, PROMPTS[:2], {"mac": None}, [2, 4], 64, 16, None)
    assert [r["same"] for r in rows] == [True] * 7 + [False] + [True] * 2
    last = rows[7]
    assert (last["way"], last["batch"], last["graph"], rows[9]["invariant"]) == ("batch, graph", 16, True, True)
    assert (last["first_differing"], last["gap"], last["smallest_gap"], rows[0]["smallest_gap"]) == (2, 0.125, 0.125, 2.0)
    assert (last["differences"], last["difference_before"], last["gap_change"], last["explained"]) == ([0.0, 0.25, 0.125], 0.25, 0.25, True)
    assert (last["first_other_match"], last["other_hits"], last["other_entries"]) == (2, 1, 1)
    assert last["nearness"] == pytest.approx(0.05)
    off.logits[1, 0] = 0.0625  # before, no two logits came nearer by more than 0.125; now by half of it at most
    off.logits[2] = torch.tensor([0.75, 1.5])
    assert same_tokens.difference(off, two)["explained"]  # 0.125 is twice 0.0625
    off.logits[1, 0] = 0.03125
    assert not same_tokens.difference(off, two)["explained"]
    told = same_tokens.told(rows, "mac")
    assert "1 of 2; logits differ by 0" in told[3] and "other matches in 1" in told[3]
    assert "prompt 1 from token 2: gap 0.125, changed by 0.250" in told[4] and "matches differ from token 2: 1 hits, within 0.05" in told[4]
    table.write(rows, tmp_path / "same.parquet", {"device": "cpu"}, same_tokens.SCHEMA)
    assert pq.read_table(tmp_path / "same.parquet").to_pylist() == rows


@pytest.mark.parametrize(
    "said", ["prompt=3", "batch=1", "new_tokens=x", "ctx=64", "methods=[mca]", "prompts=0", "prompts=[1", "methods=5", "gguf=5", "methods=[]"]
)
def test_wrong_input_names_the_key(said):
    with pytest.raises(ConfigError) as error:
        same_tokens.configured([said, *(["new_tokens=64"] if said.startswith("ctx") else [])])
    key = "new_tokens" if said.startswith("ctx") else said.split("=")[0]
    assert "\n" not in str(error.value) and key in str(error.value)


@pytest.mark.parametrize(
    ("said", "error"),
    [("backend=foo", r"^backend=foo: must be one of [^=]*$"), ("ctx=8193", "^ctx=8193: must be at most 8192, the positions of smollm2$")],
)
def test_what_backend_or_model_cannot_is_one_line(monkeypatch, said, error):
    monkeypatch.setattr("sys.argv", ["same_tokens", said, "device=cpu"])
    with pytest.raises(ConfigError, match=error):
        same_tokens.main()
