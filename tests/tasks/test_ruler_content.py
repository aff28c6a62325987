"""What RULER prompts say, read back from the text alone."""

import json
import math
import re
from collections import Counter

import pytest

from macbench.tasks.ruler import SUBTASKS, Ruler, protocol
from macbench.tasks.ruler.data import Data
from macbench.tasks.ruler.haystack import sentence_ends
from macbench.tasks.ruler.words import NOUNS_SHA256

NIAH = [subtask for subtask in SUBTASKS if subtask.startswith("niah")]
NEEDLE = re.compile(r"One of the special magic (?:numbers|uuids) for (.+?) is: ([0-9a-f-]+)\.")


@pytest.fixture(scope="module")
def task(chat, ruler_folder) -> Ruler:
    return Ruler(chat, 4096, data_path=str(ruler_folder))


def user_turn(task: Ruler, prompt: str) -> str:
    chat = task._kit.chat
    assert prompt.startswith(chat.head)
    user, tail, _ = prompt[len(chat.head) :].rpartition(chat.tail)
    assert tail == chat.tail
    return user


def between(text: str, template: str, **values: object) -> str:
    """The context of a prompt that was made from ``template``."""
    before, after = template.replace("{context}", "\0").format(**values).split("\0")
    assert text.startswith(before) and text.endswith(after), (text[:200], text[-200:])
    return text[len(before) : len(text) - len(after)]


@pytest.mark.parametrize("subtask", NIAH)
def test_needles(task, subtask):
    spec = protocol.NIAH_TASKS[subtask]
    for index in range(3):
        example = task.example(subtask, index)
        user = user_turn(task, example.prompt)
        found: dict[str, list[str]] = {}
        for key, value in NEEDLE.findall(user):
            found.setdefault(key, []).append(value)
        asked = re.search(r" for (.+) mentioned in the provided text\?$", user)[1]
        queries = re.split(r", and |, ", asked)
        assert len(queries) == spec.q and len(example.references) == spec.q * spec.v
        assert Counter(value for query in queries for value in found[query]) == Counter(example.references)
        assert example.prompt.count(f"for {queries[0]} is: ") == spec.v
        if spec.haystack != "needle":
            assert sum(map(len, found.values())) == spec.k * spec.v
        for key, values in found.items():
            assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}" if spec.key == "uuids" else r"\S.*-.+", key)
            for value in values:
                assert len(value) == (36 if spec.value == "uuids" else 7)
        plural = spec.q * spec.v > 1
        kind = spec.value if plural else spec.value[:-1]
        verb = "are" if plural else "is"
        assert example.prompt.endswith(f" The special magic {kind} for {asked} mentioned in the provided text {verb}")
        assert user.startswith(f"{'Some' if plural else 'A'} special magic {kind} {verb} hidden within the following text. ")
        assert user.endswith(f"\nWhat {'are all' if plural else 'is'} the special magic {kind} for {asked} mentioned in the provided text?")


def test_noise_is_lines_of_noise(task):
    example = task.example("niah_single_1", 1)
    lines = user_turn(task, example.prompt).split("\n")[1:-1]
    assert Counter(line == protocol.NOISE for line in lines) == {True: example.meta["haystack_units"], False: 1}


def test_essays_are_the_first_words_of_the_corpus(task, ruler_folder):
    words = json.loads((ruler_folder / "PaulGrahamEssays.json").read_text(encoding="utf-8"))["text"].split()
    for subtask in ("niah_single_2", "niah_multivalue", "niah_multiquery"):
        for index in range(8):
            example = task.example(subtask, index)
            context = "\n".join(user_turn(task, example.prompt).split("\n")[1:-1])
            rest = NEEDLE.sub("", context).split()
            assert rest == (words * 10)[: example.meta["haystack_units"]]


def test_empty_stretches_are_joined_as_by_ruler(task):
    """Depths 0 and 100 leave a space at the edge of the context, adjacent needles two spaces between them."""
    generator = task._generator("niah_single_2")
    words = generator._essays.words
    head, needles, tail = generator.chat.head + generator.before, ["N one.", "N two."], "\nWhat?"

    def text(bounds: list[int]) -> str:
        return generator.pieces.text(generator._between_words(needles, bounds, tail)).removeprefix(head)

    def expected(bounds: list[int]) -> str:
        parts = []
        for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            parts += [" ".join(words[start:end]), *needles[i : i + 1]]
        return " ".join(parts) + tail

    for bounds in ([0, 0, 5, 9], [0, 4, 4, 9], [0, 4, 9, 9], [0, 0, 0, 9], [0, 9, 9, 9], [0, 0, 9, 9], [0, 1, 8, 9], [0, 1, 1, 2]):
        assert text(bounds) == expected(bounds)


def test_variable_chain_resolves(task):
    for index in range(4):
        example = task.example("vt", index)
        user = user_turn(task, example.prompt)
        shown, asked = user.split("\n\nMemorize and track")
        check_chain("Memorize and track" + asked, example.references, 5)
        shown, _, answers = shown.partition(", they are: ")
        assert ", 5 variables are assigned the value " in shown and answers.startswith(" ")
        question = shown[: shown.index(" Answer: According to")]
        check_chain(question, answers.split(), 3)


def check_chain(text: str, names: list[str], letters: int):
    value = re.search(r"are assigned the value (\d{5}) in the text above\.$", text)[1]
    context = between(text, protocol.VARIABLE_TRACKING.template, query=value)
    values: dict[str, str] = {}
    for line in context.split("\n"):
        if line == protocol.NOISE:
            continue
        name, source = re.fullmatch(r"VAR ([A-Z]+) = (?:VAR )?([A-Z]+ |\d{5})", line).groups()
        values[name] = values[source.strip()] if source.strip().isalpha() else source
    assert list(values) == names and set(values.values()) == {value}
    assert len(names) == 5 and all(len(name) == letters for name in names)


def test_the_worked_example_is_one_layout_with_new_names(task):
    first, second = (user_turn(task, task.example("vt", index).prompt).split("\n\nMemorize")[0] for index in (0, 1))
    assert first != second
    assert re.sub(r"\b[A-Z]{3}\b|\d{5}", "x", first) == re.sub(r"\b[A-Z]{3}\b|\d{5}", "x", second)
    assert "12345" not in first + second


def check_list(context: str, common: list[str], often: int, seldom: int):
    items = re.split(r"(?:^| )(\d+)\. ", context)[1:]
    assert [int(number) for number in items[0::2]] == list(range(1, len(items) // 2 + 1))
    counts = Counter(items[1::2])
    assert {word for word, count in counts.items() if count == often} == set(common) and len(common) == 10
    assert set(counts.values()) == {often, seldom}


@pytest.mark.parametrize(("ctx", "example_repeats", "repeats"), [(4096, (10, 3), (30, 3)), (2048, (3, 1), (6, 1))])
def test_common_words_are_recounted(chat, ctx, example_repeats, repeats):
    task = Ruler(chat, ctx, subtasks=["cwe"])
    example = task.example("cwe", 2)
    shown, _, asked = example.prompt.rpartition("\n" + chat.head)
    check_list(
        between(asked.removesuffix(chat.tail + protocol.COMMON_WORDS.answer_prefix), protocol.COMMON_WORDS.template),
        example.references,
        *repeats,
    )
    shown, _, answers = shown.removeprefix(chat.head).partition(chat.tail + protocol.COMMON_WORDS.answer_prefix)
    answers = re.split(r" \d+\. ", answers)[1:]
    check_list(between(shown, protocol.COMMON_WORDS.template), answers, *example_repeats)
    assert example.meta["vocabulary"] == 8169 and not example.meta["capped"]


def test_a_list_that_wants_more_words_than_there_are(chat, tmp_path, monkeypatch):
    words = Data(None).words.shuffled[:40]
    monkeypatch.setattr("macbench.tasks.ruler.words.WordLists.shuffled", words)
    capped = Ruler(chat, 4096, subtasks=["cwe"]).example("cwe", 0)
    assert capped.meta | {"haystack_units": 40, "vocabulary": 40, "capped": True} == capped.meta
    (tmp_path / "english_words.json").write_text(json.dumps({str(i): f"w{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(300)}))
    task = Ruler(chat, 4096, subtasks=["cwe"], data_path=str(tmp_path))
    example = task.example("cwe", 0)
    assert example.meta["vocabulary"] == 300 and all(word.startswith("w") for word in example.references)
    check_list(
        between(
            example.prompt.rpartition("\n" + chat.head)[2].removesuffix(chat.tail + protocol.COMMON_WORDS.answer_prefix),
            protocol.COMMON_WORDS.template,
        ),
        example.references,
        30,
        3,
    )


def test_frequent_words_are_recounted(task):
    for index in range(3):
        example = task.example("fwe", index)
        context = between(user_turn(task, example.prompt), protocol.FREQUENT_WORDS.template)
        ranked = Counter(context.split(" ")).most_common()
        counts = [count for _, count in ranked]
        assert counts == [int(example.meta["words"] * (k + 1) ** -2.0 / (math.pi**2 / 6)) for k in range(len(counts))]
        assert ranked[0][0] == "..." and {word for word, _ in ranked[1:4]} == set(example.references)
        assert counts[3] > counts[4] and all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])
        room = 4096 - 50
        assert (example.meta["words"] - room // 6) % (room // 32) == 0


def test_documents(task):
    for subtask, questions, gold in (("qa_1", task._kit.data.squad, 1), ("qa_2", task._kit.data.hotpot, 10)):
        for index in range(4):
            example = task.example(subtask, index)
            question, answers, needed, near = questions.questions[index]
            context = between(user_turn(task, example.prompt), protocol.QA.template, query=question)
            docs = [re.sub(r"^Document \d+:\n", "", part) for part in re.split(r"\n\n(?=Document \d+:\n)", context)]
            numbers = [int(number) for number in re.findall(r"(?:^|\n\n)Document (\d+):\n", context)]
            assert numbers == list(range(1, len(docs) + 1)) and len(set(docs)) == len(docs)
            assert set(docs) <= set(questions.docs) and {questions.docs[i] for i in needed} <= set(docs)
            assert {docs[i - 1] for i in example.meta["gold_documents"]} == {questions.docs[i] for i in needed} and len(needed) == gold
            assert example.references == answers
            if len(docs) > 1 + len(near):
                assert {questions.docs[i] for i in near} <= set(docs)


def test_all_documents_when_the_context_is_larger_than_the_data(chat, made_data):
    task = Ruler(chat, 32768, data_path=str(made_data))
    example = task.example("qa_1", 0)
    assert example.meta["all_documents"] and example.meta["haystack_units"] == len(task._kit.data.squad.docs)


def test_places_differ_between_samples(task):
    def places(subtask: str, key: str) -> set[str]:
        return {str(task.example(subtask, index).meta[key]) for index in range(12)}

    for subtask in NIAH:
        assert len(places(subtask, "needle_units")) > 6, subtask
    assert len(places("vt", "assignment_units")) > 6
    assert len(places("qa_1", "gold_documents")) > 4
    assert len(places("qa_2", "gold_documents")) > 6
    firsts = {task.example("fwe", index).prompt.split("coded words. ")[1][:200] for index in range(6)}
    assert len(firsts) == 6


def test_depths_are_the_official_forty():
    assert len(set(protocol.DEPTHS)) == 40 and protocol.DEPTHS[:4] == (0, 3, 5, 8) and protocol.DEPTHS[-1] == 100


def test_sentences():
    text = 'Mr. A. B. Smith came (e.g. today). "Really?" he said. In the U.S. Army it is 3.5. Yes! [1] Then etc. and so on... It ended'
    words = text.split()
    ends = sentence_ends(words).tolist()
    assert [" ".join(words[a:b]) for a, b in zip([0, *ends], [*ends, len(words)], strict=True)] == [
        "Mr. A. B. Smith came (e.g. today).", '"Really?" he said.', "In the U.S. Army it is 3.5.", "Yes!",
        "[1] Then etc. and so on...", "It ended",
    ]  # fmt: skip


def test_the_pinned_word_lists():
    words = Data(None).words
    assert words.sha256["nounlist.txt"] == NOUNS_SHA256 and words.pairs == 912 * 6786
    assert len(words.shuffled) == len(set(words.shuffled)) == 8169
    assert {words.pair(number) for number in (0, words.pairs - 1)} == {
        f"{words.adjectives[0]}-{words.nouns[0]}", f"{words.adjectives[-1]}-{words.nouns[-1]}"
    }  # fmt: skip
