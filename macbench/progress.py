"""What a run shows while a long example goes on."""

from collections.abc import Callable
from time import time

from tqdm import tqdm

SHOW_EVERY = 1.0  # seconds


def rate(bar: tqdm, stage: str) -> Callable[[int], None]:
    """Shows tokens and tokens per second of a stage beside the bar, which itself moves once per example only. Call it with new tokens."""
    began, tokens, due = time(), 0, 0.0

    def progress(count: int) -> None:
        nonlocal tokens, due
        tokens += count
        now = time()
        bar.set_postfix_str(f"{stage} {tokens} tok, {tokens / max(now - began, 1e-9):.0f} tok/s", refresh=now >= due)
        due = now + SHOW_EVERY if now >= due else due

    return progress
