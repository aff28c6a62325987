"""The clock's hooks, in every way of launching that this machine has."""

import pytest
import torch

from macbench.attention.timing import rounds, timed
from tests.conftest import DEVICE


@pytest.mark.parametrize("mode", ["graph", "eager"] if DEVICE == "cuda" else ["cpu"])
def test_hooks_see_the_inputs_and_results_of_their_round(mode):
    x = torch.zeros(4, device=DEVICE)
    seen = {}
    spread = rounds(lambda: [2 * x], x.fill_, 6, 1, mode, 2, lambda i, result: seen.update({i: result[0].clone()}))
    assert {i: values.tolist() for i, values in seen.items()} == {i: [2.0 * i] * 4 for i in (2, 3, 4, 5)}
    assert spread["rounds"] == 4
    assert 0 < spread["time_p10_ms"] <= spread["time_ms"] <= spread["time_p90_ms"]


def test_the_last_round_is_always_timed():
    assert [*timed(5, 3)] == [3, 4]
    assert [*timed(2, 3)] == [1]
