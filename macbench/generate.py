"""All calls to the model that an example takes: one prefill that every variant shares, then what each variant needs alone.

Alone are follow-ups (their prompts are made from the variant's own first answer) and generations that an earlier command left
unfinished (their prompts contain the variant's own tokens).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from macbench_kernels import OutOfPages, UnsupportedError

from macbench.engine import Engine, Generation, Prompt
from macbench.errors import ConfigError
from macbench.models.weights import LoadedModel
from macbench.partial import Partial
from macbench.sampling import StopStrings
from macbench.tasks.base import Example, Task

EXAMPLE_ERRORS = (RuntimeError, OutOfPages, MemoryError)
Progress = Callable[[str], Callable[[int], None]]


@dataclass
class Answer:
    """What one variant made of an example. Over all calls: ``generation`` (steps, counts and tokens one after the other),
    ``prompt_tokens`` and ``prefill_s`` (sums). ``text``: of the last call; ``earlier``: of those before."""

    text: str
    generation: Generation
    prompt_tokens: int
    prefill_s: float
    last: Example
    earlier: list[str] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)

    def then(self, later: "Answer") -> "Answer":
        return Answer(
            later.text,
            self.generation.then(later.generation),
            self.prompt_tokens + later.prompt_tokens,
            self.prefill_s + later.prefill_s,
            later.last,
            [*self.earlier, self.text, *later.earlier],
            self.resumed_at + later.resumed_at,
        )


def answers(engine: Engine, model: LoadedModel, task: Task, variants: list, example: Example, run: Path, rate: Progress) -> list[Answer | Exception]:
    """An answer, or the error that prevented it, for each variant (``name``, ``label``, ``method``) in order."""
    calls = [Call(engine, model, v, example, run, rate) for v in variants]
    found: dict[int, Answer | Exception] = {}
    for i, call in enumerate(calls):
        if call.partial.earlier is not None:
            found[i] = _attempt(engine, call.alone)
    fresh = [i for i in range(len(calls)) if i not in found]
    if fresh:
        keep = max(variants[i].method.prompt_queries for i in fresh)
        sums = any(variants[i].method.prompt_column_sums for i in fresh)
        prompt = _attempt(engine, lambda: engine.prefill(example.input_ids, keep, rate("prefill"), sums))
        try:
            for i in fresh:
                found[i] = prompt if isinstance(prompt, Exception) else _attempt(engine, lambda i=i: calls[i].on(prompt))
        finally:
            if isinstance(prompt, Prompt):
                prompt.free()
    follow_up = getattr(task, "follow_up", None)
    for i, variant in enumerate(variants):
        while follow_up and isinstance(found[i], Answer) and (after := follow_up(found[i].last, found[i].text)) is not None:
            later = _attempt(engine, Call(engine, model, variant, after, run, rate).alone)
            found[i] = found[i].then(later) if isinstance(later, Answer) else later
    return [found[i] for i in range(len(variants))]


class Call:
    """One prompt for one variant."""

    def __init__(self, engine: Engine, model: LoadedModel, variant, example: Example, run: Path, rate: Progress):
        self.engine, self.model, self.variant, self.example, self.rate = engine, model, variant, example, rate
        self.partial = Partial(run, variant.name, variant.label, example)

    def alone(self) -> Answer:
        """With a prefill of its own, of the prompt and all but the last of the tokens that there are already."""
        earlier = self.partial.earlier
        if earlier is not None and earlier.finish_reason != "unfinished":
            return self._answer(earlier, 0.0)
        ids = self.example.input_ids + (earlier.tokens[:-1] if earlier else [])
        method = self.variant.method
        prompt = self.engine.prefill(ids, method.prompt_queries, self.rate("prefill"), method.prompt_column_sums)
        try:
            return self.on(prompt)
        finally:
            prompt.free()

    def on(self, prompt: Prompt) -> Answer:
        """On a prompt that is in the cache."""
        example, start = self.example, self.partial.earlier.tokens if self.partial.earlier else ()
        ended = StopStrings(self.model.chat.decode, example.stop)
        sampler = example.sampling.sampler(skip=len(start))
        generation = self.engine.decode(
            *(prompt, self.variant.method, example.max_new_tokens, self.model.stop_ids, self.rate(self.variant.name)),
            **{"sampler": sampler, "ended": ended, "start": start, "keeper": self.partial},
        )
        return self._answer(self.partial.finish(generation), prompt.seconds)

    def _answer(self, generation: Generation, prefill: float) -> Answer:
        text = StopStrings(self.model.chat.decode, self.example.stop).cut(self.model.chat.decode(generation.tokens))
        resumed = [len(self.partial.earlier.tokens)] if self.partial.earlier else []
        return Answer(text, generation, len(self.example.input_ids), prefill, self.example, resumed_at=resumed)


def _attempt(engine: Engine, make: Callable):
    """What ``make()`` returns, or the error that concerns this example only."""
    try:
        return make()
    except UnsupportedError as error:
        raise ConfigError("backend", engine.kernels.name, str(error)) from error
    except EXAMPLE_ERRORS as error:
        return error
