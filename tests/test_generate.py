"""Calls beyond one greedy generation: sampling, stop strings, follow-ups, and resuming inside an example."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from macbench_kernels import kernels

from macbench import generate, partial
from macbench.counting import COUNTS
from macbench.engine import Engine
from macbench.methods.full import Full
from macbench.methods.mac import MAC
from macbench.models.weights import LoadedModel
from macbench.run import Variant
from macbench.sampling import Sampling
from macbench.tasks.base import Example
from tests import real
from tests.models.tiny import tiny

NEW = 40


@pytest.fixture(scope="module")
def setup():
    """A tiny float64 model that speaks with the first tokens of the real tokenizer."""
    network = tiny("llama").cpu()
    return Engine(network, kernels("torch"), 256), LoadedModel(network, real.chat(), frozenset())


def example(sampling=None, stop=(), new=NEW) -> Example:
    ids = [int(x) for x in torch.randint(0, 97, (70,), generator=torch.Generator().manual_seed(3))]
    return Example("a", "0", "", ids, [], new, {}, sampling or Sampling(1.0, seed=5), stop)


VARIANTS = [Variant("full", "", Full()), Variant("mac", "tau=0.45", MAC(min_context=0, window=32, band=8))]


class Plain:
    """A task with one call."""


class TwoCalls:
    """A task whose second prompt is the first answer, twice."""

    def follow_up(self, example, text):
        if example.meta.get("call") == 2:
            return None
        ids = [t % 97 for t in real.chat().encode_piece(text)]
        return Example("a", "0", text, ids + ids, [], 10, {"call": 2}, Sampling(), ())


def answers(setup, run, task=None, wanted=None, variants=VARIANTS, follow=0):
    engine, model = setup
    made = generate.answers(engine, model, task or Plain(), variants, [wanted or example()], run, lambda stage: lambda count: None, follow)[0]
    assert engine.pool.free_pages == engine.pool.pages
    return made


def test_a_repeated_example_gives_the_same_text(setup, tmp_path):
    one, two = answers(setup, tmp_path), answers(setup, tmp_path)
    assert [a.generation.tokens for a in one] == [a.generation.tokens for a in two]
    other = answers(setup, tmp_path, wanted=example(Sampling(1.0, seed=6)))
    assert other[0].generation.tokens != one[0].generation.tokens
    assert len(set(one[0].generation.tokens)) > 5


def test_a_stop_string_ends_the_text_and_is_no_part_of_it(setup, tmp_path):
    free = answers(setup, tmp_path)[0]
    stop = free.text[12:15]
    made = answers(setup, tmp_path, wanted=example(stop=(stop,)))[0]
    assert made.text == free.text[: free.text.index(stop)]
    assert made.generation.finish_reason == "stop"
    tokens = made.generation.tokens
    assert tokens == free.generation.tokens[: len(tokens)] and len(tokens) < NEW


def test_follow_ups_are_made_for_every_variant_and_counts_add_up(setup, tmp_path):
    alone = answers(setup, tmp_path)
    both = answers(setup, tmp_path, TwoCalls())
    for first, whole in zip(alone, both, strict=True):
        assert whole.earlier == [first.text]
        assert whole.generation.tokens[:NEW] == first.generation.tokens and len(whole.generation.tokens) == NEW + 10
        assert len(whole.generation.step_seconds) == NEW - 1 + 9
        second = whole.prompt_tokens - 70
        assert second == 2 * len(real.chat().encode_piece(first.text))
        assert whole.generation.positions.tolist() == [*range(70, 70 + NEW - 1), *range(second, second + 9)]
        full = whole.generation.counts["tokens_log_full"]
        assert (full[:, 0, 0] == 6 * (whole.generation.positions + 1)).all()
    assert both[0].text != alone[0].text


def test_one_variant_failing_leaves_the_others(setup, tmp_path, monkeypatch):
    decode = Engine.decode_batch

    def fails(self, requests, method, *args, **kwargs):
        if isinstance(method, Full):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(self, requests, method, *args, **kwargs)

    monkeypatch.setattr(Engine, "decode_batch", fails)
    made = answers(setup, tmp_path, TwoCalls())
    assert isinstance(made[0], torch.OutOfMemoryError) and isinstance(made[1], generate.Answer)


def test_a_batch_gives_the_answers_of_its_examples(setup, tmp_path, monkeypatch):
    """Prompts of several lengths, limits and stop strings, decoded in step and one by one; then a batch too large for the memory."""
    engine, model = setup
    stop = answers(setup, tmp_path / "stop")[0].text[9:11]
    wanted = [
        replace(example(), example_id="a", input_ids=list(range(5, 95)), max_new_tokens=30),
        replace(example(stop=(stop,)), example_id="b"),
        replace(example(Sampling(1.0, seed=5)), example_id="c", input_ids=list(range(60)), max_new_tokens=1),
        replace(example(Sampling(0.8, seed=9)), example_id="d", input_ids=list(range(40, 71)), max_new_tokens=25),
    ]
    alone = [answers(setup, tmp_path / "one", wanted=w) for w in wanted]
    larger = Engine(engine.network, kernels("torch"), 256, batch=4)

    def together(run):
        made = generate.answers(larger, model, Plain(), VARIANTS, wanted, run, lambda stage: lambda count: None)
        for row, expected in zip(made, alone, strict=True):
            for got, want in zip(row, expected, strict=True):
                assert (got.text, got.generation.tokens, got.generation.finish_reason) == (
                    want.text,
                    want.generation.tokens,
                    want.generation.finish_reason,
                )
                for name, counts in want.generation.counts.items():
                    assert (got.generation.counts[name] == counts).all(), name
        assert larger.pool.free_pages == larger.pool.pages

    together(tmp_path / "batch")
    decode = Engine.decode_batch

    def small(self, requests, *args, **kwargs):
        if len(requests) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(self, requests, *args, **kwargs)

    monkeypatch.setattr(Engine, "decode_batch", small)
    together(tmp_path / "fallback")


class Interrupt(Exception):
    """Stands for the end of the process."""


def interrupted(setup, run, monkeypatch, after: int, variants=VARIANTS):
    """Run with a part every 8 steps and stop after some steps of all variants together."""
    engine, model = setup
    monkeypatch.setattr(partial.Partial.__init__, "__defaults__", (8,))
    count = 0

    def step(tokens):
        nonlocal count
        count += tokens
        if count > after:
            raise Interrupt

    with pytest.raises(Interrupt):
        generate.answers(engine, model, Plain(), variants, [example()], run, lambda stage: (lambda n: None) if stage == "prefill" else step)


def test_a_resumed_run_can_follow(setup, tmp_path, monkeypatch):
    """MAC is resumed, full attention is not: its prompt holds what MAC needs all the same."""
    interrupted(setup, tmp_path, monkeypatch, 20, variants=VARIANTS[1:])
    made = answers(setup, tmp_path, follow=4)
    assert made[1].resumed_at and not made[0].resumed_at
    assert set(made[1].fidelity) == {"top1_agreement", "kl_mean", "output_error", "rho_page"} and not made[0].fidelity


@pytest.mark.parametrize("after", [20, 38, 39, 60])
def test_a_generation_goes_on_where_it_was(setup, tmp_path, monkeypatch, after):
    """Full attention continues with the same tokens; every step is counted once, at its position."""
    whole = answers(setup, tmp_path / "other")
    interrupted(setup, tmp_path, monkeypatch, after)
    assert list((tmp_path / "partial").rglob("part-*.npz"))
    made = answers(setup, tmp_path)
    assert made[0].resumed_at
    assert made[0].generation.tokens == whole[0].generation.tokens and made[0].text == whole[0].text
    for one, two in zip(made, whole, strict=True):
        assert one.generation.positions.tolist() == two.generation.positions.tolist()
        assert len(one.generation.step_seconds) == NEW - 1
        assert (one.generation.counts["tokens_log_full"] == two.generation.counts["tokens_log_full"]).all()
    for name in COUNTS:
        assert (made[0].generation.counts[name] == whole[0].generation.counts[name]).all()
    partial.clear(tmp_path, example())
    assert not (tmp_path / "partial").exists()


def test_twice_interrupted_and_a_damaged_part(setup, tmp_path, monkeypatch):
    whole = answers(setup, tmp_path / "other", variants=VARIANTS[:1])[0]
    interrupted(setup, tmp_path, monkeypatch, 10, VARIANTS[:1])
    interrupted(setup, tmp_path, monkeypatch, 12, VARIANTS[:1])
    parts = sorted((tmp_path / "partial").rglob("part-*.npz"))
    assert len(parts) == 2
    parts[-1].write_bytes(parts[-1].read_bytes()[:50])
    made = answers(setup, tmp_path, variants=VARIANTS[:1])[0]
    assert made.resumed_at == [9]
    assert made.generation.tokens == whole.generation.tokens
    assert np.array_equal(made.generation.positions, whole.generation.positions)
    again = answers(setup, tmp_path, variants=VARIANTS[:1])[0]  # finished, but its rows were never written
    assert again.generation.tokens == whole.generation.tokens and again.prefill_s == 0


def test_short_generations_leave_nothing_behind(setup, tmp_path):
    answers(setup, tmp_path)
    assert not (tmp_path / "partial").exists()
