"""LongBench v2's protocol as data: prompts, limits and answer patterns, verbatim.

Source: https://github.com/THUDM/LongBench at commit 2e00731, files prompts/*.txt, pred.py, result.py and config/model2maxlen.json.
Copyright (c) 2023 THU-KEG & Zhipu AI, MIT licence. The data set (THUDM/LongBench-v2) is Apache-2.0 by its card.
"""

import hashlib
import json
import re

SOURCE = "https://github.com/THUDM/LongBench@2e00731 (MIT)"
REPO, REVISION = "THUDM/LongBench-v2", "2b48e494f2c7a2f0af81aae178e05c7e1dde0fe9"

_QUESTION = "What is the correct answer to this question: $Q$\nChoices:\n(A) $C_A$\n(B) $C_B$\n(C) $C_C$\n(D) $C_D$\n\n"
_FORMAT = 'Format your response as follows: "The correct answer is (insert answer here)".'
_STEPS = "Let’s think step by step:"
_TEXT = "<text>\n$DOC$\n</text>\n\n"
_LIKELY = "what is the single, most likely answer choice? "

ZERO_SHOT = "Please read the following text and answer the question below.\n\n" + _TEXT + _QUESTION + _FORMAT
COT = "Please read the following text and answer the questions below.\n\n" + _TEXT + _QUESTION + _STEPS
COT_ANSWER = "Please read the following text and answer the questions below.\n\nThe text is too long and omitted here.\n\n" + (
    _QUESTION + _STEPS + " $COT$\n\nBased on the above, " + _LIKELY + _FORMAT
)
NO_CONTEXT = _QUESTION + "W" + _LIKELY[1:] + _FORMAT

SUBTASKS = ("zero_shot", "cot", "no_context")
PROMPTS = {"zero_shot": ZERO_SHOT, "cot": COT, "cot_answer": COT_ANSWER, "no_context": NO_CONTEXT}
# Placeholders in the order in which they are replaced, and the field of an item that each stands for.
FIELDS = (("$DOC$", "context"), ("$Q$", "question"), *((f"$C_{c}$", f"choice_{c}") for c in "ABCD"))
REASONING = "$COT$"
MAX_NEW_TOKENS = {"zero_shot": 128, "cot": 1024, "cot_answer": 128, "no_context": 128}
# Tokens of a raw prompt, BOS included, for every open model; longer ones lose their middle.
MAX_PROMPT_TOKENS = 120_000
TEMPERATURE = 0.1  # official; no seed

# Tried in this order on the response without asterisks.
PATTERNS = (re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])"))
LETTERS = "ABCD"
DIFFICULTIES = ("easy", "hard")
LENGTHS = ("short", "medium", "long")  # by words: below 32k, to 128k, above
COMPENSATION = 0.25  # what a response without an answer counts in "compensated" scores
CHANCE = 0.25


def template_hash() -> str:
    """sha256 of all strings and limits above."""
    parts = [PROMPTS, FIELDS, REASONING, MAX_NEW_TOKENS, MAX_PROMPT_TOKENS, [p.pattern for p in PATTERNS], COMPENSATION]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
