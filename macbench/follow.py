"""Every method sees the text that full attention wrote, and how its predictions differ is noted (``fidelity``)."""

from collections.abc import Callable

from macbench.engine import Prompt, Request
from macbench.fidelity import Fidelity


class Trail:
    """Full attention's texts of a group of examples, for ``steps`` steps at most. Full attention walks it first and so lays it."""

    def __init__(self, steps: int):
        self.steps = steps
        self._feeds: dict[int, list[int]] | None = None

    def fits(self, variant, row: dict, ready: dict) -> bool:
        """Whether the examples to be walked are those that are ``ready``."""
        return list(self._texts(row) if self._lays(variant) else self._feeds or ()) == list(ready)

    def walk(self, variant, row: dict, prompts: dict[int, Prompt], decode: Callable, progress: Callable[[int], None]) -> None:
        """``row``: the variant's answers by example, whose ``fidelity`` is filled in. ``decode(requests, progress, watch)``."""
        laying = self._lays(variant)
        if laying:
            self._feeds = self._texts(row)
            self._meter = Fidelity([len(feed) - 1 for feed in self._feeds.values()])
        if not self._feeds:
            return
        requests = [Request(prompts[e], len(feed), feed=feed) for e, feed in self._feeds.items()]
        try:
            decode(requests, progress, self._meter.reference if laying else self._meter.compare)
        except BaseException:
            if laying:
                self._feeds = {}  # there is nothing to compare with
            else:
                self._meter.result()
            raise
        if not laying:
            for e, found in zip(self._feeds, self._meter.result(), strict=True):
                if hasattr(row[e], "fidelity"):
                    row[e].fidelity = found

    def _lays(self, variant) -> bool:
        return variant.name == "full" and self._feeds is None

    def _texts(self, row: dict) -> dict[int, list[int]]:
        """Tokens by example, of the answers that full attention gave without an interruption."""
        answers = {e: answer for e, answer in row.items() if hasattr(answer, "generation") and not answer.resumed_at}
        return {e: answer.generation.tokens[: self.steps + 1] for e, answer in answers.items()}
