"""Greedy texts with all their logits, and for MAC what every head matched at every step."""

from dataclasses import dataclass

import torch

from macbench.engine import Engine, Request
from macbench.methods.mac import MAC


@dataclass
class Steps:
    """A text of n tokens. ``logits`` float32 [n, vocab]: each token was chosen from its row.

    Of MAC, for the n - 1 decode steps (the first token comes from the prompt): ``sources`` int32 [n - 1, layers, Hq], the position of the entry
    that was reused, -1 where none was; ``distances`` float32, to the nearest entry; ``radius``.
    """

    tokens: list[int]
    logits: torch.Tensor
    sources: torch.Tensor | None = None
    distances: torch.Tensor | None = None
    radius: float | None = None


class Watched(MAC):
    """MAC that keeps what the heads of the latest step matched, by a match of its own before the step's."""

    def begin(self, shape, kernels, ledger):
        super().begin(shape, kernels, ledger)
        size = (shape.layers, shape.batch, shape.q_heads)
        self.sources, self.distances = self.buffer("sources", *size, dtype=torch.int32), self.buffer("distances", *size, dtype=torch.float32)

    def attend(self, layer, q_pre, q, cache):
        p = self.params
        found = self.kernels.match(q_pre, self.rings[layer], cache.lengths - 1, p.radius, p.sink + p.band, p.max_chain, p.min_context)
        self.sources[layer].copy_(found.source)
        self.distances[layer].copy_(found.distance)
        return super().attend(layer, q_pre, q, cache)

    def _report(self, layer, step):
        self.sources[layer].masked_fill_(~step.hit, -1)
        super()._report(layer, step)


def decoded(
    network, prompts: list[list[int]], method, new_tokens: list[int], ctx: int, size: int, graph: bool, invariant: bool, layer_kernels
) -> list[Steps]:
    """Every prompt continued by its number of ``new_tokens``, ``size`` of them in step."""
    engine = Engine(network, layer_kernels, ctx, batch=size, graph=graph, batch_invariant=invariant)
    made = []
    for start in range(0, len(prompts), size):
        ready = [engine.prefill(list(ids), method.prompt_queries) for ids in prompts[start : start + size]]
        logits, matches = [torch.stack([p.logits for p in ready])], []

        def watch(step, now, logits=logits, matches=matches):
            logits.append(now.float().clone())
            if isinstance(method, Watched):
                matches.append((method.sources.clone(), method.distances.clone()))

        requests = [Request(p, n) for p, n in zip(ready, new_tokens[start : start + size], strict=True)]
        done = engine.decode_batch(requests, method, watch=watch)
        parts = [torch.stack(part, 2).permute(1, 2, 0, 3) for part in zip(*matches, strict=True)]  # [B, steps, layers, Hq]
        for i, generation in enumerate(done):
            n = len(generation.tokens)  # the batch may have gone on
            own = (*(part[i, : n - 1] for part in parts), method.params.radius) if parts else ()
            made.append(Steps(generation.tokens, torch.stack([step[i] for step in logits[:n]]), *own))
        for prompt in ready:
            prompt.free()
    return made
