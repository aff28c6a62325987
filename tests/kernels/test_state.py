"""Merging states: exact against the union, associative, empty states neutral."""

import torch
from macbench_kernels import State, empty_state, merge

from tests.conftest import exact_state


def states(pieces: int, seed: int = 0):
    torch.manual_seed(seed)
    q, k, v = torch.randn(64).double(), torch.randn(60, 64).double(), torch.randn(60, 64).double()
    cut = 60 // pieces
    parts = [State(*exact_state(q, k[i * cut : (i + 1) * cut], v[i * cut : (i + 1) * cut], 0.3)) for i in range(pieces)]
    return parts, State(*exact_state(q, k, v, 0.3))


def close(a: State, b: State):
    torch.testing.assert_close(a.out, b.out, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(a.lse, b.lse, atol=1e-13, rtol=1e-13)


def test_merge_is_the_state_of_the_union():
    (a, b), whole = states(2)
    close(merge(a, b), whole)
    close(merge(b, a), whole)


def test_merge_is_associative():
    (a, b, c), whole = states(3)
    close(merge(merge(a, b), c), merge(a, merge(b, c)))
    close(merge(merge(a, b), c), whole)


def test_empty_state_is_neutral():
    (a, _), _ = states(2)
    none = empty_state((), 64, torch.float64, "cpu")
    close(merge(a, none), a)
    close(merge(none, a), a)
    both = merge(none, none)
    assert both.lse == float("-inf")
    assert not both.out.any()


def test_very_different_weights_stay_finite():
    (a, b), _ = states(2)
    big = State(a.out, a.lse + 2000)
    close(merge(big, b), big)
