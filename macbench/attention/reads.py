"""What the timed calls of MAC read: the mean over their own spans and hits."""

import torch
from macbench_kernels import MacStep, scanned_rows

from macbench.attention.problem import Cell
from macbench.counting import span_tokens


class Reads:
    """Spans and hits of timed rounds, copied on the device while the clock stands still."""

    def __init__(self):
        self.rounds: list[int] = []
        self._spans: list[torch.Tensor] = []
        self._hits: list[torch.Tensor] = []

    def keep(self, i: int, steps: list[MacStep]) -> None:
        """The steps of round i, one per call. A graph writes the next round's into the same tensors, hence the copies."""
        self.rounds.append(i)
        self._spans.append(torch.stack([step.spans for step in steps]))
        self._hits.append(torch.stack([step.hit for step in steps]))

    def counts(self, cell: Cell, intended: torch.Tensor) -> dict:
        """Means per call, in tokens and bytes; ``intended`` bool [steps, calls, B, Hq]: which heads the synthetic stream lets hit.

        Raises RuntimeError if other heads hit: then the row would stand for another hit rate than it says.
        """
        hits = torch.stack(self._hits)
        wrong = int((hits != intended[self.rounds]).sum())
        if wrong:
            raise RuntimeError(f"{wrong} of {hits.numel()} heads of the timed rounds hit or miss otherwise than the synthetic stream intends")
        calls = hits.shape[0] * hits.shape[1]
        tokens = int(span_tokens(torch.stack(self._spans).cpu().numpy(), cell.kv_heads)[1].sum()) / calls
        kv = tokens * 2 * cell.head_dim * cell.itemsize
        row = cell.head_dim * cell.itemsize + (4 if cell.max_chain is not None else 0)
        position = cell.ctx - 1 + torch.tensor(self.rounds)
        scanned = float(scanned_rows(position, cell.window, cell.min_context).double().mean())
        state = cell.batch * cell.q_heads * scanned * row + int(hits.sum()) / calls * (cell.head_dim * 4 + 8)
        return {
            "hit_rate_measured": float(hits.double().mean()), "kv_tokens": round(tokens),
            "bytes_read": round(kv + state), "bytes_kv": round(kv), "bytes_state": round(state),
        }  # fmt: skip
