"""LongGenBench: data, prompts, parts of texts, and the official numbers."""

import hashlib
import io
import json
import urllib.error
import urllib.request
from dataclasses import replace

import pandas as pd
import pytest

from macbench.errors import ConfigError
from macbench.tasks.longgenbench import SCENARIOS, LongGenBench, data, protocol, scoring
from tests.tasks import longgenbench_data as made


def message(function, *arguments, **keywords) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["16k", "32k"])
def test_totals_of_the_official_files(split, tmp_path):
    """6205 and 8215 checks; without the files, data in their layout is counted the same way."""
    if not made.REAL.is_dir():
        (tmp_path / protocol.SPLITS[split].file).write_text(json.dumps(made.items()))
        items = data.load(split, str(tmp_path))
        assert (items.checks, items.official) == (8 * 5, False)
        return
    items = data.load(split, str(made.REAL))
    assert items.checks == protocol.SPLITS[split].checks == {"16k": 6205, "32k": 8215}[split]
    assert items.official and [len(items.by_scenario[s]) for s in SCENARIOS] == [100] * 4
    every = [item for of in items.by_scenario.values() for item in of]
    kinds = [sum(kind == k for item in every for kind, _, _ in item.checks) for k in protocol.KINDS]
    assert kinds == {"16k": [1953, 1256, 2996], "32k": [2094, 2252, 3869]}[split]
    assert sum(not 1 <= part <= item.number for item in every for _, part, _ in item.checks) == {"16k": 2, "32k": 0}[split]
    sizes = {"16k": [52, 52, 100, 100], "32k": [365, 365, 300, 361]}[split]
    assert [{item.number for item in items.by_scenario[s]} for s in SCENARIOS] == [{n} for n in sizes]


DAMAGED = {
    "missing field": ([{k: v for k, v in made.item().items() if k != "prefix"}], "item 0 has no str named 'prefix'"),
    "no number": ([made.item(number="52")], "item 0 has no int named 'number'"),
    "checks": ([made.item(checks_once=[])], "item 0 has no dict named 'checks_once'"),
    "check": ([made.item(checks_range={"one": "x"})], "check of 'one'"),
    "type": ([made.item(), made.item("Story")], "item 1 has type 'Story'"),
    "prefix": ([made.item(prefix="#*# Floor 2:")], "does not end with its prefix"),
    "no parts": ([made.item(number=0)], "orders 0 parts"),
    "too many parts": ([made.item(number=10**12)], "orders 1000000000000 parts"),
    "twice": ([made.item(), made.item()], "the same prompt twice"),
    "truncated": (json.dumps(made.items())[:200], "truncated?"),
    "trailing": (json.dumps(made.items()) + " x", "cannot be read as JSON (Extra data"),
    "half a character": ([made.item(prompt="\ud800" + made.item()["prompt"])], "item 0 has half a character"),
    "no list": ("{}", "is not a list"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_wrong_data_is_one_line(tmp_path, name):
    content, said = DAMAGED[name]
    text = message(data.load, "16k", str(made.write(tmp_path, content)))
    assert text.startswith("task.data_path=") and said in text


def test_the_file_of_the_other_split_is_no_mistake_to_run_with(tmp_path, monkeypatch):
    path = made.write(tmp_path) / "Dataset_short.json"
    wrong = replace(protocol.SPLITS["32k"], sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setitem(protocol.SPLITS, "32k", wrong)
    assert message(data.load, "16k", str(path)) == f"task.split=16k: but {path} is the official file of task.split=32k"


def test_the_published_file_is_fetched_once_and_checked(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = (made.write(tmp_path) / "Dataset_short.json").read_bytes()
    asked = []

    def served(url, timeout):
        asked.append(url)
        return io.BytesIO(content)

    monkeypatch.setattr(urllib.request, "urlopen", served)
    assert "must be 3cf98c4b" in message(data.load, "16k", None)  # not the official content
    facts = protocol.Split("Dataset_short.json", 10, 40, hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(protocol.SPLITS, "16k", facts)
    first = data.load("16k", None)
    assert first.official and first.source == asked[-1] == protocol.SPLITS["16k"].url
    assert data.load("16k", None) == first and len(asked) == 2

    def unreachable(url, timeout):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    text = message(data.load, "16k", None)
    assert "needs a folder with Dataset_short.json" in text and "no network" in text


def test_settings(chat, tmp_path):
    folder = str(made.write(tmp_path))
    assert "did you mean diary" in message(LongGenBench, chat, 4096, subtasks=["dairy"], data_path=folder)
    assert message(LongGenBench, chat, 4096, split="8k", data_path=folder).startswith("task.split=8k: must be one of 16k, 32k")
    assert "official, greedy" in message(LongGenBench, chat, 4096, sampling="beam", data_path=folder)
    assert "task.max_new_tokens=0" in message(LongGenBench, chat, 4096, max_new_tokens=0, data_path=folder)
    assert "task.data_sha256=00" in message(LongGenBench, chat, 4096, data_path=folder, data_sha256="00")
    assert "Dataset_short.json" in message(LongGenBench, chat, 4096, data_path=str(tmp_path / "no"))
    assert message(LongGenBench(chat, 20, data_path=folder).example, "diary", 0).startswith("ctx=20: does not hold diary 0")
    only = LongGenBench(chat, 4096, data_path=str(made.write(tmp_path, [made.item("Week")])))
    assert only.subtasks == ("diary",)


def test_prompts_are_raw_and_sampling_is_official(chat, any_chat, tmp_path):
    task = LongGenBench(any_chat, 20_000, data_path=str(made.write(tmp_path)))
    example = task.example("menu", 1)
    assert (example.prompt, example.input_ids) == (made.item("Menu Week", 1)["prompt"], any_chat.encode(example.prompt))
    assert (example.sampling.temperature, example.sampling.top_p, example.sampling.seed) == (0.95, 0.95, 6211027)
    assert (example.stop, example.max_new_tokens) == (("*** finished",), 16_000)
    short = LongGenBench(chat, 200, sampling="greedy", max_new_tokens=4096, data_path=str(tmp_path)).example("menu", 1)
    assert short.max_new_tokens == 200 - len(short.input_ids) and short.sampling.temperature == 0
    facts = task.protocol()
    assert (facts["task"], facts["max_new_tokens"], facts["data_official"], facts["checks"]) == ("longgenbench_16k", 16_000, False, 40)
    assert len(facts["data_sha256"]) == 64 and task.size("menu") == 2


# -- scoring ----------------------------------------------------------------------------------------------------------

TEXT = (
    " the lobby, with a gardening festival.\n#*# Floor 2: a small library. #*# Floor 2: again, no library. #*# no number here "
    "#*# See Floor 4 and Floor 5: a cafe #*#Floor 9: too high. #*# floor 3: small letters"
)


def test_texts_may_be_made_to_reach_their_limit(chat, tmp_path):
    path = str(made.write(tmp_path))
    official, endless = (LongGenBench(chat, 2000, data_path=path, ignore_eos=ignore) for ignore in (False, True))
    example = endless.example(endless.subtasks[0], 0)
    assert (example.stop, example.ignore_eos) == ((), True) and not official.example(official.subtasks[0], 0).ignore_eos
    assert "not official" in endless.protocol()["stop"] and official.protocol()["stop"] == "*** finished"
    assert len(endless.protocol()["deviations"]) == len(official.protocol()["deviations"]) + 1
    with pytest.raises(ConfigError, match=r"task\.ignore_eos=1: must be true or false"):
        LongGenBench(chat, 2000, data_path=path, ignore_eos=1)


def test_parts():
    """The first piece that names a number is that part; the first number in a piece counts; case matters."""
    found = scoring.parts("#*# Floor 1:" + TEXT, "Floor")
    assert sorted(found) == [1, 2, 4, 9]
    assert found[2] == " Floor 2: a small library. "
    assert len(scoring.pieces("#*# Floor 1:" + TEXT)) == 8
    assert scoring.completion(found, 5) == 3 / 5
    assert scoring.parts("#*# Menu Week 1: x #*# Week 2: y", "Menu Week").keys() == {1}
    assert scoring.parts("", "Floor") == {}
    assert scoring.parts("#*# Floor " + "7" * 5000 + ": x #*# Floor 3: y", "Floor").keys() == {3}


def sample(type_="Floor", index="0", method="full", text=TEXT, error=None, **changes) -> dict:
    facts = made.item(type_, **changes)
    checks = [[k, int(part), event] for k in protocol.KINDS for part, event in facts[f"checks_{k}"].items()]
    meta = {"type": type_, "prefix": facts["prefix"], "number": facts["number"], "checks": checks}
    key = {"method": method, "variant": "", "subtask": protocol.TYPES[type_], "example_id": index}
    return key | {"text": None if error else text, "meta": json.dumps(meta), "error": error}


def test_checks_and_questions():
    frame = pd.DataFrame([sample(), sample(method="mac"), sample(index="1", error="OutOfMemoryError")])
    texts, checks, questions = LongGenBench.checks(frame)
    assert len(texts) == 3 and len(checks) == 15
    failed = checks[checks.example_id == "1"]
    assert len(failed) == 5 and not failed.present.any() and texts.completion.tolist()[2] == 0  # all that was ordered stays in the denominators
    assert len(questions) == 5  # both texts are the same, so they share their questions
    assert questions[0].prompt == (
        "Context:  Floor 2: a small library. ### Instruction: Does this context include the small library? Please answer with 'yes' or 'no' only."
    )
    mine = checks[(checks.method == "full") & (checks.example_id == "0")]
    assert mine.present.all() and not mine.impossible.any()


def test_completion_is_the_score(chat, tmp_path):
    task = LongGenBench(chat, 4096, data_path=str(made.write(tmp_path)))
    assert task.score(task.example("skyscraper", 0), TEXT) == 3 / 5
    assert task.score(task.example("skyscraper", 0), "") == 1 / 5  # the prefix is part of the text


def verdicts(*rows) -> pd.DataFrame:
    columns = ["kind", "present", "yes", "impossible", "subtask", "example_id"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.assign(yes=pd.array(frame.yes.tolist(), dtype="boolean"))


def test_numbers_are_the_official_ones():
    checks = verdicts(
        ("once", True, True, False, "menu", "0"),
        ("once", True, False, False, "menu", "0"),
        ("once", False, None, True, "menu", "0"),
        ("range", True, True, False, "menu", "1"),
        ("range", False, None, False, "menu", "1"),
        ("periodic", True, None, False, "menu", "1"),  # the judge gave no verdict
        ("periodic", True, False, False, "menu", "1"),
        ("periodic", True, False, False, "menu", "1"),
    )
    texts = pd.DataFrame({"completion": [1.0, 0.5, 0.0], "pieces": [41, 41, 40], "words": [2001, 2000, 9000]})
    found = scoring.numbers(texts, checks)
    assert found["completion"] == pytest.approx(50)
    assert found["stic_1"] == pytest.approx(100 * 2 / 6) and found["stic_2"] == pytest.approx(100 * 2 / 8)
    assert found["weighted"] == pytest.approx(0.5 * 25)
    assert (found["once"], found["range"], found["periodic"]) == pytest.approx((50, 100, 0))
    assert found["average"] == pytest.approx(50)
    assert found["length"] == 2001  # only texts of more than 40 pieces and more than 2000 words
    assert (found["checks"], found["present"], found["yes"], found["impossible"], found["unjudged"]) == (8, 6, 2, 1, 1)


def test_the_error_of_stic_2_counts_missing_parts():
    """Four texts of ten checks with 10, 2, 5, 0 parts there and 8, 2, 1, 0 yes: the ratio estimator sqrt(sum (y - R x)^2 / (n (n - 1))) / mean x."""
    rows = []
    for text, (there, yes) in enumerate([(10, 8), (2, 2), (5, 1), (0, 0)]):
        rows += [("once", i < there, (i < yes) if i < there else None, False, "menu", str(text)) for i in range(10)]
    found = scoring.numbers(pd.DataFrame({"completion": [0.0], "pieces": [1], "words": [0]}), verdicts(*rows))
    assert found["stic_2"] == pytest.approx(27.5)
    spread = sum((y - 0.275 * 10) ** 2 for y in (8, 2, 1, 0))
    assert found["stic_2_se"] == pytest.approx(100 * (spread / (4 * 3)) ** 0.5 / 10)


def test_numbers_of_nothing():
    found = scoring.numbers(pd.DataFrame({"completion": [0.0], "pieces": [1], "words": [0]}), verdicts(("once", False, None, False, "menu", "0")))
    assert found["stic_2"] == 0 and pd.isna(found["stic_1"]) and pd.isna(found["length"]) and pd.isna(found["stic_2_se"])


@pytest.mark.parametrize(("answer", "yes"), [("yes", True), ("Yes.", True), ("YES", True), (" No, yesterday", True), ("no", False), ("", False)])
def test_verdict(answer, yes):
    assert LongGenBench.verdict(answer) == yes


def test_the_protocol_is_what_it_was():
    assert protocol.template_hash() == "bf8abdc2c79ee0e7af1436ec84936d43486376328a53d2a00a7fd1865aa8f9bf"
