"""Methods at equal bytes: the tables of README.md, from rows."""

from pathlib import Path

import pandas as pd
import pytest

from analysis import equal_bytes, load
from macbench.counting import TOTALS


def rows(ctx, method, variant, scores, read=1, agreement=None):
    facts = {"subtask": "a", "error": None, "prefill_s": 1.0, "decode_s": 0.5, "decode_steps": 100, "hit_rate": None, "ctx": ctx}
    counts = dict.fromkeys(TOTALS, 0) | {"bytes_kv": read, "bytes_full": 4, "tokens_log": read, "tokens_log_full": 4}
    facts |= counts | {"tokens_phys": read, "tokens_phys_full": 4, "method": method, "variant": variant, "top1_agreement": agreement}
    return [facts | {"score": score, "example_id": str(i)} for i, score in enumerate(scores)]


@pytest.fixture(autouse=True)
def runs(monkeypatch):
    made = [
        *rows(4096, "full", "", [1.0, 0.5], 4),
        *rows(4096, "quest", "budget=0.25 budget=112", [0.5, 0.0]),
        *rows(4096, "snapkv", "budget=0.1 capacity=400", [0.0, 0.3]),
        *rows(4096, "snapkv", "budget=0.25 capacity=1000", [0.5, 0.25]),
        *rows(4096, "int8", "", [1.0, 0.0], 2, 0.875),
    ]
    monkeypatch.setattr(load, "samples", lambda folder: pd.DataFrame(made))


def test_methods_stand_in_the_order_of_their_scores_and_floors_are_named():
    text = equal_bytes.short([Path("run")]).splitlines()
    assert text[0] == "| method | 4K, 0.1 | 4K, 0.25 |"
    assert text[2:4] == ["| snapkv | 0.15 [-1.00, -0.20] | 0.38 [-0.50, -0.25] |", "| quest | floor | 0.25 [-0.50, -0.50] |"]
    assert text[5] == "| at its own ratio | rho_bytes, 4K | score, 4K | next tokens, 4K |"
    assert text[7] == "| full | 1.00 | 0.750 | – |" and text[8].startswith("| int8 | 0.50 | 0.500 [") and text[8].endswith("] | 87.5% |")


def test_the_full_table_has_what_a_comparison_measures():
    text = equal_bytes.full([Path("run")])
    assert text.startswith("## 4K, 2 examples\n\n| method | budget | score |")
    (line,) = (line for line in text.splitlines() if line.startswith("| int8 "))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2] == "0.500 ± 0.500" and cells[3].startswith("-0.250 [") and cells[4] == "0/1/1"
    assert cells[6:11] == ["0.500", "0.500", "0.500", "5.00", "0.875"]
