"""task=decode on a tiny model: bytes, floors and ratios follow from their definitions, synthetic hits hit, failures are rows."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf

from macbench.decoder import Decoder
from macbench.errors import ConfigError
from macbench.interrupt import Terminated
from macbench.latency import __main__ as script
from macbench.latency import bench, command, table
from macbench.latency.bench import measure, weight_bytes
from macbench.methods.full import Full
from macbench.methods.mac import MAC
from macbench.models import random_weights
from tests.models.tiny import tiny

KNOBS = dict(ctx=[300], batch=[2], hit_rate=[0, 0.5, 1], backends=["torch"], steps=6, mac=MAC(min_context=0, window=32, band=8), max_gap=4)
LAYERS, KV_HEADS, HEADS, ROW = 2, 2, 6, 2 * 16 * 4  # of tiny("llama") in float32


@pytest.fixture(scope="module")
def network():
    return tiny("llama", torch.float32, max_position_embeddings=4096).cpu()


@pytest.fixture(scope="module")
def rows(network):
    return measure(network, "tiny", True, prefill=True, **KNOBS)


def test_a_row_for_every_method(rows):
    assert [(r["method"], r["hit_rate"], r["misses"]) for r in rows] == [
        ("full", None, None), ("mac", 0, "none"), ("mac", 0.5, "random"), ("mac", 1, "none"),
    ]  # fmt: skip
    for row in rows:
        assert row["error"] is None
        assert row["random_weights"] and row["synthetic"]
        assert row["tokens_per_s"] == pytest.approx(2e3 / row["tpot_ms"])
        assert row["tpot_p50_ms"] <= row["tpot_p95_ms"]
    assert [r["hit_rate_measured"] for r in rows] == [None, 0, 0.5, 1]
    assert rows[0]["prefill_s"] > 0 and rows[0]["first_token_s"] is None  # one prompt was prefilled, two requests decode
    assert rows[1]["prefill_s"] is None


@pytest.mark.parametrize("graph", [False, True])
def test_times_are_those_of_the_timed_steps(network, monkeypatch, graph):
    """A clock that only decode steps move: the four warm-up steps are long, the timed ones skewed, so that mean, median and p95 all differ."""
    durations = [0.1 * (i + 1) ** 2 for i in range(40)]
    clock, waiting = [0.0], iter([1000.0] * 4 + sorted(durations, key=str))
    step = Decoder.step

    def timed(self):
        step(self)
        clock[0] += next(waiting)

    monkeypatch.setattr(Decoder, "step", timed)
    monkeypatch.setattr(bench, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(bench, "breakdown", lambda engine, decoder, p50, feed: {"attention_ms": p50})
    knobs = KNOBS | {"ctx": [40], "steps": 40, "modes": ["graph" if graph else "eager"], "mac": None}
    (row,) = measure(network, "tiny", True, **knobs)
    p50, p95 = np.percentile(durations, [50, 95])
    assert row["tpot_p50_ms"] == pytest.approx(1e3 * p50) and row["tpot_p95_ms"] == pytest.approx(1e3 * p95)
    assert row["tpot_ms"] == pytest.approx(1e3 * np.mean(durations)) and row["tokens_per_s"] == pytest.approx(2 / np.mean(durations))
    assert row["steps"] == 40 and row["attention_ms"] == (row["tpot_p50_ms"] if graph else None)


def test_bytes_are_those_of_the_timed_steps(rows):
    """Full attention: 300 tokens and the 4 warm-up steps, then 305 to 310 visible tokens."""
    visible = sum(range(305, 311)) / 6
    full = 2 * LAYERS * KV_HEADS * ROW * visible
    scan = 2 * LAYERS * HEADS * 32 * 16 * 4
    assert rows[0]["read_bytes"] == int(full)
    assert rows[1]["read_bytes"] == int(full + scan)
    assert scan < rows[3]["read_bytes"] < scan + 2 * LAYERS * (KV_HEADS * ROW * (8 + 4 + 1) + HEADS * (16 * 4 + 8) * 2)
    assert rows[1]["read_bytes"] > rows[2]["read_bytes"] > rows[3]["read_bytes"]


def test_memory_is_told_by_kind(rows, network):
    """300 tokens, 4 + 6 + 13 + 1 steps: 21 pages of 16 for each of 2 requests. Of rings, query and state in float32, its lse and depth."""
    assert [r["kv_bytes"] for r in rows] == [2 * 21 * 16 * LAYERS * KV_HEADS * ROW] * 4
    ring, given = 32 * (16 * 4 + 16 * 4 + 4 + 4), 16 * 4  # and the query that a synthetic step is given
    assert [r["state_bytes"] for r in rows] == [0] + [2 * LAYERS * HEADS * (ring + given)] * 3
    layer = 48 * (6 + 2 * 2 + 6) * 16 + 3 * 48 * 64 + 2 * 48
    for tied in (True, False):
        made = tiny("llama", torch.float32, tie_word_embeddings=tied)
        assert bench.stored_bytes(made) == 4 * (2 * layer + 48 + 97 * 48 * (1 if tied else 2))
    assert bench.over_memory(peak=1300, apart=200, weights=800, kv=200) == 1.1


def test_a_cpu_has_one_mode_and_no_generate(network):
    rows = measure(network, "tiny", True, **KNOBS | {"ctx": [40], "modes": ["graph", "eager"], "mac": None}, generate=True)
    assert [(r["backend"], r["mode"], r["error"] is None) for r in rows] == [("generate", "compiled", False), ("torch", "cpu", True)]
    assert bench.excused(rows[0]["error"]) and not bench.excused("RuntimeError: boom")


def test_weights_are_counted_once(network):
    tied, free = tiny("llama", torch.float32, tie_word_embeddings=True), tiny("llama", torch.float32, tie_word_embeddings=False)
    assert weight_bytes(tied) == weight_bytes(free) == sum(p.numel() for p in tied.parameters()) * 4
    experts = tiny("qwen3_moe", torch.float32)
    active = sum(p.numel() * (0.5 if ".experts." in n else 1) for n, p in experts.named_parameters() if "embed_tokens" not in n) * 4
    assert weight_bytes(experts) == active


def test_floor_and_ratios():
    group = []
    for method, backend, time in (("full", "triton", 8.0), ("full", "flashinfer", 10.0), ("mac", "triton", 4.0)):
        row = dict.fromkeys(bench.COLUMNS) | {"method": method, "backend": backend, "mode": "graph", "tpot_ms": time, "tpot_p50_ms": time}
        row |= {"weight_bytes": 3 * 10**9, "read_bytes": 3 * 10**9, "copy_bandwidth": 3e12}
        bench._derive(row, group)
        group.append(row)
    assert [r["floor_ms"] for r in group] == [2.0, 2.0, 2.0]
    assert [(r["over_floor"], r["over_full"], r["over_flashinfer"]) for r in group] == [(4, 1, None), (5, 1.25, 1), (2, 0.5, 0.4)]


@pytest.mark.parametrize(
    "failure",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore"), RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore")],
)
def test_a_failure_is_a_row_and_says_what_to_lower(network, monkeypatch, failure):
    attend = Full.attend

    def fails(self, *args):
        if self.shape.batch == 2:
            raise failure
        return attend(self, *args)

    monkeypatch.setattr(Full, "attend", fails)
    rows = measure(network, "tiny", True, **KNOBS | {"batch": [2, 1], "hit_rate": [1], "backends": ["torch", "flashinfer"]})
    assert [bool(r["error"]) for r in rows] == [True, True, False, False, True, False]
    assert rows[0]["error"].endswith("lower batch or ctx") and "\n" not in rows[0]["error"]
    assert "CUDA device" in rows[1]["error"]
    assert all(table.line(row) for row in rows)


def test_real_prompts(network):
    prompts = lambda batch, tokens: [list(range(i, i + tokens - 5 * i)) for i in range(batch)]  # noqa: E731
    rows = measure(network, "tiny", False, **KNOBS | {"ctx": [90], "hit_rate": ["real"]}, prompts=prompts)
    assert [(r["method"], r["synthetic"], r["error"]) for r in rows] == [("full", False, None), ("mac", False, None)]
    assert 0 <= rows[1]["hit_rate_measured"] <= 1 and rows[1]["hit_rate"] is None
    assert all(row["first_token_s"] == 2 * row["prefill_s"] > 0 for row in rows)  # the second request waits for the first one's prefill
    assert bench.prompt_ids(97, 1, 90, prompts, 42).tolist() == [list(range(90))]
    made = bench.prompt_ids(97, 1, 90, None, 42)
    assert made.shape == (1, 90) and made.max() < 97 and made.unique().numel() > 20


def test_table_and_parquet(rows, tmp_path):
    table.write(rows, tmp_path / "deep" / "decode.parquet", {"device": "cpu"})
    back = pq.read_table(tmp_path / "deep" / "decode.parquet")
    assert back.schema.metadata[b"macbench"]
    assert back.to_pylist() == rows
    assert "random" in table.line(rows[2]) and "syn." in table.line(rows[2])


def test_random_weights_have_the_published_shape():
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 64}  # fmt: skip
    one, two = (random_weights.build(config, "cpu", torch.float32, seed=3) for _ in range(2))
    logits = [n(torch.arange(20)[None]).logits for n in (one, two)]
    assert torch.equal(*logits) and torch.isfinite(logits[0]).all() and logits[0].std() > 0
    assert one.model.layers[0].self_attn.k_proj.weight.shape == (16, 32)


TASK = {"batch": [1], "steps": 8, "hit_rate": [0], "misses": "random", "backends": ["triton"], "modes": ["graph"], "prefill": False,
        "generate": False, "max_gap": 64, "data_path": None}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [("steps", 1), ("steps", "x"), ("misses", "often"), ("modes", ["fast"]), ("backends", ["cuda"]), ("hit_rate", [2]), ("hit_rate", ["real"]),
     ("batch", [0]), ("batch", []), ("prefill", 3), ("max_gap", 0), ("steps", [4]), ("max_gap", [64])],
)  # fmt: skip
def test_wrong_input_names_the_key(key, value):
    with pytest.raises(ConfigError) as error:
        command.check(TASK | {key: value}, {"name": "mac"}, {"name": "x", "random": {"a": 1}}, [100])
    assert key in str(error.value) and "\n" not in str(error.value)


def run(network_dir, contexts, method=None, **random):
    """``command.run`` on a random model, full attention unless ``method``."""
    fields = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 400} | random  # fmt: skip
    model = OmegaConf.create({"name": "small", "random": fields})
    options = ("auto", "cpu", torch.float32, 1, network_dir / "decode.parquet", dict)
    return command.run(TASK | {"steps": 4, "generate": True, "hit_rate": [0.5]}, method or {"name": "full"}, model, contexts, *options)


def test_a_context_that_just_fits_runs(tmp_path):
    """4 + 4 + 13 + 1 tokens come after it; and what is not timed on a CPU is no failure."""
    assert run(tmp_path, [400 - 22]) == 0
    with pytest.raises(ConfigError, match=r"^ctx=379: and the 22 decode steps"):
        run(tmp_path, [379])


@pytest.mark.parametrize(
    ("knobs", "said"),
    [({"min_context": 2048}, r"^ctx=100: is below method\.min_context=2048"), ({"min_context": 0, "window": 91}, "^ctx=100: must be at least 101")],
)
def test_hits_that_cannot_be_are_refused(tmp_path, knobs, said):
    with pytest.raises(ConfigError, match=said):
        run(tmp_path, [100], {"name": "mac", "window": 32, "band": 8} | knobs)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", 0), ("num_attention_heads", 7), ("head_dim", -3), ("head_dim", 12), ("model_type", "foo"), ("hidden_size", "abc"),
     ("max_position_embeddings", None), ("num_experts", True)],
)  # fmt: skip
def test_a_shape_that_cannot_be_is_one_line(tmp_path, key, value):
    with pytest.raises(ConfigError, match=rf"^model\.random\.{key}={'null' if value is None else value}: must be ") as error:
        run(tmp_path, [100], **{key: value})
    assert "\n" not in str(error.value)


def test_what_transformers_refuses_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"^model\.random=.*gives no network") as error:
        run(tmp_path, [100], hidden_act="sillu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (Terminated(), 143), (LookupError("unforeseen"), None)])
def test_rows_are_kept_when_a_later_one_ends_the_run(tmp_path, monkeypatch, capsys, stop, code):
    """The second context is never measured, by whatever ends it; the first one's rows are whole."""
    attend = Full.attend

    def fails(self, *args):
        if self.shape.max_tokens > 100:
            raise stop
        return attend(self, *args)

    monkeypatch.setattr(Full, "attend", fails)
    if code is None:
        with pytest.raises(LookupError):
            run(tmp_path, [60, 200])
    else:
        assert run(tmp_path, [60, 200]) == code
        assert "macbench: interrupted; 3 row(s) so far are in" in capsys.readouterr().err
    kept = pq.read_table(tmp_path / "decode.parquet").to_pylist()
    assert [(r["ctx"], r["backend"], r["error"] is None) for r in kept] == [(60, "generate", False), (60, "torch", True), (200, "generate", False)]


def test_a_card_without_room_for_the_copy_has_no_floor(network, monkeypatch, capsys):
    def full(device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "copy_bandwidth", full)
    (row,) = measure(network, "tiny", True, **KNOBS | {"ctx": [40], "mac": None})
    assert row["error"] is None and row["tpot_ms"] > 0 and row["floor_ms"] is None and row["over_floor"] is None
    assert "no room for the 4 GiB" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_one_line(tmp_path):
    """A matrix of 2^60 bytes fits nowhere."""
    with pytest.raises(ConfigError, match=r"^model=small: its weights in float32 do not fit .* lower model\.random\.num_hidden_layers") as error:
        run(tmp_path, [100], vocab_size=2**53)
    assert "\n" not in str(error.value)


GRID = {"ctx": [4096], "batch": [1], "steps": 8}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["random_llama31_9b", "reach"], "model=random_llama31_9b: must be one of random_llama31_70b, random_llama31_8b"),
        (["smollm2", "reach"], "model=smollm2: must be one of random_"),
        (["random_llama31_8b", "reahc"], "grid=reahc: must be reach, or a JSON object"),
        (["random_llama31_8b", "{"], "grid={: must be"),
        (["random_llama31_8b", "[1]"], "grid=[1]: must be an object with keys of batch, steps"),
        (["random_llama31_8b", GRID | {"contexts": 5}], "grid=contexts: must be one of"),
        (["random_llama31_8b", GRID | {"batch": [0]}], "batch=0: must be an integer of at least 1"),
        (["random_llama31_8b", GRID | {"ctx": [131072]}], "ctx=131072: and the 26 decode steps after it must fit into the 131072 positions"),
        (["random_llama31_8b", GRID | {"ctx": []}], "ctx=[]: must list at least one value"),
        (["random_llama31_8b", GRID | {"ctx": "32k"}], "ctx=32k: must be an integer of at least 1"),
        (["random_llama31_8b", GRID | {"ctx": [1000]}], "ctx=1000: is below method.min_context=2048"),
        (["random_llama31_8b", GRID | {"hit_rate": ["real"]}], "task.hit_rate=real: needs a model with real weights"),
        (["random_llama31_8b", GRID, "/dev/null/rows.parquet"], "file=/dev/null/rows.parquet: cannot be written"),
        (["random_llama31_8b", GRID, "/tmp"], "file=/tmp: is a folder"),
    ],
)
def test_without_hydra_wrong_input_is_one_line(arguments, said, capsys):
    assert script.main([x if isinstance(x, str) else json.dumps(x) for x in arguments]) == 2
    out, error = capsys.readouterr()
    assert not out and error.startswith(f"macbench: {said}") and error.count("\n") == 1


def test_without_hydra_weights_that_do_not_fit_are_one_line(monkeypatch, capsys):
    def build(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(random_weights, "build", build)
    assert script.main(["random_llama31_70b", json.dumps(GRID)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("macbench: model=random_llama31_70b: its weights in bfloat16 do not fit into the memory of cuda; lower")
    assert error.count("\n") == 1
