"""The word lists of wonderwords, from which RULER draws its keys and its common words."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata

from macbench.errors import ConfigError
from macbench.tasks.ruler.rng import Rng
from macbench.untrusted import content

VERSION = "2.2.0"  # the release whose nounlist RULER's published numbers can be repeated with; 3.0.1 lacks four nouns
NOUNS_SHA256 = "0778f51872f2aa89e0745c0cc37471a13e3d2161a79fcfdc03b6390b10604a55"


@dataclass(frozen=True)
class WordLists:
    """Nouns, adjectives and verbs in file order, and the sha256 of each file."""

    nouns: list[str]
    adjectives: list[str]
    verbs: list[str]
    sha256: dict[str, str]
    version: str

    @property
    def pairs(self) -> int:
        """Number of adjective-noun pairs; pair p is adjective p // len(nouns) and noun p % len(nouns)."""
        return len(self.adjectives) * len(self.nouns)

    def pair(self, number: int) -> str:
        """A key like "silly-teapot". RULER draws from the sorted set of all pairs; they all differ, so this is the same draw."""
        adjective, noun = divmod(number, len(self.nouns))
        return f"{self.adjectives[adjective]}-{self.nouns[noun]}"

    @cached_property
    def shuffled(self) -> list[str]:
        """All different words in one fixed random order."""
        words = sorted({*self.nouns, *self.adjectives, *self.verbs})
        return [words[i] for i in Rng("ruler", "words").permutation(len(words))]


def read_words() -> WordLists:
    """The lists of the installed wonderwords, read as files: importing the package would run its code for nothing."""
    try:
        package = metadata.distribution("wonderwords")
    except metadata.PackageNotFoundError:
        how = f"need the word lists of wonderwords (pip install wonderwords=={VERSION})"
        raise ConfigError("task.subtasks", "niah, cwe", how) from None
    lists, hashes = [], {}
    for name in ("nounlist.txt", "adjectivelist.txt", "verblist.txt"):
        path = next((file.locate() for file in package.files or () if file.name == name), None)
        if path is None or not path.is_file():
            raise ConfigError("task.subtasks", "niah, cwe", f"the installed wonderwords {package.version} has no {name}")
        raw = content("task.subtasks", path)
        hashes[name] = hashlib.sha256(raw).hexdigest()
        lists.append([line.rstrip() for line in raw.decode().splitlines()])
    return WordLists(*lists, sha256=hashes, version=package.version)
