"""How near a method stays to full attention along full attention's own text: next tokens, predictions, attention outputs.

Both are fed the same tokens (teacher forcing), so that a difference at one step is not the echo of an earlier one. Everything is added up
step by step; what is kept are full attention's logits of one example, in float32 on the host: steps * vocabulary * 4 bytes (128 tokens of
Llama-3: 66 MB), in blocks, because their number is not known before.
"""

import torch

_BLOCK = 64  # steps per block of kept logits


class Fidelity:
    """One example: ``reference`` for every step of full attention, then, for each method, ``compare`` for the same steps and ``result``.

    Steps are numbered from 0 and come in order. ``logits``: [vocab] or [1, vocab], before which the same tokens were seen by both.
    """

    def __init__(self):
        self._blocks: list[torch.Tensor] = []
        self.steps = 0
        self._begin()

    def reference(self, step: int, logits: torch.Tensor) -> None:
        """Keep full attention's logits of a step."""
        if step != self.steps:
            raise ValueError(f"step {step} after {self.steps} steps")
        row = step % _BLOCK
        if row == 0:
            self._blocks.append(torch.empty(_BLOCK, logits.numel(), dtype=torch.promote_types(logits.dtype, torch.float32)))
        self._blocks[-1][row] = logits.flatten()
        self.steps += 1

    def compare(self, step: int, logits: torch.Tensor) -> None:
        """Add a method's logits of a step."""
        if step != self._compared or step >= self.steps:
            raise ValueError(f"step {step} after {self._compared} of {self.steps} steps")
        full = self._blocks[step // _BLOCK][step % _BLOCK].to(logits.device)
        self._agreeing += top1(full, logits.flatten())
        self._nats += kl(full, logits.flatten())
        self._compared += 1

    def result(self) -> dict[str, float | None]:
        """``top1_agreement``: share of the steps with the same most likely token. ``kl_mean``: in nats. None without steps.

        The next method may begin.
        """
        n = self._compared
        found = {"top1_agreement": float(self._agreeing) / n if n else None, "kl_mean": float(self._nats) / n if n else None}
        self._begin()
        return found

    def _begin(self) -> None:
        self._compared, self._agreeing, self._nats = 0, 0, 0.0


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


class OutputError:
    """Relative error of attention outputs per layer: ||method - full|| / ||full||, norms over all heads, dimensions and steps.

    Streaming: the squares are added up in float64 on the device, nothing else is kept.
    """

    def __init__(self, layers: int, device: str | torch.device = "cpu"):
        self._error, self._norm = (torch.zeros(layers, dtype=torch.float64, device=device) for _ in range(2))

    def add(self, layer: int, full: torch.Tensor, other: torch.Tensor) -> None:
        """Outputs of one layer and step, any shape, for the same queries and the same keys and values."""
        self._error[layer] += (other.double() - full.double()).square().sum()
        self._norm[layer] += full.double().square().sum()

    def result(self) -> list[float | None]:
        """Per layer; None where full attention's output was nothing but zeros or nothing was added."""
        pairs = zip(self._error.tolist(), self._norm.tolist(), strict=True)
        return [(error / norm) ** 0.5 if norm else None for error, norm in pairs]


def _first_largest(logits: torch.Tensor) -> torch.Tensor:
    # argmax may return any of equal maxima, a different one on another device.
    return (logits == logits.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)
