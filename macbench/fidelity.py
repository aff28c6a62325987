"""How near a method's predictions stay to full attention's along full attention's own text. For attention outputs see output_error.

Both are fed the same tokens (teacher forcing), so that a difference at one step is not the echo of an earlier one. What is kept are full
attention's logits of one batch, in float32 where they were made: steps * requests * vocabulary * 4 bytes (16 steps of one request of
Llama-3: 8 MB).
"""

import torch


class Fidelity:
    """A batch: ``reference`` for every step of full attention, then, for each method, ``compare`` for the same steps and ``result``.

    ``lengths``: how many steps each request has, the first ``skip`` of which say nothing. Steps are numbered from 0 and come in order.
    ``logits``: [B, vocab], before which the same tokens were seen by both; rows beyond the requests, and of requests that are at their
    end, are ignored.
    """

    def __init__(self, lengths: list[int], skip: list[int] | None = None):
        self.lengths = torch.tensor(lengths)
        self.skip = torch.tensor(skip) if skip else torch.zeros_like(self.lengths)
        self._full: list[torch.Tensor] = []
        self._begin()

    def reference(self, step: int, logits: torch.Tensor) -> None:
        """Keep full attention's logits of a step."""
        if step != len(self._full):
            raise ValueError(f"step {step} after {len(self._full)} steps")
        self._full.append(logits[: len(self.lengths)].to(torch.promote_types(logits.dtype, torch.float32), copy=True))

    def compare(self, step: int, logits: torch.Tensor) -> None:
        """Add a method's logits of a step."""
        if step != self._compared or step >= len(self._full):
            raise ValueError(f"step {step} after {self._compared} of {len(self._full)} steps")
        full, logits = self._full[step], logits[: len(self.lengths)]
        counts = (self.skip <= step) & (step < self.lengths)
        self._agreeing += torch.where(counts, top1(full, logits).cpu(), 0)
        self._nats += torch.where(counts, kl(full, logits).cpu(), 0.0)
        self._compared += 1

    def result(self) -> list[dict[str, float | None]]:
        """For each request, ``top1_agreement``: share of the steps with the same most likely token; ``kl_mean``: in nats. None without steps.

        The next method may begin.
        """
        steps = (self.lengths.clamp(max=self._compared) - self.skip).clamp(min=0)
        shares = zip(steps.tolist(), self._agreeing.tolist(), self._nats.tolist(), strict=True)
        found = [{"top1_agreement": same / n if n else None, "kl_mean": nats / n if n else None} for n, same, nats in shares]
        self._begin()
        return found

    def _begin(self) -> None:
        self._compared = 0
        self._agreeing = torch.zeros(len(self.lengths), dtype=torch.int64)
        self._nats = torch.zeros(len(self.lengths), dtype=torch.float64)


def top1(full: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Whether the most likely token is the same (of equals, the lowest id): bool [...] of logits [..., vocab]. No host synchronisation."""
    return _first_largest(full) == _first_largest(other)


def kl(full: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(full || other) in nats, [...] in float64, of logits [..., vocab]. Not negative; no host synchronisation.

    Tokens that full attention gives no chance (-inf) add nothing.
    """
    p, q = full.double().log_softmax(-1), other.double().log_softmax(-1)
    terms = torch.where(p.isneginf(), 0.0, p.exp() * (p - q))
    return terms.sum(-1).clamp(min=0)  # rounding alone is below 0


def _first_largest(logits: torch.Tensor) -> torch.Tensor:
    # argmax may return any of equal maxima, a different one on another device.
    return (logits == logits.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)
