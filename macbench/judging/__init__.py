"""Judges: who answers a benchmark's questions about generated texts, and what is done with the answers.

judge=lexical   words of the event in the text; no model, never official
judge=llm       a model of ours on the same engine; with its defaults the judge that LongGenBench names
judge=api       an OpenAI-compatible server
judge=none      texts only; judge them later with python -m macbench.judge RUN judge=...
"""

from macbench.judging.judgement import build, judge_run, prepare

__all__ = ["build", "judge_run", "prepare"]
