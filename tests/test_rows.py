"""Step and layer rows are made by column; here the same sums one by one."""

import numpy as np
import pyarrow.parquet as pq

from macbench.counting import COUNTS, TOTALS, ratios
from macbench.engine import Generation
from macbench.records import RunDirectory
from macbench.rows import layer_rows, sample_columns, step_rows

STEPS, LAYERS = 5, 3
ERRORS = [0.25, None, 0.5]
KEY = {"run_id": "run", "method": "mac", "variant": "", "subtask": "a", "example_id": "0"}


def generation(heads: int) -> Generation:
    rng = np.random.default_rng(0)
    counts = {name: rng.integers(1, 50, (STEPS, LAYERS, 1)) for name in COUNTS}
    counts["match_heads"] = np.full((STEPS, LAYERS, 1), heads)
    counts["match_heads"][1] = 0
    return Generation([7] * 6, "length", rng.random(STEPS), 0.5, counts, np.arange(10, 10 + STEPS))


def by_hand(made: Generation, pick) -> dict:
    """Of ``counts[pick]``: sums, ratios, chains."""
    sums = {name: int(made.counts[name][pick].sum()) for name in (*TOTALS, "hits", "match_heads", "chain_sum")}
    heads = sums["match_heads"]
    chains = {"chain_mean": sums["chain_sum"] / heads, "chain_max": int(made.counts["chain_max"][pick].max())} if heads else {}
    return {name: sums[name] for name in TOTALS} | ratios(sums) | {"chain_mean": None, "chain_max": None} | chains


def test_columns_are_the_sums_of_their_rows(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    one, two = generation(4), generation(0)
    other = KEY | {"method": "full"}
    blocks = {"steps": [step_rows(one, KEY), step_rows(two, other)], "layers": [layer_rows(one, KEY, ERRORS), layer_rows(two, other, [])]}
    samples = [KEY | {"task": "t"} | sample_columns(one), other | {"task": "t"} | sample_columns(two)]
    directory.write_examples({"part-0": {"samples": samples} | blocks}, {})
    steps = pq.read_table(tmp_path / "run/steps/part-0.parquet").to_pylist()
    layers = pq.read_table(tmp_path / "run/layers/part-0.parquet").to_pylist()
    want = [
        k | {"step": i, "position": 10 + i, "latency_ms": 1e3 * made.step_seconds[i]} | by_hand(made, i)
        for made, k in ((one, KEY), (two, other))
        for i in range(STEPS)
    ]
    assert steps == want
    want = [(one, KEY, ERRORS), (two, other, [None] * LAYERS)]
    assert layers == [k | {"layer": i} | by_hand(made, np.s_[:, i]) | {"output_error": errors[i]} for made, k, errors in want for i in range(LAYERS)]


def test_a_generation_without_steps_and_a_failure_have_no_rows(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    empty = Generation([7], "stop", np.zeros(0), 0.0, {name: np.zeros((0, LAYERS, 1), np.int64) for name in COUNTS}, np.zeros(0, np.int64))
    nothing = {"samples": [KEY], "steps": [step_rows(empty, KEY)], "layers": [layer_rows(empty, KEY, [])]}
    directory.write_examples({"part-0": nothing, "part-1": {"samples": [KEY], "steps": [], "layers": []}}, {})
    assert [pq.read_metadata(tmp_path / f"run/steps/part-{i}.parquet").num_rows for i in (0, 1)] == [0, 0]
    layers = pq.read_table(tmp_path / "run/layers/part-0.parquet").to_pylist()
    assert len(layers) == LAYERS and all(row["rho_log"] is None and row["tokens_log"] == 0 for row in layers)
