"""The ring of MAC-Attention: the last K queries of every head with the attention state each of them left behind."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from macbench_kernels.state import State, empty_state


class Match(NamedTuple):
    """Result of a ring match, each [batch, q_heads].

    ``slot`` int64: ring row of the nearest eligible entry (0 if there is none). ``source`` int32: its position in the text.
    ``distance``: L2 distance to it (inf if there is none). ``hit`` bool: distance below the radius.
    """

    slot: torch.Tensor
    source: torch.Tensor
    distance: torch.Tensor
    hit: torch.Tensor


@dataclass
class Ring:
    """Row ``position % capacity`` holds the entry of ``position``; a row is overwritten capacity steps later.

    ``q``: [batch, q_heads, capacity, head_dim] pre-RoPE queries in the model's precision. ``out``, ``lse``: their states
    [batch, q_heads, capacity(, head_dim)] in float32 (float64 for a float64 model). ``depth``: int32, how many reuses the state is built on.
    """

    q: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    depth: torch.Tensor

    @classmethod
    def create(cls, batch: int, q_heads: int, capacity: int, head_dim: int, dtype: torch.dtype, device) -> "Ring":
        rows = (batch, q_heads, capacity)
        precise = torch.promote_types(dtype, torch.float32)
        return cls(
            torch.zeros(*rows, head_dim, dtype=dtype, device=device),
            torch.zeros(*rows, head_dim, dtype=precise, device=device),
            torch.full(rows, float("-inf"), dtype=precise, device=device),
            torch.zeros(rows, dtype=torch.int32, device=device),
        )

    @property
    def capacity(self) -> int:
        return self.q.shape[2]

    def only(self, request: int) -> "Ring":
        """The ring of one request; nothing is copied."""
        row = slice(request, request + 1)
        return Ring(self.q[row], self.out[row], self.lse[row], self.depth[row])

    def clear(self, request: int) -> None:
        """Forget all entries of a request."""
        for part, empty in ((self.q, 0), (self.out, 0), (self.lse, float("-inf")), (self.depth, 0)):
            part[request] = empty

    def fill(self, request: int, q: torch.Tensor, state: State, first: int) -> None:
        """Exact entries of a prompt's last n <= capacity queries, of positions from ``first``; no others: q, state.out [1, q_heads, n, head_dim]."""
        self.clear(request)
        rows = torch.arange(first, first + q.shape[2], device=q.device) % self.capacity
        self.q[request, :, rows] = q[0]
        self.out[request, :, rows] = state.out[0].to(self.out.dtype)
        self.lse[request, :, rows] = state.lse[0].to(self.lse.dtype)

    def read(self, slot: torch.Tensor, wanted: torch.Tensor) -> tuple[State, torch.Tensor]:
        """State (out [batch, q_heads, head_dim], lse [batch, q_heads]) and depth of one row per head.

        slot int64, wanted bool: [batch, q_heads]. Heads that do not want theirs get the empty state and depth 0;
        nothing of the ring is read for them, which takes a look at ``wanted`` on the host.
        """
        request, head = wanted.nonzero(as_tuple=True)
        row = slot[request, head]
        state = empty_state(tuple(slot.shape), self.out.shape[-1], self.out.dtype, self.out.device)
        state.out[request, head] = self.out[request, head, row]
        state.lse[request, head] = self.lse[request, head, row]
        depth = torch.zeros_like(slot, dtype=torch.int32)
        depth[request, head] = self.depth[request, head, row]
        return state, depth

    def write(self, position: torch.Tensor, q: torch.Tensor, state: State, depth: torch.Tensor) -> None:
        """Write the entries of one step: position int [batch], q [batch, q_heads, head_dim]."""
        request = torch.arange(len(position), device=position.device)
        row = (position % self.capacity).long()
        self.q[request, :, row] = q
        self.out[request, :, row] = state.out
        self.lse[request, :, row] = state.lse
        self.depth[request, :, row] = depth


def slot_positions(position: torch.Tensor, capacity: int) -> torch.Tensor:
    """Which position each row holds just before ``position`` is written: int [batch, capacity], negative where nothing was written."""
    last = position[:, None] - 1
    rows = torch.arange(capacity, device=position.device)[None]
    return last - (last - rows) % capacity


def scanned_rows(position: torch.Tensor, capacity: int, min_context: int) -> torch.Tensor:
    """How many rows a match at ``position`` reads, int [batch]: those that were written, or none below ``min_context`` visible tokens."""
    return position.clamp(0, capacity) * (position + 1 >= min_context)
