"""RULER's protocol as data: task parameters, prompts and generation limits, verbatim.

Hsieh et al., RULER: What's the Real Context Size of Your Long-Context Language Models? (COLM 2024).
Source: https://github.com/NVIDIA/RULER at commit c3f5e3b, files scripts/synthetic.yaml, scripts/data/synthetic/constants.py and
the generators beside it. Copyright (c) 2024, NVIDIA CORPORATION, licensed under the Apache License, Version 2.0.
Every string below is quoted from there without a change, the odd plurals included; nothing else in this package is.
"""

import hashlib
import json
from dataclasses import asdict, dataclass

SOURCE = "https://github.com/NVIDIA/RULER@c3f5e3b (Apache-2.0)"


@dataclass(frozen=True)
class Wording:
    """What one family of tasks says to the model; ``tokens_to_generate`` is the official limit, in tokens."""

    template: str
    answer_prefix: str
    tokens_to_generate: int


NIAH = Wording(
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {type_needle_v} afterwards.\n{context}\n"
    "What are all the special magic {type_needle_v} for {query} mentioned in the provided text?",
    " The special magic {type_needle_v} for {query} mentioned in the provided text are",
    128,
)
VARIABLE_TRACKING = Wording(
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assigned the value {query}, they are: ",
    30,
)
COMMON_WORDS = Wording(
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
    120,
)
FREQUENT_WORDS = Wording(
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words. "
    "{context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
    50,
)
QA = Wording(
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\n"
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: {query}",
    " Answer:",
    32,
)
NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DOCUMENT = "Document {i}:\n{document}"
# With one needle to find, the official generator makes the task template singular with these replacements, in this order.
SINGULAR = (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer"))
# Depths of needles in essays, percent of the sentences: 40 values from 0 to 100.
DEPTHS = tuple(round(100 * i / 39) for i in range(40))


@dataclass(frozen=True)
class Needles:
    """A needle task: what the haystack is made of, what keys and values are, and how many (k keys, v values per key, q queries)."""

    haystack: str
    key: str = "words"
    value: str = "numbers"
    k: int = 1
    v: int = 1
    q: int = 1


NIAH_TASKS = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value="uuids"),
    "niah_multikey_1": Needles("essay", k=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", key="uuids", value="uuids"),
    "niah_multivalue": Needles("essay", v=4),
    # synthetic.yaml says k=1, q=4; niah.py raises k to q.
    "niah_multiquery": Needles("essay", k=4, q=4),
}
VT_HOPS = 4  # one chain of VT_HOPS + 1 variables
VT_NAME, VT_EXAMPLE_NAME = 5, 3  # letters in a variable's name, in the question and in the worked example
VT_EXAMPLE_TOKENS = 500  # size of the worked example, tokens
CWE_COMMON = 10  # words to find
CWE_SHORT = 4096  # below this max_seq_length, in tokens, the repeats are the short ones
# (words, repeats of a common word, repeats of another word) of the worked example, then (common, other) repeats of the question.
CWE_EXAMPLE, CWE_REPEATS = (40, 10, 3), (30, 3)
CWE_EXAMPLE_SHORT, CWE_REPEATS_SHORT = (20, 3, 1), (6, 1)
FWE_ALPHA = 2.0  # exponent of the Zipf law of word frequencies
FWE_WORD = 6  # letters in a coded word
FWE_NOISE = "..."  # the most frequent "word", which is not an answer

WORDING = {
    **dict.fromkeys(NIAH_TASKS, NIAH),
    "vt": VARIABLE_TRACKING,
    "cwe": COMMON_WORDS,
    "fwe": FREQUENT_WORDS,
    "qa_1": QA,
    "qa_2": QA,
}
SUBTASKS = tuple(WORDING)


def template_hash() -> str:
    """sha256 of all strings and parameters above."""
    parts = [
        {name: asdict(wording) for name, wording in WORDING.items()},
        {name: asdict(needles) for name, needles in NIAH_TASKS.items()},
        [NEEDLE, NOISE, DOCUMENT, SINGULAR, DEPTHS, VT_HOPS, VT_NAME, VT_EXAMPLE_NAME, VT_EXAMPLE_TOKENS, CWE_COMMON, CWE_SHORT],
        [CWE_EXAMPLE, CWE_REPEATS, CWE_EXAMPLE_SHORT, CWE_REPEATS_SHORT, FWE_ALPHA, FWE_WORD, FWE_NOISE],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
