"""The README's example method and task are run as they stand."""

import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from macbench.methods.base import Method
from macbench.tasks.base import Example
from tests import real
from tests.methods.driver import Driver, Stream

README = (Path(__file__).parent.parent / "README.md").read_text()


def snippet(name: str) -> type:
    """The class of that name from the README's Python blocks."""
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.S) if f"class {name}" in block)
    scope = {"dataclass": dataclass, "Method": Method, "torch": torch, "Example": Example, "random": random, "__name__": __name__}
    exec(code, scope)
    return scope[name]


def test_example_method_attends_to_its_window():
    driver = Driver(snippet("Window")(size=20), Stream.random(110), 100)
    for t in range(100, 110):
        got = driver.step()
        for h in range(6):
            torch.testing.assert_close(got[h], driver.exact(h, t, t - 19, t + 1)[0])
    assert (driver.ledger.counts()["tokens_log"] == 6 * 20).all()


def test_example_task_makes_and_scores_prompts():
    task = snippet("Echo")(real.chat(), ctx=128)
    example = task.example("word", 3)
    assert example.references[0] in example.prompt
    assert real.chat().tokenizer.decode(example.input_ids) == example.prompt
    assert (task.score(example, f"It is {example.references[0]}."), task.score(example, "no")) == (1.0, 0.0)
    assert task.example("word", 3) == example


def test_how_tos_are_short():
    for title in ("Adding a method", "Adding a task"):
        section = README.split(f"## {title}")[1].split("\n## ")[0]
        assert len(section.splitlines()) < 60
