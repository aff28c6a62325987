"""All calls to the model that an example takes: one prefill that every variant shares, then what each variant needs alone.

Alone are follow-ups (their prompts are made from the variant's own first answer) and generations that an earlier command left
unfinished (their prompts contain the variant's own tokens).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from macbench_kernels import OutOfPages, UnsupportedError

from macbench.decoder import Preparation
from macbench.engine import Engine, Generation, Prompt, Request
from macbench.errors import ConfigError, one_line
from macbench.follow import Trail
from macbench.models.weights import LoadedModel
from macbench.partial import Partial
from macbench.redact import redact
from macbench.sampling import StopStrings
from macbench.tasks.base import Example, Task

EXAMPLE_ERRORS = (RuntimeError, OutOfPages, MemoryError)
# Prompt tokens per forward pass below which less would save no memory worth the time.
SMALLEST_CHUNK = 128
_SHORT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
Progress = Callable[[str], Callable[[int], None]]


@dataclass
class Answer:
    """What one variant made of an example. Over all calls: ``generation`` (steps, counts and tokens one after the other),
    ``prompt_tokens`` and ``prefill_s`` (sums). ``text``: of the last call; ``earlier``: of those before.
    Along full attention's first text: ``fidelity``, its columns, and ``layer_errors``, of the attention outputs of each layer.
    ``prefill_chunk``: the prompt's, where memory did not allow the configured one, else 0.
    ``together``: "subtask/example" of all that decoded in step, itself among them, in the order of the batch."""

    text: str
    generation: Generation
    prompt_tokens: int
    prefill_s: float
    last: Example
    earlier: list[str] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)
    fidelity: dict = field(default_factory=dict)
    layer_errors: list[float | None] = field(default_factory=list)
    prefill_chunk: int = 0
    together: list[str] = field(default_factory=list)

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
            min(filter(None, (self.prefill_chunk, later.prefill_chunk)), default=0),
            self.together,
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
                prompts[e] = _attempt(engine, lambda context=context, wanted=wanted: prefill(engine, context, *wanted))
        trail = Trail(follow, {e: parts(examples[e])[1] for e in prompts}) if follow and len(variants) > 1 else None
        for i in sorted(range(len(variants)), key=lambda i: variants[i].name != "full"):  # the others follow full attention's text
            variant, preparation = variants[i], Preparation() if trail is not None else None
            group = [e for e in prompts if made[e][i] is None]
            members = [(calls[e][i], prompts[e]) for e in group]
            for e, answer in zip(group, _together(engine, variant, members, rate, preparation), strict=True):
                made[e][i] = answer
            if trail is not None:
                row = {e: made[e][i] for e in prompts if isinstance(made[e][i], Answer)}
                walk = partial(trail.walk, engine, variant, row, prompts, rate("follow"), preparation)
                _attempt(engine, walk)
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


def _together(engine: Engine, variant, members: list, rate: Progress, preparation: Preparation | None) -> list[Answer | Exception]:
    """Answers of one variant to several (call, prompt); a prompt that is an error is the answer. What fails together is tried one by one."""
    ready = [(call, prompt) for call, prompt in members if isinstance(prompt, Prompt)]
    results = iter([])
    if len(ready) > 1:
        requests = [call.request(prompt) for call, prompt in ready]
        done = _attempt(engine, lambda: engine.decode_batch(requests, variant.method, rate(variant.name), preparation=preparation))
        if isinstance(done, Exception):
            if preparation is not None:
                preparation.state = None  # what follows needs the memory
            for call, _ in ready:
                call.partial.discard()  # what was kept of it belongs to another attempt
        else:
            names = [call.name for call, _ in ready]
            results = iter([call.finish(generation, prompt, names) for (call, prompt), generation in zip(ready, done, strict=True)])
    return [
        prompt if not isinstance(prompt, Prompt) else next(results, None) or _attempt(engine, partial(call.on, prompt, preparation))
        for call, prompt in members
    ]


def parts(example: Example) -> tuple[list[int], list[int]]:
    """What is prefilled of an example, and what decode steps process before anything is generated."""
    first = len(example.input_ids) - example.question
    return example.input_ids[:first], example.input_ids[first:]


class Call:
    """One prompt for one variant."""

    def __init__(self, engine: Engine, model: LoadedModel, variant, example: Example, run: Path, rate: Progress):
        self.engine, self.model, self.variant, self.example, self.rate = engine, model, variant, example, rate
        self.partial = Partial(run, variant.name, variant.label, example)
        self.name = f"{example.subtask}/{example.example_id}"

    def alone(self) -> Answer:
        """With a prefill of its own, of the prompt and all but the last of the tokens that there are already."""
        earlier = self.partial.earlier
        if earlier is not None and earlier.finish_reason != "unfinished":
            return self._answer(earlier)
        ids = parts(self.example)[0] + (earlier.tokens[:-1] if earlier else [])
        method = self.variant.method
        prompt = prefill(self.engine, ids, method.prompt_queries, self.rate("prefill"), method.prompt_column_sums)
        try:
            return self.on(prompt)
        finally:
            prompt.free()

    def on(self, prompt: Prompt, preparation: Preparation | None = None) -> Answer:
        """On a prompt that is in the cache."""
        rate = self.rate(self.variant.name)
        return self.finish(self.engine.decode_batch([self.request(prompt)], self.variant.method, rate, preparation=preparation)[0], prompt)

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

    def finish(self, generation: Generation, prompt: Prompt, together: list[str] | None = None) -> Answer:
        chunk = prompt.chunk if prompt.chunk < self.engine.chunk else 0
        return replace(self._answer(self.partial.finish(generation), prompt.seconds, chunk), together=together or [self.name])

    def _answer(self, generation: Generation, seconds: float = 0.0, chunk: int = 0) -> Answer:
        text = StopStrings(self.model.chat.decode, self.example.stop).cut(self.model.chat.decode(generation.tokens))
        resumed = [len(self.partial.earlier.tokens)] if self.partial.earlier else []
        return Answer(text, generation, len(self.example.input_ids), seconds, self.example, resumed_at=resumed, prefill_chunk=chunk)


def prefill(engine: Engine, ids: list[int], *options) -> Prompt:
    """``Engine.prefill``; where memory does not suffice, with smaller chunks, whose activations need less of it."""
    chunk = engine.chunk
    while True:
        try:
            return engine.prefill(ids, *options, chunk=chunk)
        except (RuntimeError, MemoryError) as error:
            smaller = min(chunk, len(ids)) // 2
            if not out_of_memory(error) or smaller < SMALLEST_CHUNK:
                raise
        engine.release()  # only now have the frames of the failed call let go of its tensors
        chunk = smaller


def out_of_memory(error: Exception) -> bool:
    """On a GPU, by torch or a library below it, or, where torch raises plain RuntimeErrors, on a CPU."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in said for sign in _SHORT_OF_MEMORY)


def failure(error: Exception) -> str:
    """One line about a failed call, for a row's ``error``; after a lack of memory, with what may help."""
    hint = "; lower batch, engine.prefill_chunk or ctx" if out_of_memory(error) else ""
    return redact(f"{type(error).__name__}: {one_line(error) if str(error).strip() else ''}{hint}")


def _attempt(engine: Engine, make: Callable):
    """What ``make()`` returns, or the error that concerns this example only."""
    try:
        return make()
    except UnsupportedError as error:
        raise ConfigError("backend", engine.kernels.name, str(error)) from error
    except EXAMPLE_ERRORS as error:
        found = error.with_traceback(None)  # whose frames would keep every tensor of the failed call
        found.__context__ = None
    if out_of_memory(found):
        engine.release()
    return found
