"""RULER's metrics, worked by hand."""

import pytest

from macbench.tasks.base import Example
from macbench.tasks.ruler import Ruler
from macbench.tasks.ruler.scoring import match_all, match_part, postprocess


@pytest.mark.parametrize(
    ("text", "references", "score"),
    [
        ("1234567", ["1234567"], 1),
        (" the number is 1234567.", ["1234567"], 1),
        ("1234 567", ["1234567"], 0),
        ("AAAAA, bbbbb and CCCCC", ["AAAAA", "BBBBB", "CCCCC", "DDDDD", "EEEEE"], 0.6),
        ("", ["1"], 0),
        ("12345678", ["1234567"], 1),  # a substring is enough, as in the official metric
        ("one two", ["one", "one", "three", "two"], 0.75),
    ],
)
def test_match_all_is_the_fraction_of_references(text, references, score):
    assert match_all(text, references) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "references", "score"),
    [
        ("It was France.", ["France", "in France", "the kingdom"], 1),  # one of three is all, not a third
        ("in FRANCE", ["France", "in France"], 1),
        ("Spain", ["France", "Portugal"], 0),
        ("\n\t", ["France"], 0),
    ],
)
def test_match_part_is_any_reference(text, references, score):
    assert match_part(text, references) == score


def test_postprocess():
    assert postprocess("  a\tb\x00c\x1f \n") == "a\nb\nc"
    assert postprocess("\x01 x \x02") == "x"
    assert match_all("New\tYork", ["new\nyork"]) == 1


def test_questions_over_documents_are_scored_by_any_answer(chat):
    task = Ruler(chat, 4096)

    def score(subtask: str) -> float:
        return task.score(Example(subtask, "0", "", [], ["a1", "b2", "c3", "d4"], 1), "B2")

    assert score("qa_1") == score("qa_2") == 1
    assert {score(subtask) for subtask in task.subtasks if not subtask.startswith("qa")} == {0.25}
