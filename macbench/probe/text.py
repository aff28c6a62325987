"""Background text and vocabulary of the training data, from plain text files that the user names.

Nothing of RULER's is in them: words of wonderwords, from which RULER draws its keys and common words, are left out of the vocabulary.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from macbench.errors import ConfigError
from macbench.models.chat import Chat
from macbench.tasks.ruler.haystack import sentence_ends
from macbench.tasks.ruler.words import read_words
from macbench.untrusted import content

HELD_OUT = 0.1  # the last part of every file, for evaluation alone
_VERSE = re.compile(r"^[A-Za-z0-9]+:\d+ ", re.MULTILINE)  # numbers of verses, as bible-kjv prints them
_CONSONANTS, _VOWELS = "bdfghklmnprstvz", "aeiou"
_FEWEST = 2000  # words of a vocabulary that is worth drawing from


@dataclass(frozen=True)
class Background:
    """Sentences as tokens: sentence i is ``tokens[ends[i]:ends[i + 1]]`` and begins with a space. ``words``: the vocabulary.

    ``starts``: sentences that begin with a letter or digit, where a passage may begin. ``sha256``: of the files, by name.
    """

    sentences: list[str]
    tokens: np.ndarray
    ends: np.ndarray
    starts: np.ndarray
    words: list[str]
    sha256: dict[str, str]

    def passage(self, rng: np.random.Generator, tokens: int) -> tuple[int, int]:
        """A random run of sentences (first, end) with at most ``tokens`` tokens, and at least one sentence."""
        most = np.searchsorted(self.ends, self.ends[-1] - tokens)  # begins early enough for a whole passage, if the text is that long
        candidates = self.starts[: max(int(np.searchsorted(self.starts, most)), 1)]
        first = int(candidates[rng.integers(len(candidates))])
        end = int(np.searchsorted(self.ends, self.ends[first] + tokens, side="right")) - 1
        return first, max(end, first + 1)


def read(paths: list[str], chat: Chat, held_out: bool) -> Background:
    """Read UTF-8 text files. ``held_out``: the part for evaluation, else the part for training."""
    sentences, hashes = [], {}
    for path in map(Path, paths):
        raw = content("--text", path)
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise ConfigError("--text", path, f"cannot be read as UTF-8 text ({error})") from None
        hashes[path.name] = hashlib.sha256(raw).hexdigest()
        words = _VERSE.sub("", text).split()
        cut = int(len(words) * (1 - HELD_OUT))
        sentences += _sentences(words[cut:] if held_out else words[:cut])
    if len(sentences) < 16:
        raise ConfigError("--text", " ".join(map(str, paths)), "holds fewer than 16 sentences")
    encoded = chat.encode_pieces([f" {sentence}" for sentence in sentences])
    ends = np.concatenate([[0], np.cumsum([len(ids) for ids in encoded])])
    tokens = np.fromiter((token for ids in encoded for token in ids), np.int32, ends[-1])
    starts = np.array([i for i, sentence in enumerate(sentences) if sentence[0].isalnum()])
    return Background(sentences, tokens, ends, starts, vocabulary(sentences), hashes)


def _sentences(words: list[str]) -> list[str]:
    bounds = [0, *sentence_ends(words).tolist(), len(words)]
    return [" ".join(words[a:b]) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]


def vocabulary(sentences: list[str]) -> list[str]:
    """Lower-case words of 3 to 12 letters in the text that are not wonderwords', and made-up ones up to ``_FEWEST``; sorted."""
    lists = read_words()
    taken = {word.lower() for word in (*lists.nouns, *lists.adjectives, *lists.verbs)}
    found = set(re.findall(r"\b[a-z]{3,12}\b", " ".join(sentences))) - taken
    rng = np.random.default_rng(0)
    while len(found) < _FEWEST:
        syllables = ["".join(rng.choice(list(part)) for part in (_CONSONANTS, _VOWELS)) for _ in range(rng.integers(2, 4))]
        found |= {"".join(syllables)} - taken
    return sorted(found)
