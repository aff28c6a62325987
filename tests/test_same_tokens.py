"""The record of macbench.bench.same_tokens: which texts are the same, and how near a tie was where they are not."""

import pyarrow.parquet as pq
import torch
from macbench_kernels import kernels

from macbench.attention import table
from macbench.bench import same_tokens
from macbench.methods.full import Full
from macbench.methods.mac import MAC
from tests.conftest import DEVICE
from tests.models.tiny import tiny

PROMPTS = [[int(x) for x in torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(n))] for n in (30, 50, 20)]


def test_all_ways_write_the_same_and_gaps_are_those_of_the_logits():
    network = tiny("llama", torch.float32, head_dim=64, num_attention_heads=6, num_key_value_heads=2)
    methods = {"full": Full(), "mac": MAC(min_context=0, window=16, band=8)}
    rows = same_tokens.compare(network, PROMPTS, methods, 6, 64, 2, kernels("auto", DEVICE))
    assert [(r["method"], r["way"], r["prompt"]) for r in rows] == [(m, way, i) for m in methods for way in same_tokens.WAYS for i in range(3)]
    assert all(r["same"] and r["first_differing"] is None and r["new_tokens"] == 6 for r in rows)
    ids = list(PROMPTS[1])
    gaps = []
    for _ in range(6):
        with torch.inference_mode():
            top = network(torch.tensor([ids], device=DEVICE)).logits[0, -1].topk(2)
        gaps.append(float(top.values[0] - top.values[1]))
        ids.append(int(top.indices[0]))
    assert abs(rows[1]["smallest_gap"] - min(gaps)) < 1e-4


def test_the_first_token_that_differs_and_its_gap(monkeypatch, tmp_path):
    """Only the captured batch differs, in the third token of prompt 1; gaps are those of batch 1, eager, whatever the others' are."""
    eager, other = [([4, 5, 6], [3.0, 2.0, 1.0]), ([7, 8, 9], [0.5, 0.25, 0.125])], [([4, 5, 6], [9.0] * 3), ([7, 8, 1], [9.0] * 3)]

    def texts(network, prompts, method, new_tokens, ctx, size, graph, layer_kernels):
        return other if size == 16 and graph else eager

    monkeypatch.setattr(same_tokens, "_texts", texts)
    rows = same_tokens.compare(None, PROMPTS[:2], {"full": None}, 3, 64, 16, None)
    assert [r["same"] for r in rows] == [True] * 7 + [False]
    last = rows[-1]
    assert (last["way"], last["batch"], last["graph"]) == ("batch, graph", 16, True)
    assert (last["first_differing"], last["gap"], last["smallest_gap"], rows[0]["smallest_gap"]) == (2, 0.125, 0.125, 1.0)
    assert "1 of 2; prompt 1 from token 2 (gap 0.125)" in same_tokens.told(rows, "full")[3]
    table.write(rows, tmp_path / "same.parquet", {"device": "cpu"}, same_tokens.SCHEMA)
    assert pq.read_table(tmp_path / "same.parquet").to_pylist() == rows
