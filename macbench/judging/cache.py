"""Answers by content, one line each: a question that was ever answered by this judge is not asked again."""

import hashlib
import json
import os
from pathlib import Path

from macbench.errors import ConfigError
from macbench.untrusted import content


class Answers:
    """``verdicts.jsonl`` of one judge: append only; what an interruption leaves of the last line is dropped."""

    def __init__(self, path: Path):
        self.path = path
        self.known: dict[str, str] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            raw = content("judgements", path) if path.exists() else b""
            whole = raw[: raw.rfind(b"\n") + 1]
            if len(whole) < len(raw):
                os.truncate(path, len(whole))
            self._file = path.open("ab")
        except OSError as error:
            raise ConfigError("judgements", path, f"cannot be written ({error.strerror})") from error
        try:
            for line in whole.splitlines():
                entry = json.loads(line)
                self.known[entry["key"]] = entry["answer"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError("judgements", path, "is damaged; delete it to have the questions asked again") from None

    def get(self, prompt: str) -> str | None:
        return self.known.get(_key(prompt))

    def add(self, prompt: str, answer: str) -> None:
        self.known[_key(prompt)] = answer
        self._file.write(json.dumps({"key": _key(prompt), "answer": answer}).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _key(prompt: str) -> str:
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
