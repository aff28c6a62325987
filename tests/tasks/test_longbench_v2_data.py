"""LongBench v2's items: streaming from a file, the hub's layout, and what wrong data gets."""

import json
import sys
import types

import psutil
import pytest

from macbench.errors import ConfigError
from macbench.tasks.longbench_v2 import LongBenchV2, data, protocol
from tests.tasks import longbench_v2_data as made
from tests.within import within


def message(function, *arguments, **keywords) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("how", [{}, {"indent": 4}, {"ensure_ascii": False}, {"separators": (",", ":")}])
def test_items_come_back_as_they_were_written(tmp_path, how):
    found = data.load(str(made.write(tmp_path / "x.json", made.items(), **how)))
    assert [found.item(i) for i in (5, 0, 7)] == [made.item(i) for i in (5, 0, 7)]
    assert [facts.id for facts in found.facts] == [item["_id"] for item in made.items()]


def test_the_hash_is_of_the_items_and_not_of_the_file(tmp_path):
    one = data.load(str(made.write(tmp_path / "a.json", made.items(), indent=2))).sha256
    assert data.load(str(made.folder(tmp_path))).sha256 == one
    assert data.load(str(made.write(tmp_path / "c.json", made.items()[::-1]))).sha256 != one
    assert data.load(str(tmp_path), one).sha256 == one
    assert message(data.load, str(tmp_path), "0" * 64).startswith("task.data_sha256=000")


DAMAGED = {
    "missing field": ([made.item(0), {k: v for k, v in made.item(1).items() if k != "choice_C"}], "item 1 has no text named 'choice_C'"),
    "number": ([made.item(0, question=3)], "item 0 has no text named 'question'"),
    "answer E": ([made.item(0), made.item(1), made.item(2, answer="E")], "has answer 'E', must be one of A, B, C, D"),
    "difficulty": ([made.item(0, difficulty="mild")], "has difficulty 'mild'"),
    "length": ([made.item(0, length="long ")], "has length 'long '"),
    "twice": ([made.item(0), made.item(1, _id=made.item(0)["_id"])], "has two items with the _id 66ec"),
    "trailing words": (json.dumps(made.items(2)) + "\nand more", "goes on after the list of items, at byte "),
    "trailing list": (json.dumps(made.items(2)) + "[]", "goes on after the list of items"),
    "trailing comma": (json.dumps(made.items(2))[:-1] + ",]", "has a comma but no item after item 1"),
    "half a character": ([made.item(0), made.item(1, choice_A="\ud800")], "item 1 has half a character (a lone surrogate) in 'choice_A'"),
    "no id": ([made.item(0, _id=" ")], "item 0 has nothing in '_id'"),
    "no context": ([made.item(0), made.item(1, context="")], "item 1 has nothing in 'context'"),
    "truncated in a text": (json.dumps(made.items(2))[:9000], "ends in the middle of item"),
    "truncated between": (json.dumps([made.item(0)])[:-1], "ends after item 0"),
    "no list": ('{"a": 1}', "is not a JSON list of items"),
    "other things": ('[{"a": "b"} 3]', "item 0 has no text"),
    "after an item": (json.dumps([made.item(0)])[:-1] + " 3]", "something else than an item"),
    "not JSON": ("[{'a': 1}]", "item 0 is not JSON"),
    "nothing": ("[]", "has no items"),
    "empty": ("", "cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_wrong_data_is_one_line(tmp_path, name):
    content, said = DAMAGED[name]
    path = made.write(tmp_path / "data.json", content)
    text = message(data.load, str(path))
    assert text.startswith("task.data_path=") and "data.json" in text and said in text


HOLES = {
    "after a bracket": (b"[{", b"", "has a zero byte in item 0, at byte 2"),
    "in a text": (b'[{"_id": "', b'"}]', "has no end of item 0 within"),
    "between items": (b"[", b"]", "has something else than an item at byte 1"),
    "after the list": (b"[{}]", b"", "item 0 has no text"),
}


@pytest.mark.parametrize("name", HOLES)
def test_files_with_holes(tmp_path, name):
    """Gigabytes that are on no disk."""
    before, after, said = HOLES[name]
    with (tmp_path / "data.json").open("wb") as file:
        file.write(before)
        file.seek(16 << 30)
        file.write(after or b"\0")
    with within():
        assert said in message(data.load, str(tmp_path))


@pytest.mark.parametrize("text", ['"' * 5_000_000, "\\" * 5_000_000, " " * 5_000_000, "\\" * 33 + '"' + "\\" * 32])
def test_texts_of_quotes_and_backslashes(tmp_path, text):
    whole = [made.item(0, context="a" + text), made.item(1)]
    path = made.write(tmp_path / "data.json", "\n\t " * 1_000_000 + json.dumps(whole))
    with within():
        found = data.load(str(path))
        assert [found.item(i) for i in range(2)] == whole


def test_items_of_brackets(tmp_path):
    path = made.write(tmp_path / "data.json", '[{"a": [' + "[]," * 2_000_000)
    with within():
        assert "texts and brackets in item 0" in message(data.load, str(path))


def test_no_such_folder(tmp_path):
    assert "must be a folder with data.json" in message(data.load, str(tmp_path / "no"))
    assert "must be a folder with data.json" in message(data.load, str(tmp_path))


def test_the_hub_is_asked_for_one_revision(chat, monkeypatch, tmp_path):
    """Rows of the hub's layout give the same items and the same hash as the file."""
    import huggingface_hub

    asked = []

    def load_dataset(repo, config, split, revision):
        asked.append((repo, config, split, revision))
        return made.items()

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, repo, timeout, revision: asked.append(revision))
    fake = types.SimpleNamespace(load_dataset=load_dataset, config=types.SimpleNamespace(HF_HUB_OFFLINE=False))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    data._hub.cache_clear()
    try:
        found = data.load(None)
    finally:
        data._hub.cache_clear()
    assert asked == [protocol.REVISION, (protocol.REPO, None, "train", protocol.REVISION)]
    assert found.item(3) == made.item(3)
    assert found.sha256 == data.load(str(made.folder(tmp_path))).sha256
    assert found.source.endswith(protocol.REVISION)


def test_no_network_is_one_line(chat, monkeypatch):
    import datasets
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach\nit")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    data._hub.cache_clear()
    assert "cannot be fetched from the Hugging Face hub (ConnectionError)" in message(LongBenchV2, chat, 4096)


def test_a_file_is_not_held_in_memory(tmp_path):
    """60 MB of items: reading all of them takes far less than the file."""
    text = made.item(0)["context"] * 30
    path = made.write(tmp_path / "data.json", [made.item(i, context=text) for i in range(2)])
    small = path.stat().st_size
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        for i in range(60_000_000 // small * 2):
            file.write(("," if i else "") + json.dumps(made.item(i, context=text)))
        file.write("]")
    process = psutil.Process()
    before = process.memory_info().rss
    found = data.load(str(path))
    assert found.item(len(found) - 1)["context"] == text
    assert process.memory_info().rss - before < path.stat().st_size / 2


def test_the_real_items_or_a_copy_of_their_layout(tmp_path):
    found = data.load(str(made.REAL if made.REAL.is_dir() else made.folder(tmp_path)))
    assert len(found) in (8, 26)
    assert {facts.length for facts in found.facts} == set(protocol.LENGTHS)
    if len(found) == 26:
        assert [sum(f.length == n for f in found.facts) for n in protocol.LENGTHS] == [18, 6, 2]
        assert found.sha256 == "ee6c85c6e2bb86db8d59d2b3f0fa43a7e719971e279026d967ff09b04d3788be"
