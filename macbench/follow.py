"""Every method sees the text that full attention wrote; how its predictions and its attention outputs differ is noted."""

from collections.abc import Callable

from macbench.decoder import Preparation
from macbench.engine import Engine, Generation, Prompt, Request
from macbench.fidelity import Fidelity


class Trail:
    """Full attention's texts of a group of examples, ``steps`` generated tokens of each at most. Full attention walks first and so lays it.

    ``questions``: by example, the tokens that decode steps process before the text.
    """

    def __init__(self, steps: int, questions: dict[int, list[int]]):
        self._steps, self._questions = steps, questions
        self._feeds: dict[int, list[int]] | None = None

    def walk(
        self, engine: Engine, variant, row: dict, prompts: dict[int, Prompt], progress: Callable[[int], None], preparation: Preparation | None
    ) -> None:
        """``row``: the variant's answers by example, whose ``fidelity`` and ``layer_errors`` are filled in."""
        if variant.name == "full" and self._feeds is None:
            self._lay(engine, variant, row, prompts, progress, preparation)
        elif self._feeds:
            variant.measured.skip = self._skip
            try:
                done = engine.decode_batch(self._requests(prompts), variant.measured, progress, self._meter.compare, preparation)
            finally:
                found = self._meter.result()  # of a failed attempt, too: the next method begins anew
            for e, agreement, errors, generation in zip(
                self._feeds, found, variant.measured.errors(), done, strict=False
            ):  # errors: of idle rows, too
                if e in row:
                    row[e].fidelity = agreement | _outputs(errors, generation)
                    row[e].layer_errors = errors

    def _lay(self, engine: Engine, variant, row: dict, prompts, progress, preparation) -> None:
        self._feeds = {}  # nothing is compared if this fails
        feeds = {e: answer.generation.tokens[: self._steps + 1] for e, answer in row.items() if not answer.resumed_at}
        if not any(len(feed) + len(self._questions[e]) > 1 for e, feed in feeds.items()):
            return
        requests = self._requests(prompts, feeds)
        self._skip = tuple(max(0, len(r.question) - 1) for r in requests)  # steps before the first one that predicts an answer
        self._meter = Fidelity([len(r.question) + len(r.feed) - 1 for r in requests], self._skip)
        engine.decode_batch(requests, variant.method, progress, self._meter.reference, preparation)
        self._feeds = feeds

    def _requests(self, prompts: dict[int, Prompt], feeds: dict[int, list[int]] | None = None) -> list[Request]:
        feeds = self._feeds if feeds is None else feeds
        return [Request(prompts[e], len(feed), feed=feed, question=self._questions[e]) for e, feed in feeds.items()]


def _outputs(errors: list[float | None], generation: Generation) -> dict[str, float | None]:
    """Mean error of the layers, and pages read over rows of full attention; None where nothing was measured."""
    known = [error for error in errors if error is not None]
    pages, rows = (generation.counts[name].sum() for name in ("tokens_page", "tokens_phys_full"))
    return {"output_error": sum(known) / len(known) if known else None, "rho_page": pages / rows if rows else None}
