"""What evicting methods share: per layer, request and set the list of tokens that are left, and how scores become such a list.

The lists are ids into the shared cache, which stays whole for other methods. A real system would move the survivors' rows together and read
them without a list, and nothing else of the cache; so these methods count the rows and no index.
"""

import torch
from macbench_kernels import Kernels


class Survivors:
    """ids int32 [layers, B, R, room], of which the first counts int32 [layers, B, R] are valid; R = Hkv, or Hq if every query head has its own.

    A request holds what was kept of its prompt and every later token, until ``room`` are held: from then on the next token takes the place
    that the method has named in ``freed`` int64 [layers, B, R]. All memory comes from the method's buffers; ``grow`` does not synchronise.
    """

    def __init__(self, method, sets: int, room: int):
        shape = method.shape
        lists = (shape.layers, shape.batch, sets)
        self.ids = method.buffer("survivors", *lists, room, dtype=torch.int32)
        self.slot = method.buffer("slot", *lists, dtype=torch.int64)  # where the newest token is
        self.counts = method.buffer("counts", *lists, dtype=torch.int32)
        self.rows = method.buffer("rows", shape.layers, shape.batch, shape.kv_heads, dtype=torch.int32)  # union of a group's sets
        self.freed = method.buffer("freed", *lists, dtype=torch.int64)  # the place that the next token takes, once there is no other
        # To be added to a request's length.
        self._offset = method.buffer("offset", shape.layers, shape.batch, 1, dtype=torch.int32)
        self._rows_offset = method.buffer("rows offset", shape.layers, shape.batch, shape.kv_heads, dtype=torch.int32)
        self._room = room

    def keep(self, layer: int | slice, request: int, kept: torch.Tensor, prompt: int) -> None:
        """Start a request with the tokens ``kept`` int [..., R, n], or [n] for all sets alike, of its ``prompt`` tokens, in one layer or several.

        Sets of a layer are of one size; where layers keep less than n, ids of ``prompt`` and above fill the rest.
        """
        held = self.ids[layer, request]
        kept = kept.expand(*held.shape[:-1], kept.shape[-1])
        known = kept < prompt
        held[..., : kept.shape[-1]] = torch.where(known, kept, 0)
        self._offset[layer, request] = known[..., :1, :].sum(-1).int() - prompt
        heads = self.rows.shape[2]
        order = kept.unflatten(-2, (heads, -1)).flatten(-2)  # the sets of a group
        if held.shape[-2] != heads:
            order = order.sort(-1).values
        fresh = (order < prompt).int()
        fresh[..., 1:] *= order[..., 1:] != order[..., :-1]
        self._rows_offset[layer, request] = fresh.sum(-1).int() - prompt

    def grow(self, lengths: torch.Tensor) -> None:
        """Give the newest token of every request its place, in all layers; lengths int32 [B]. Doing it twice changes nothing."""
        lengths = lengths[:, None]
        wanted = lengths + self._offset
        self.counts.copy_(wanted.clamp(0, self._room).expand_as(self.counts))
        self.rows.copy_((lengths + self._rows_offset).clamp(min=0))
        if self.rows.shape == self.counts.shape:
            torch.minimum(self.rows, self.counts, out=self.rows)
        self.slot.copy_(torch.where(wanted > self._room, self.freed, self.counts.long() - 1).clamp(min=0))
        self.ids.scatter_(-1, self.slot[..., None], (lengths - 1).expand_as(self.counts)[..., None])


def best(kernels: Kernels, scores: torch.Tensor, keep: int | list[int], beyond: int = 0) -> torch.Tensor:
    """Positions of the ``keep`` highest scores [..., n], ties to the lowest position, sorted by position: int64 [..., keep].

    A list of ``keep`` says how many of each scores[i]: rows are then as long as the largest of them, and end with ``beyond``.
    """
    each = [keep] if isinstance(keep, int) else keep
    alike = min(each) == max(each)
    ids, _ = kernels.top(scores, max(each), torch.ones((), dtype=torch.bool, device=scores.device), ordered=not alike)
    if not alike:
        rank = torch.arange(ids.shape[-1], device=ids.device)
        ids = torch.where(rank < torch.tensor(each, device=ids.device)[:, None, None], ids, beyond)
    return ids.long().sort(-1).values
