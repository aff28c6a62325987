"""Learning rate and lengths against their closed forms."""

import math

import pytest

from macbench.probe.schedule import PHASES, Lengths, learning_rate, seconds


def test_learning_rate():
    assert learning_rate(0.0, 1e-3) == 0
    assert learning_rate(0.015, 1e-3) == pytest.approx(5e-4)
    assert learning_rate(0.03, 1e-3) == pytest.approx(1e-3)
    assert learning_rate(0.515, 1e-3) == pytest.approx(1e-3 * (0.03 + 0.97 / 2))
    assert learning_rate(1.0, 1e-3) == pytest.approx(3e-5)
    assert learning_rate(0.27, 1.0) == pytest.approx(0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * 0.24 / 0.97)))


def test_each_length_gets_its_share_of_a_phase():
    total, spent, lengths = 2000.0, {}, Lengths()
    now = 0.0
    while (length := lengths.next(now / total, total - now)) is not None and now < total:
        number = next(i for i, (end, _) in enumerate(PHASES) if now / total < end)
        spent[number, length] = spent.get((number, length), 0.0) + lengths.cost[length]
        now += lengths.cost[length]
    begin = 0.0
    for number, (end, shares) in enumerate(PHASES):
        assert sum(shares.values()) == pytest.approx(1)
        for length, share in shares.items():
            assert spent[number, length] == pytest.approx(share * (end - begin) * total, abs=2 * lengths.cost[length])
        begin = end
    assert now == pytest.approx(total, abs=1)


def test_a_step_that_takes_too_long_is_not_chosen():
    lengths = Lengths()
    assert all(lengths.next(0.9, left=1.0) <= 32768 for _ in range(50))
    assert lengths.next(0.9, left=0.01) is None
    assert all(Lengths(longest=8192).next(0.9) <= 8192 for _ in range(50))


def test_rows_costs_and_state():
    lengths = Lengths()
    assert [lengths.rows(n) for n in (4096, 65536, 131072)] == [8, 1, 1]
    assert seconds(131072, 1) == pytest.approx(131072 * 3.5e-6 + 3.5 * 34560 * 131072**2 / 4.25e14)
    assert Lengths(parts=3).cost[32768] == pytest.approx(3 * lengths.cost[32768])
    lengths.measured(4096, 2 * lengths.cost[4096])
    for _ in range(5):
        lengths.next(0.5)
    other = Lengths()
    other.restore(lengths.state())
    assert [lengths.next(0.55) for _ in range(20)] == [other.next(0.55) for _ in range(20)]
