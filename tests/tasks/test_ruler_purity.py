"""Samples are functions of task, seed, index, ctx and tokenizer, and of nothing else."""

import hashlib
import random
import uuid

import numpy as np
import pytest

from macbench.tasks.ruler import SUBTASKS, Ruler
from macbench.tasks.ruler.pieces import Pieces
from macbench.tasks.ruler.rng import Rng
from macbench.tasks.ruler.uuids import UuidPieces, uuid_letters


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_a_sample_alone_is_the_sample_in_sequence(chat, made_data, subtask):
    def task(seed: int = 42) -> Ruler:
        return Ruler(chat, 4096, seed=seed, data_path=str(made_data))

    sequence = task()
    before = [sequence.example(subtask, index) for index in range(4)]
    random.seed(1), np.random.seed(1)  # global generators must not matter
    alone = task().example(subtask, 3)
    assert alone == before[3] == sequence.example(subtask, 3)
    assert len({example.prompt for example in before}) == 4
    assert task(seed=7).example(subtask, 3).prompt != alone.prompt
    assert [example.example_id for example in before] == ["0", "1", "2", "3"]


def test_a_longer_context_asks_for_the_same_needle(chat):
    short, long = (Ruler(chat, ctx).example("niah_multikey_2", 5) for ctx in (1024, 8192))
    assert short.references == long.references and len(long.prompt) > 4 * len(short.prompt)


def test_samples_never_change_within_a_version(chat):
    """The tasks that need no data, with wonderwords 2.2.0. If this fails on purpose, Ruler.version must grow."""
    task = Ruler(chat, 4096)
    assert task.version == 1 and task.example("niah_single_1", 0).references == ["9861169"]
    prompts = [task.example(subtask, 0).prompt for subtask in ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")]
    assert hashlib.sha256("".join(prompts).encode()).hexdigest()[:16] == "aab9e163282ca157"


def test_streams():
    assert Rng("a", 1).raw(3).tolist() == np.concatenate([(one := Rng("a", 1)).raw(1), one.raw(2)]).tolist()
    assert Rng("a", 1).raw(1) != Rng("a", 2).raw(1) != Rng("a", "1", 0).raw(1)
    assert Rng("a").child(1).raw(1) == Rng("a", 1).raw(1)
    draws = Rng("b").integers(-2, 3, 5000)
    assert set(draws.tolist()) == {-2, -1, 0, 1, 2} and abs(draws.mean()) < 0.1
    assert sorted(Rng("c").permutation(50).tolist()) == list(range(50))
    assert len(set(Rng("d").sample(10, 4))) == 4
    words = Rng("e").letters("ab", 3, 8)
    assert sorted(words) == [a + b + c for a in "ab" for b in "ab" for c in "ab"]


def test_uuids_are_version_4_and_cut_into_their_own_text(chat):
    raw = Rng("uuids").raw(2 * 500).reshape(-1, 2)
    letters = uuid_letters(raw)
    expected = [str(uuid.UUID(int=high << 64 | low, version=4)) for high, low in raw.tolist()]
    assert [bytes(row).decode() for row in letters] == expected
    pieces = Pieces(chat)
    for _ in range(2):  # the second time from the lookup table
        entries, starts = UuidPieces(pieces).entries(letters)
        ends = [*starts[1:].tolist(), len(entries)]
        assert [pieces.text([entries[a:b]]) for a, b in zip(starts, ends, strict=True)] == [f" {text}" for text in expected]
        assert pieces.ids([entries]).tolist() == chat.encode_piece("".join(f" {text}" for text in expected))
