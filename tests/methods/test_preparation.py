"""What methods prepare after a prompt does not depend on how many layers, heads or tokens are handled at once."""

import pytest
import torch

from macbench.methods import base, stored, votes
from tests.methods.cases import CASES
from tests.methods.driver import Batch

PREPARING = ("quest", "rocketkv", "multipole", "snapkv", "snapkv faithful", "pyramidkv", "tova faithful", "h2o", "kivi", "int8")


@pytest.mark.parametrize("name", PREPARING)
def test_one_at_a_time_is_the_same_as_all_at_once(name, monkeypatch):
    case = CASES[name]
    together = Batch(case.make(), case.texts())
    monkeypatch.setattr(base, "_MOST_ELEMENTS", 1)
    monkeypatch.setattr(votes, "_MOST_SCORES", 1)
    monkeypatch.setattr(stored, "_CHUNK", 32)
    alone = Batch(case.make(), case.texts())
    assert together.method._buffers
    for key, made in together.method._buffers.items():
        torch.testing.assert_close(alone.method._buffers[key], made, atol=1e-6, rtol=1e-6)
