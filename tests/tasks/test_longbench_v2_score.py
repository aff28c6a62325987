"""LongBench v2's answer patterns and scores, against hand-made cases and the official formulas."""

import json

import pandas as pd
import pytest

from macbench.tasks.longbench_v2 import LongBenchV2, scoring
from tests.tasks import longbench_v2_data as made

RESPONSES = [
    ("The correct answer is (A)", "A"),
    ("The correct answer is B", "B"),
    ("The correct answer is (C) because", "C"),
    ("**The correct answer is (D)**", "D"),
    ("The correct answer is **(A)** Nothing", "A"),
    ("The correct *answer* is (B)", "B"),
    ("First: The correct answer is (A). No: The correct answer is (B).", "A"),  # the first match
    ("The correct answer is C, or The correct answer is (D).", "D"),  # the form with brackets is tried first
    ("The correct answer is Anything", "A"),  # officially, too
    ("the correct answer is (A)", None),  # case matters
    ("The correct answer is (a)", None),
    ("The correct answer is (E)", None),
    ("The correct answer is: (A)", None),
    ("The correct answer is  (A)", None),
    ("The correct answer is (A", None),
    ("The correct answer is (insert answer here)", None),
    ("(A)", None),
    ("A", None),
    ("", None),
]


@pytest.mark.parametrize(("response", "letter"), RESPONSES)
def test_extract(response, letter):
    assert scoring.extract(response) == letter


def frame(letters: list[str | None], facts: list[dict], failed: tuple[int, ...] = ()) -> pd.DataFrame:
    rows = []
    for i, (letter, item) in enumerate(zip(letters, facts, strict=True)):
        text = None if i in failed else "dunno" if letter is None else f"The correct answer is ({letter})"
        meta = {k: item[k] for k in ("domain", "sub_domain", "difficulty", "length", "answer")}
        rows.append({"method": "full", "variant": "", "subtask": "zero_shot", "example_id": str(i), "text": text, "meta": json.dumps(meta)})
    return pd.DataFrame(rows)


def official(letters, facts, compensated: bool) -> dict:
    """result.py in a few words: every group's mean, rounded to a tenth of a percent."""
    totals: dict[str, list[float]] = {}
    for letter, item in zip(letters, facts, strict=True):
        acc = float(letter == item["answer"])
        if compensated and letter is None:
            acc = 0.25
        for group in ("overall", item["difficulty"], item["length"], item["domain"]):
            totals.setdefault(group, []).append(acc)
    return {group: round(100 * sum(x) / len(x), 1) for group, x in totals.items()}


def test_scores_are_the_official_ones_with_every_item_in_the_denominator():
    facts = made.items(24)
    letters = [("A", "B", "C", "D", None, None)[i % 6] for i in range(24)]
    table = scoring.groups(frame(letters, facts, failed=(4, 10))).set_index("group")
    assert table.score.to_dict() == official(letters, facts, False)
    assert table.compensated.to_dict() == official(letters, facts, True)
    assert table["items"]["overall"] == 24 and table.no_answer["overall"] == 8
    assert set(table.index) == {"overall", "easy", "hard", "short", "medium", "long", *made.DOMAINS}
    assert (table.chance == 25).all()
    p = table.score["overall"] / 100
    assert table.score_se["overall"] == pytest.approx(100 * (p * (1 - p) / 23) ** 0.5, abs=0.1)


def test_the_best_constant_answer():
    """With the answers of the whole data set (A 96, B 127, C 148, D 132) it is C, at 29.4."""
    answers = ["A"] * 96 + ["B"] * 127 + ["C"] * 148 + ["D"] * 132
    facts = [made.item(0, answer=a) for a in answers]
    table = scoring.groups(frame(["A"] * 503, facts)).set_index("group")
    assert scoring.best_letter(answers) == "C"
    assert (table.constant["overall"], table.score["overall"]) == (29.4, 19.1)


def test_task_scores_and_titles(chat, tmp_path):
    task = LongBenchV2(chat, 4096, data_path=str(made.folder(tmp_path)))
    example = task.example("zero_shot", 0)
    assert [task.score(example, t) for t in ("The correct answer is (B)", "The correct answer is (A)", "B")] == [1, 0, 0]
    ((title, table),) = task.tables(frame(["B"] * 8, made.items()))
    assert "always C" in title and "chance 25" in title and table["items"].iloc[0] == 8
    assert task.tables(frame([], [])) == [] and task.size("zero_shot") == 8
