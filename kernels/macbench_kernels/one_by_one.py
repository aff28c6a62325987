"""Attention of a batch request by request: what a request gets does not depend on who decodes beside it, to the last bit.

A launch for a whole batch shares the tiles of all its requests out evenly, so where a request's keys are cut, and with that the order of its
sums, follows from the others' lengths. A launch of its own is that of a batch of one. It costs launches: as many a layer as there are
requests. Long contexts hardly notice, short ones do.
"""

from dataclasses import fields, replace

import torch

from macbench_kernels.cache import PagedKVCache
from macbench_kernels.dispatch import Kernels, UnsupportedError
from macbench_kernels.mac import MacParams, MacStep
from macbench_kernels.ring import Ring
from macbench_kernels.state import State

# Prefill has one request anyway; a match is a minimum, which is exact however a ring is split.
_AS_THEY_ARE = ("name", "captures", "plan", "causal", "column_sums", "match")


def one_by_one(base: Kernels) -> Kernels:
    """The kernels of ``base`` for ``attend``, ``full`` and ``mac_step``, a call for each request; what else decodes raises UnsupportedError."""
    if base.plan is not None:
        raise UnsupportedError(f"backend={base.name}: plans a step for the whole batch; request by request go triton and torch")

    def attend(q: torch.Tensor, cache: PagedKVCache, layer: int, spans: torch.Tensor, scale: float) -> State:
        parts = [base.attend(q[i : i + 1], cache.only(i), layer, spans[:, :, i : i + 1], scale) for i in range(len(q))]
        return State(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))

    def full(q: torch.Tensor, cache: PagedKVCache, layer: int, scale: float) -> torch.Tensor:
        return torch.cat([base.full(q[i : i + 1], cache.only(i), layer, scale) for i in range(len(q))])

    def mac_step(q_pre: torch.Tensor, q: torch.Tensor, cache: PagedKVCache, layer: int, ring: Ring, params: MacParams, scale: float) -> MacStep:
        parts = [base.mac_step(q_pre[i : i + 1], q[i : i + 1], cache.only(i), layer, ring.only(i), params, scale)._asdict() for i in range(len(q))]
        return MacStep(**{name: torch.cat([part[name] for part in parts], 2 if name == "spans" else 0) for name in MacStep._fields})

    def refuse(*args, **kwargs):
        raise UnsupportedError("request by request (batch_invariant) go only full attention, attention over spans and MAC's step")

    own = {"attend": attend, "full": full, "mac_step": mac_step}
    others = {field.name: refuse for field in fields(base) if field.name not in (*own, *_AS_THEY_ARE)}
    return replace(base, **own, **others)
