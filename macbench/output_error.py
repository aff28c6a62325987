"""How far a method's attention outputs are from full attention's, layer by layer, while it decodes."""

from dataclasses import dataclass, replace
from itertools import chain

import torch

from macbench.counting import PAGE
from macbench.methods.base import Method


@dataclass
class Measured(Method):
    """``method`` as it is, and beside each of its attention outputs o that of full attention, o*, for the same query over the same cache.

        error of a layer = sqrt(sum ||o - o*||^2 / sum ||o*||^2),   norms over query heads and dimensions, sums over decode steps

    The inputs are those of the method's own run: its query, the prompt's exact K and V, and those of later tokens as its own hidden states
    made them. So this is what the attention of one layer adds, given the same inputs; what it inherits from the layers below is not in it
    (the KL of the logits holds both). What a method evicted or quantised is still in the cache as it was, and full attention reads that.

    Nothing that ``method`` knows changes: full attention runs after it, reports to no ledger and keeps nothing. It takes time, so steps
    measured like this are not timed, and pages can be counted in them (``tokens_page``). ``skip``: steps of each request that are not added
    up (none, where the list ends).
    """

    method: Method
    skip: tuple[int, ...] = ()
    counted_page = PAGE

    @property
    def prompt_queries(self):
        return self.method.prompt_queries

    @property
    def prompt_column_sums(self):
        return self.method.prompt_column_sums

    def part(self, shape, before):
        return replace(self, method=self.method.part(shape, before and before.method))

    def begin(self, shape, kernels, ledger):
        super().begin(shape, kernels, ledger)
        self.method.begin(shape, kernels, ledger)
        self.steps = [0] * shape.batch
        self.counted = self.buffer("counted", shape.batch, dtype=torch.bool)
        self.squares = self.buffer("squares", 2, shape.layers, shape.batch, dtype=torch.float64)  # of the error, of full attention

    def forget(self):
        self.method.forget()
        super().forget()

    def after_prompt(self, request, queries, cache):
        self.method.after_prompt(request, queries, cache)

    def save(self):
        return self.method.save()

    def restore(self, saved):
        self.method.restore(saved)

    def between_steps(self, cache):
        self.method.between_steps(cache)
        if self.kernels.plan is not None:
            self.kernels.plan(cache, self.shape.q_heads, self.shape.scale)
        skip = [*self.skip, *[0] * self.shape.batch]
        self.counted.copy_(torch.tensor([active and n >= s for active, n, s in zip(cache.active, self.steps, skip, strict=False)]))
        self.steps = [n + active for n, active in zip(self.steps, cache.active, strict=True)]

    def attend(self, layer, q_pre, q, cache):
        out = self.method.attend(layer, q_pre, q, cache)
        exact = self.kernels.full(q, cache, layer, self.shape.scale).double()
        squares = torch.stack([(out.double() - exact).square().sum((1, 2)), exact.square().sum((1, 2))])
        self.squares[:, layer] += torch.where(self.counted, squares, 0)  # rows without a token hold anything
        return out

    def errors(self) -> list[list[float | None]]:
        """Per request and layer; None where full attention's outputs were nothing but zeros or no step was counted."""
        if self.parts:
            return [list(chain(*each)) for each in zip(*(part.errors() for part in self.parts), strict=True)]
        error, norm = self.squares.transpose(1, 2).tolist()
        return [[(e / n) ** 0.5 if n else None for e, n in zip(*pair, strict=True)] for pair in zip(error, norm, strict=True)]
