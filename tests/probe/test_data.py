"""Training sequences against what can be read off their decoded text."""

import re
from collections import Counter
from copy import deepcopy

import numpy as np
import pytest

from macbench.models.chat import Chat
from macbench.probe import regular
from macbench.probe.mixture import FAMILIES, POSITIONS, Mixture, collate, stretched
from macbench.probe.needles import KINDS
from macbench.probe.sequence import Dialogue
from macbench.tasks.ruler import Ruler
from macbench.tasks.ruler.words import read_words
from tests import real
from tests.probe.made import background

LENGTH = 4096


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Mixture:
    return Mixture(real.chat(), background(tmp_path_factory.mktemp("text")), 7)


def decode(ids) -> str:
    return real.chat().tokenizer.decode(list(ids))


def made(mixture: Mixture, family: str, seed: int = 0, length: int = LENGTH, single: bool = False):
    return mixture.sequence(family, length, np.random.default_rng(seed), single)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_text_and_fill_the_length(mixture, family):
    for length in (2048, LENGTH):
        sequence = made(mixture, family, length=length)
        assert sequence.ids.tolist() == real.chat().encode(decode(sequence.ids))
        unused = length - len(sequence.ids)
        # An official sample keeps room for the longest answer; frequent words grow in steps of 1/32 of the context.
        assert 0 <= unused <= (160 if family in KINDS or family == "chains" else 140 + length // 10)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_end_a_turn_and_stand_in_their_evidence(mixture, family):
    for seed in range(4):
        sequence = made(mixture, family, seed)
        eos = real.chat().tokenizer.eos_token
        for i, (start, end) in enumerate(sequence.answers):
            answer = decode(sequence.ids[start:end])
            assert answer.endswith(eos) and answer.count(eos) == 1
            assert decode(sequence.ids[:start]).count(eos) >= 2  # the question is over: this is the model's turn
            if sequence.evidence:
                needles = [decode(sequence.ids[a:b]) for a, b in sequence.evidence[i]]
                values = re.findall(r"[0-9a-f-]{7,36}", answer)
                assert values == [re.search(r"is: ([0-9a-f-]+)\.", needle)[1] for needle in needles]
        assert sequence.answers[-1][1] == len(sequence.ids)
        assert sum(answer[0] for answer in sequence.answers) == sum(sorted(answer[0] for answer in sequence.answers))


@pytest.mark.parametrize("family", KINDS)
def test_every_question_has_one_right_answer_in_the_text(mixture, family):
    text = decode(made(mixture, family, 3).ids)
    values: dict[str, list[str]] = {}
    for key, value in re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", text):
        values.setdefault(key, []).append(value)
    asked = re.findall(r"assistant\n The special magic \w+ for (.+?) mentioned in the provided text (?:is|are) (.+?)\.<", text)
    assert len(asked) >= 2
    for keys, answer in asked:
        split = re.split(r", and |, ", keys), re.split(r", and |, ", answer)
        assert [value for key in split[0] for value in values[key]] == split[1]


@pytest.mark.parametrize(
    ("family", "subtask"),
    [
        ("noise", "niah_single_1"),
        ("text_uuids", "niah_single_3"),
        ("text", "niah_multikey_1"),
        ("needles", "niah_multikey_2"),
        ("needles_uuids", "niah_multikey_3"),
        ("multivalue", "niah_multivalue"),
        ("multiquery", "niah_multiquery"),
    ],
)
def test_a_single_question_is_asked_in_the_harness_own_words(mixture, family, subtask):
    theirs = Ruler(real.chat(), 2048, subtasks=[subtask]).example(subtask, 0).prompt
    sequence = made(mixture, family, single=True)
    assert len(sequence.answers) == 1
    ours = decode(sequence.ids[: sequence.answers[0][0]])

    def frame(prompt: str) -> tuple[str, str]:
        """What is before and after the context, keys left open."""
        before, _, rest = prompt.partition("afterwards.\n")
        after = "\nWhat" + rest.rpartition("\nWhat")[2]
        return before, re.sub(r"for .+? mentioned", "for KEY mentioned", after)

    assert frame(ours) == frame(theirs)


def test_variables_are_those_that_hold_the_value(mixture):
    for family in ("vt", "chains"):
        text = decode(made(mixture, family, 5).ids)
        held = dict(re.findall(r"VAR ([A-Z]+) = (\d+)", text))
        for to, source in re.findall(r"VAR ([A-Z]+) = VAR ([A-Z]+)", text):
            held[to] = held[source]
        questions = re.findall(r"variables are assigned the value (\d+), they are:  ([A-Z ]+)<", text)
        assert len(questions) >= (2 if family == "chains" else 1)
        for value, names in questions:
            assert sorted(names.split()) == sorted(name for name, has in held.items() if has == value)


def test_worked_examples_of_variable_tracking_differ(mixture):
    texts = [decode(made(mixture, "vt", seed).ids).partition("Question:")[0] for seed in range(6)]
    places = [tuple(i for i, line in enumerate(text.splitlines()) if line.startswith("VAR")) for text in texts]
    assert all(len(place) == 5 for place in places) and len(set(places)) >= 4


def test_words_that_are_counted(mixture):
    text = decode(made(mixture, "cwe").ids)
    listed = text.rpartition("Memorize the ones that appear most often.\n")[2]
    words, answer = listed.split("Question:")[0], listed.rpartition("are:")[2]
    common = [word for word, _ in Counter(re.findall(r"\d+\. (\S+)", words)).most_common(10)]
    assert sorted(re.findall(r"\d+\. ([a-z]+)", answer)) == sorted(common)
    text = decode(made(mixture, "fwe").ids)
    coded = text.partition("most frequently appeared coded words. ")[2].partition("\nQuestion")[0]
    assert text.rpartition("words are: ")[2].removesuffix("<|im_end|>").split() == [
        word for word, _ in Counter(w for w in coded.split() if w != "...").most_common(3)
    ]


def test_an_answer_over_documents_is_in_them(mixture):
    for seed in range(6):
        sequence = made(mixture, "qa_1", seed)
        (start, end), text = sequence.answers[0], decode(sequence.ids)
        documents = text.partition("given documents.\n\nDocument")[2].partition("\n\nAnswer the question")[0]
        assert decode(sequence.ids[start : end - 1]).strip() in documents


def test_nothing_of_the_test_vocabulary_is_used(mixture):
    lists = read_words()
    tested = {word.lower() for word in (*lists.nouns, *lists.adjectives, *lists.verbs)}
    assert not tested & set(mixture.text.words)
    keys = re.findall(r"magic numbers for ([a-z]+)-([a-z]+) is", decode(made(mixture, "needles").ids))
    assert keys and not {word for key in keys for word in key} & tested
    words = re.findall(r"\d+\. ([a-z]+)", decode(made(mixture, "cwe").ids))
    assert words and not set(words) & tested
    # uuids and numbers come from streams of other seeds than any that the harness accepts
    ours = set(re.findall(r"is: ([0-9a-f-]{36})\.", decode(made(mixture, "needles_uuids").ids)))
    theirs = Ruler(real.chat(), LENGTH, seed=7, subtasks=["niah_multikey_3"]).example("niah_multikey_3", 0).prompt
    assert ours and not any(uuid in theirs for uuid in ours)


def test_held_out_text_is_not_in_the_training_text(tmp_path):
    train, held = background(tmp_path), background(tmp_path, held_out=True)
    total = len(train.sentences) + len(held.sentences)
    assert 0.08 < len(held.sentences) / total < 0.12
    assert not set(held.sentences) & set(train.sentences)


def test_batches_are_functions_of_seed_and_step(tmp_path):
    text = background(tmp_path)
    first, again, other = (Mixture(real.chat(), text, seed) for seed in (1, 1, 2))
    first.batch(0, 2048, 1)  # what was made before makes no difference
    a, b, c, d = first.batch(5, 2048, 3), again.batch(5, 2048, 3), other.batch(5, 2048, 3), again.batch(6, 2048, 3)
    for name in vars(a):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert (a.ids != c.ids).any() and (a.ids != d.ids).any()


def test_targets_of_a_batch(mixture):
    sequences = [made(mixture, "text", 1), made(mixture, "needles_uuids", 2)]
    batch = collate(sequences, np.zeros((2, LENGTH)), LENGTH, mixture.dialogue.eos)
    for row, sequence in enumerate(sequences):
        own = batch.rows == row
        wanted = [column for start, end in sequence.answers for column in range(start, end)]
        assert batch.columns[own].tolist() == wanted
        assert batch.weights[own].sum() == pytest.approx(0.5)
        weights = batch.weights[own] / batch.weights[own].min()
        first = sequence.answers[0][1] - sequence.answers[0][0]
        np.testing.assert_allclose(weights, [4.0] * first + [1.0] * (len(wanted) - first), rtol=1e-5)
        assert (batch.ids[row, len(sequence.ids) :] == mixture.dialogue.eos).all()
    assert batch.first.tolist() == [i == 0 for s in sequences for i in range(len(s.answers))]
    assert [FAMILIES[f] for f in batch.family] == [s.family for s in sequences for _ in s.answers]


def test_the_first_of_many_questions_keeps_its_share(mixture):
    sequence = made(mixture, "noise", 1, 32768)
    assert len(sequence.answers) > 20
    batch = collate([sequence], np.zeros((1, 32768)), 32768, mixture.dialogue.eos)
    assert batch.weights[batch.question == 0].sum() == pytest.approx(0.25, rel=0.1)  # answers differ by a few tokens


def test_a_needle_may_open_the_text(mixture):
    texts = [decode(made(mixture, "multivalue", seed, single=True).ids) for seed in range(60)]
    opened = [text for text in texts if "afterwards.\n One of the special magic" in text]
    assert 1 <= len(opened) <= 20  # four of forty depths: 6 are expected


def test_short_sequences_may_have_room_for_needles_alone(mixture):
    """An empty haystack still has a place."""
    for step in range(60):
        batch = mixture.batch(step, 512, 4, 0)
        assert batch.ids.shape == (4, 512)


def test_parts_of_a_step_are_its_rows(mixture):
    whole, part = mixture.batch(3, 1024, 4), mixture.batch(3, 1024, 2, first=2)
    np.testing.assert_array_equal(whole.ids[2:], part.ids)
    rows = [regular.make(mixture.dialogue, mixture.text, 0, 3, 1024, part=part).ids for part in (0, 1)]
    assert (rows[0] != rows[1]).any()


def test_stretched_positions():
    for seed in range(50):
        positions = stretched(LENGTH, 3000, np.random.default_rng(seed))
        steps = np.diff(positions)
        assert positions[0] == 0 and positions[-1] < POSITIONS and steps.min() == 1
        assert 1 <= (steps > 1).sum() <= 7 or positions[-1] == LENGTH - 1
        assert (steps[3000 - 256 :] == 1).all()
    farthest = [stretched(LENGTH, 3000, np.random.default_rng(seed))[-1] for seed in range(200)]
    assert np.mean(farthest) == pytest.approx((POSITIONS + LENGTH) / 2, rel=0.1)


def test_ordinary_text_has_full_rows(mixture):
    for step in range(8):
        found = regular.make(mixture.dialogue, mixture.text, 0, step, 1024)
        assert found.ids.shape == (regular.ROWS, 1024)
        assert (np.diff(found.columns, axis=1) > 0).all() and found.columns.max() == 1023
    assert "Answer the question based on the given documents" in "".join(
        decode(row) for step in range(8) for row in regular.make(mixture.dialogue, mixture.text, 0, step, 1024).ids
    )


def test_a_tokenizer_without_a_chat_template(mixture, tmp_path):
    bare = Mixture(Chat(real.chat().tokenizer, "base"), background(tmp_path), 0)
    sequence = bare.sequence("needles", 2048, np.random.default_rng(0))
    assert sequence.ids.tolist() == real.chat().encode(decode(sequence.ids))
    assert decode(sequence.ids).startswith("A special magic number is hidden")


def test_an_answer_ends_as_the_chat_template_says():
    tokenizer = deepcopy(real.chat().tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (Dialogue(Chat(tokenizer)).eos, Dialogue(Chat(tokenizer)).between) == (end, "\n<|im_start|>user\n")
    tokenizer.eos_token = "<|im_start|>"  # so do some versions of transformers read this GGUF
    assert (Dialogue(Chat(tokenizer)).eos, Dialogue(Chat(tokenizer)).between) == (end, "\n<|im_start|>user\n")
