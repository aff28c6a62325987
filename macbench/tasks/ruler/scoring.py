"""RULER's two metrics, as fractions: string_match_all and string_match_part of scripts/eval/synthetic/constants.py."""

import re

_CONTROL = re.compile(r"[\x00-\x1f]")


def postprocess(text: str) -> str:
    """A prediction as RULER cleans it: no white space around, control characters as newlines."""
    return _CONTROL.sub("\n", text.strip()).strip()


def match_all(text: str, references: list[str]) -> float:
    """Fraction of the references that appear in the text, whatever their case."""
    text = postprocess(text).lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def match_part(text: str, references: list[str]) -> float:
    """1 if *any* reference appears in the text, else 0. (Some harnesses take the fraction, and underrate questions with many answers.)"""
    text = postprocess(text).lower()
    return float(any(reference.lower() in text for reference in references))
