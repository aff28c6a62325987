"""What a comparison costs: the rows of macbench.bench.one_prefill, on a small random model."""

import pytest
import torch
from macbench_kernels import kernels

from macbench.bench.one_prefill import main, measure
from macbench.engine import Engine
from macbench.errors import ConfigError
from macbench.methods.full import Full
from macbench.methods.h2o import H2O
from tests.models.tiny import tiny


def test_every_way_is_a_row_and_parts_add_up():
    engine, said, kept = Engine(tiny("llama"), kernels("torch"), 64), [], []
    methods = {"full": Full(), "h2o": H2O(8, 8)}
    rows = measure(engine, torch.arange(1, 41).tolist(), methods, 4, 2, said.append, lambda rows: kept.append(len(rows)))
    assert kept == sorted(kept) and len(kept) == 3 + 6 and kept[-1] == len(rows)  # prefill, two methods warm; three ways twice
    assert [row["part"] for row in rows if row["way"] == "warm"] == ["prefill", "full", "h2o"]
    whole = {(row["way"], row["repeat"]): row["seconds"] for row in rows if not row["part"]}
    assert set(whole) == {(way, repeat) for way in ("together", "apart", "parts") for repeat in (0, 1)}
    for repeat in (0, 1):
        parts = {row["part"]: row["seconds"] for row in rows if row["part"] and (row["way"], row["repeat"]) == ("parts", repeat)}
        assert set(parts) == {"prefill", "full", "h2o"} and sum(parts.values()) == pytest.approx(whole["parts", repeat])
    assert engine.pool.free_pages == engine.pool.pages
    assert said[1].startswith("full: ready after")


@pytest.mark.parametrize(
    ("argument", "said"), [("methods=[quets]", "methods=quets: .*did you mean quest"), ("repeats=0", "repeats=0"), ("ctxx=1", "ctxx")]
)
def test_wrong_arguments_get_one_line(argument, said):
    with pytest.raises(ConfigError, match=said):
        main([argument])
