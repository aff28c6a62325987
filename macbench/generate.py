"""All calls to the model that an example takes: one prefill that every variant shares, then what each variant needs alone.

Alone are follow-ups (their prompts are made from the variant's own first answer) and generations that an earlier command left
unfinished (their prompts contain the variant's own tokens).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from macbench_kernels import OutOfPages, UnsupportedError

from macbench.engine import Engine, Generation, Prompt, Request
from macbench.errors import ConfigError
from macbench.fidelity import Fidelity
from macbench.models.weights import LoadedModel
from macbench.partial import Partial
from macbench.sampling import StopStrings
from macbench.tasks.base import Example, Task

EXAMPLE_ERRORS = (RuntimeError, OutOfPages, MemoryError)
Progress = Callable[[str], Callable[[int], None]]


@dataclass
class Answer:
    """What one variant made of an example. Over all calls: ``generation`` (steps, counts and tokens one after the other),
    ``prompt_tokens`` and ``prefill_s`` (sums). ``text``: of the last call; ``earlier``: of those before.
    Along full attention's first text: ``fidelity``, its columns, and ``layer_errors``, of the attention outputs of each layer."""

    text: str
    generation: Generation
    prompt_tokens: int
    prefill_s: float
    last: Example
    earlier: list[str] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)
    fidelity: dict = field(default_factory=dict)
    layer_errors: list[float | None] = field(default_factory=list)

    def then(self, later: "Answer") -> "Answer":
        return Answer(
            later.text,
            self.generation.then(later.generation),
            self.prompt_tokens + later.prompt_tokens,
            self.prefill_s + later.prefill_s,
            later.last,
            [*self.earlier, self.text, *later.earlier],
            self.resumed_at + later.resumed_at,
            self.fidelity,
            self.layer_errors,
        )


Made = list[list[Answer | Exception]]


def answers(
    engine: Engine, model: LoadedModel, task: Task, variants: list, examples: list[Example], run: Path, rate: Progress, follow: int = 0
) -> Made:
    """For each example an answer, or the error that prevented it, for each variant (``name``, ``label``, ``method``) in order.

    The examples decode in step, at most ``engine.batch`` of them. ``follow``: for how many steps every method follows full attention's text.
    """
    calls = [[Call(engine, model, v, example, run, rate) for v in variants] for example in examples]
    made: Made = [[_attempt(engine, call.alone) if call.partial.earlier is not None else None for call in row] for row in calls]
    prompts: dict[int, Prompt | Exception] = {}
    try:
        for e, example in enumerate(examples):
            if any(answer is None for answer in made[e]):
                methods = [v.method for v, answer in zip(variants, made[e], strict=True) if answer is None or follow]
                keep = max(method.prompt_queries for method in methods)
                wanted = (keep, rate("prefill"), any(method.prompt_column_sums for method in methods))
                context, _ = parts(example)
                prompts[e] = _attempt(engine, lambda context=context, wanted=wanted: engine.prefill(context, *wanted))
        for i, variant in enumerate(variants):
            group = [e for e in prompts if made[e][i] is None]
            for e, answer in zip(group, _together(engine, variant, [(calls[e][i], prompts[e]) for e in group], rate), strict=True):
                made[e][i] = answer
        _follow(engine, variants, examples, prompts, made, rate, follow)
    finally:
        for prompt in prompts.values():
            if isinstance(prompt, Prompt):
                prompt.free()
    follow_up = getattr(task, "follow_up", None)
    for row in made if follow_up else []:
        for i, variant in enumerate(variants):
            while isinstance(row[i], Answer) and (after := follow_up(row[i].last, row[i].text)) is not None:
                later = _attempt(engine, Call(engine, model, variant, after, run, rate).alone)
                row[i] = row[i].then(later) if isinstance(later, Answer) else later
    return made


def _together(engine: Engine, variant, members: list, rate: Progress) -> list[Answer | Exception]:
    """Answers of one variant to several (call, prompt); a prompt that is an error is the answer. What fails together is tried one by one."""
    ready = [(call, prompt) for call, prompt in members if isinstance(prompt, Prompt)]
    results = iter([])
    if len(ready) > 1:
        requests = [call.request(prompt) for call, prompt in ready]
        done = _attempt(engine, lambda: engine.decode_batch(requests, variant.method, rate(variant.name)))
        if isinstance(done, Exception):
            for call, _ in ready:
                call.partial.discard()  # what was kept of it belongs to another attempt
        else:
            results = iter([call.finish(generation, prompt) for (call, prompt), generation in zip(ready, done, strict=True)])
    return [
        prompt if not isinstance(prompt, Prompt) else next(results, None) or _attempt(engine, lambda call=call, prompt=prompt: call.on(prompt))
        for call, prompt in members
    ]


def parts(example: Example) -> tuple[list[int], list[int]]:
    """What is prefilled of an example, and what decode steps process before anything is generated."""
    first = len(example.input_ids) - example.question
    return example.input_ids[:first], example.input_ids[first:]


def _follow(
    engine: Engine, variants: list, examples: list[Example], prompts: dict[int, Prompt | Exception], made: Made, rate: Progress, steps: int
) -> None:
    """Let every other method see the text that full attention wrote, for ``steps`` steps at most, and note how its predictions differ."""
    full = next((i for i, v in enumerate(variants) if v.name == "full"), None)
    if full is None or not steps or len(variants) < 2:
        return
    written = {e: made[e][full].generation.tokens for e in prompts if isinstance(made[e][full], Answer) and not made[e][full].resumed_at}
    feeds = {e: tokens[: steps + 1] for e, tokens in written.items() if len(tokens) > 1}
    if not feeds:
        return
    requests = [Request(prompts[e], len(feed), feed=feed, question=parts(examples[e])[1]) for e, feed in feeds.items()]
    skip = tuple(max(0, len(r.question) - 1) for r in requests)  # steps before the first one that predicts an answer
    meter = Fidelity([len(r.question) + len(r.feed) - 1 for r in requests], skip)
    if isinstance(_attempt(engine, lambda: engine.decode_batch(requests, variants[full].method, rate("follow"), meter.reference)), Exception):
        return
    for i, variant in enumerate(variants):
        if i == full:
            continue
        variant.measured.skip = skip
        done = _attempt(engine, lambda v=variant: engine.decode_batch(requests, v.measured, rate("follow"), meter.compare))
        found = meter.result()  # of a failed attempt, too: the next method begins anew
        if isinstance(done, Exception):
            continue
        for e, agreement, errors, generation in zip(feeds, found, variant.measured.errors(), done, strict=False):  # errors: of idle rows, too
            if isinstance(made[e][i], Answer):
                known = [error for error in errors if error is not None]
                pages, rows = (generation.counts[name].sum() for name in ("tokens_page", "tokens_phys_full"))
                made[e][i].fidelity = agreement | {"output_error": sum(known) / len(known) if known else None, "rho_page": pages / rows}
                made[e][i].layer_errors = errors


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
        ids = parts(self.example)[0] + (earlier.tokens[:-1] if earlier else [])
        method = self.variant.method
        prompt = self.engine.prefill(ids, method.prompt_queries, self.rate("prefill"), method.prompt_column_sums)
        try:
            return self.on(prompt)
        finally:
            prompt.free()

    def on(self, prompt: Prompt) -> Answer:
        """On a prompt that is in the cache."""
        return self.finish(self.engine.decode_batch([self.request(prompt)], self.variant.method, self.rate(self.variant.name))[0], prompt)

    def request(self, prompt: Prompt) -> Request:
        example, start = self.example, self.partial.earlier.tokens if self.partial.earlier else ()
        return Request(
            *(prompt, example.max_new_tokens, frozenset() if example.ignore_eos else self.model.stop_ids),
            sampler=example.sampling.sampler(skip=len(start)),
            ended=StopStrings(self.model.chat.decode, example.stop),
            start=start,
            question=parts(example)[1],
            keeper=None if example.question else self.partial,  # a resumed prompt could not tell what was prefilled and what was not
        )

    def finish(self, generation: Generation, prompt: Prompt) -> Answer:
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
        found = error.with_traceback(None)  # whose frames would keep every tensor of the failed call
        found.__context__ = None
    if isinstance(found, torch.OutOfMemoryError):
        engine.release()
    return found
