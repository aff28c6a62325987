"""Stands in for the ledger in tests that look at single reports."""

import torch

from tests.methods.driver import Batch


class Recorder:
    """Stands in for the ledger: remembers which K and V rows and how many bytes a step reports; ``muted``, it forgets a repeated step."""

    def __init__(self, batch: Batch):
        self.ledger, self.batch, self.muted = batch.ledger, batch, False
        self.clear()

    def clear(self):
        s, self.bytes, self.sets = self.batch.shape, {}, []
        longest = max(self.batch.lengths) + 1
        self.k, self.v = (torch.zeros(s.layers, s.batch, s.kv_heads, longest, dtype=torch.bool) for _ in range(2))

    def read(self, layer, spans):
        if self.muted:
            return
        group = self.batch.shape.group
        for start, stop in spans.tolist():
            for b in range(len(start)):
                for h, (first, end) in enumerate(zip(start[b], stop[b], strict=True)):
                    for rows in (self.k, self.v):
                        rows[layer, b, h // group, max(first, 0) : max(end, 0)] = True
        self.ledger.read(layer, spans)

    def selected(self, layer, ids, counts, unit, lengths, indexed=True, all_keys=False, rows=None, store=None):
        if self.muted:
            return
        sets = ids.shape[1]
        self.sets.append((ids, counts))
        for b, length in enumerate(lengths.tolist()):
            for r in range(sets):
                for i in ids[b, r, : counts[b, r]].tolist():
                    for found in (self.k, self.v):
                        found[layer, b, r * self.k.shape[2] // sets, i * unit : min((i + 1) * unit, length)] = True
            if all_keys:
                self.k[layer, b, :, :length] = True
        self.ledger.selected(layer, ids, counts, unit, lengths, indexed, all_keys, rows, store)

    def add(self, layer, category, per, units=1):
        if self.muted:
            return
        n = self.batch.shape.batch
        amounts = units.reshape(n, -1).sum(1).tolist() if isinstance(units, torch.Tensor) else [units] * n
        before = self.bytes.get((layer, category), [0] * n)
        self.bytes[layer, category] = [a + per * u for a, u in zip(before, amounts, strict=True)]
        self.ledger.add(layer, category, per, units)

    def __getattr__(self, name):
        return lambda *args, **options: None if self.muted else getattr(self.ledger, name)(*args, **options)
