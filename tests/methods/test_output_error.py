"""Errors of attention outputs: against float64 full attention from the text itself, and without a trace in the method or its books."""

import pytest
import torch

from macbench.methods.full import Full
from macbench.methods.streaming_llm import StreamingLLM
from macbench.output_error import Measured
from tests.conftest import DEVICE
from tests.methods.cases import PROMPTS
from tests.methods.driver import Batch, Text


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Exactly; on a GPU but for sums that are made in any order."""
    torch.testing.assert_close(found, expected, atol=0 if DEVICE == "cpu" else 1e-6, rtol=0 if DEVICE == "cpu" else 1e-6, equal_nan=True)


def test_errors_are_those_of_float64_and_the_method_does_not_notice(case):
    alone, beside = Batch(case.make(), case.texts(), idle=1), Batch(Measured(case.make()), case.texts(), idle=1)
    n = len(case.prompts)
    error, norm = (torch.zeros(alone.shape.layers, n, dtype=torch.float64) for _ in range(2))
    for _ in range(4):
        out = alone.step()
        same(beside.step(), out)
        exact = alone.full()[:, :n].cpu()
        error += (out[:, :n].double().cpu() - exact).square().sum((-1, -2))
        norm += exact.square().sum((-1, -2))
    assert all((a == b).all() for a, b in zip(alone.counts().values(), beside.counts().values(), strict=True))
    for name, state in alone.method._buffers.items():
        same(beside.method.method._buffers[name], state)
    found = torch.tensor(beside.method.errors()[:n], dtype=torch.float64).T
    torch.testing.assert_close(found, (error / norm).sqrt(), rtol=1e-3, atol=1e-6)
    assert beside.method.errors()[n:] == [[None] * alone.shape.layers]  # the idle row


def test_steps_may_be_left_out_for_each_request():
    """Sums of the last steps are those of all steps less those of the first."""

    def squares(skip):
        batch = Batch(Measured(StreamingLLM(sinks=2, recent=10), skip), [Text.random(n, 6, seed=n) for n in PROMPTS])
        sums = []
        for _ in range(5):
            batch.step()
            sums.append(batch.method.squares.clone())
        return sums

    every, late = squares(()), squares((3, 0))
    torch.testing.assert_close(late[4][..., 0], every[4][..., 0] - every[2][..., 0])
    assert torch.equal(late[4][..., 1:], every[4][..., 1:])
    assert not late[2][..., 0].any()


def test_full_attention_is_no_distance_from_itself():
    batch = Batch(Measured(Full()), [Text.random(40, 3)])
    batch.step()
    assert batch.method.errors() == [[0.0] * batch.shape.layers]


def test_memory_is_given_back_with_the_methods():
    batch = Batch(measured := Measured(StreamingLLM()), [Text.random(40, 3)])
    batch.step()
    measured.forget()
    assert set(vars(measured)) == {"method", "skip"} and set(vars(measured.method)) == set(measured.method.__dataclass_fields__)


@pytest.mark.parametrize("column_sums", [False, True])
def test_it_asks_the_prompt_for_what_the_method_asks(column_sums):
    method = StreamingLLM()
    type_ = type("Asks", (StreamingLLM,), {"prompt_queries": 7, "prompt_column_sums": column_sums})
    assert (Measured(method).prompt_queries, Measured(type_()).prompt_queries) == (0, 7)
    assert Measured(type_()).prompt_column_sums is column_sums
