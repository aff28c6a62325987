"""Choosing tokens: distributions, seeds, stop strings."""

import pytest
import torch

from macbench.errors import ConfigError
from macbench.sampling import Sampling, StopStrings, greedy
from tests import real

LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2]))


def frequencies(sampling: Sampling, draws: int = 4000) -> list[float]:
    choose = sampling.sampler()
    chosen = torch.tensor([choose(LOGITS) for _ in range(draws)])
    return [(chosen == i).float().mean().item() for i in range(5)]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), [0.1, 0.4, 0.05, 0.25, 0.2]),
        (Sampling(0.5), [0.01 / 0.275, 0.16 / 0.275, 0.0025 / 0.275, 0.0625 / 0.275, 0.04 / 0.275]),
        (Sampling(1.0, top_k=2), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        (Sampling(1.0, top_p=0.6), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),  # 0.4 < 0.6, so the second is needed
        (Sampling(1.0, top_p=0.3), [0, 1, 0, 0, 0]),
        (Sampling(1.0, top_p=0.9, top_k=3), [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
        (Sampling(1.0, top_p=0.7, top_k=3), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),  # top-p of what top-k left
    ],
)
def test_distribution(sampling, expected):
    assert frequencies(sampling) == pytest.approx(expected, abs=0.03)


def test_a_seed_is_a_stream_that_can_be_taken_up_anywhere():
    def draws(sampling, n, skip=0):
        choose = sampling.sampler(skip)
        return [choose(LOGITS) for _ in range(n)]

    whole = draws(Sampling(1.0, seed=7), 40)
    assert draws(Sampling(1.0, seed=7), 40) == whole
    assert draws(Sampling(1.0, seed=7), 25, skip=15) == whole[15:]
    assert draws(Sampling(1.0, seed=8), 40) != whole
    assert Sampling().sampler() is greedy and greedy(LOGITS) == 1


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}])
def test_wrong_settings(wrong):
    with pytest.raises(ConfigError, match=f"task.{next(iter(wrong))}="):
        Sampling(**wrong)


def test_stop_strings_are_seen_as_soon_as_they_are_there():
    chat = real.chat()
    stops = StopStrings(chat.decode, ("*** finished", "É!"))
    for text, cut in (("One day é *** finished *** more", "One day é "), ("x É! *** finished", "x "), ("*** finish, *** Finished", None)):
        tokens = chat.encode_piece(text)
        first = next((n for n in range(1, len(tokens) + 1) if stops(tokens[:n])), None)
        if cut is None:
            assert first is None and stops.cut(text) == text
        else:
            assert stops.cut(chat.decode(tokens[:first])) == cut
            assert not any(s in chat.decode(tokens[: first - 1]) for s in stops.strings)
    assert not StopStrings(chat.decode, ())([1, 2, 3])
