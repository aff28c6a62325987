"""Which parts of a method's state a step did not report as read: (tensor, mask) pairs.

They may note in the recorder which rows of the cache were read.
"""

import torch

from macbench.methods.kivi import KIVI


def spoil_quest(m, recorder, batch):
    """Bounds of the pages that were not scored; that of the newest page is open for writing."""
    pairs = []
    for layer, bounds in m.bounds.items():
        per_page = m.shape.kv_heads * m.shape.kv_row_bytes
        scored = torch.tensor(recorder.bytes[layer, "meta"]) // per_page
        index = torch.arange(bounds.shape[-1])
        newest = (torch.tensor(batch.lengths) - 1) // m.page
        pairs.append((bounds, ((index >= scored[:, None]) & (index != newest[:, None]))[:, None, None].to(bounds.device)))
    return pairs


def spoil_survivors(m, recorder, batch):
    """Ids of places that hold no token."""
    left = m.survivors
    return [(left.ids, torch.arange(left.ids.shape[-1], device=left.ids.device) >= left.counts[..., None])]


def spoil_codes(m, recorder, batch):
    """Parameters of groups that hold no token yet. Of the cache, only what is not stored as codes is read, and what this step turns into codes."""
    pairs = []
    for b, length in enumerate(batch.lengths):
        stops = [x.item() for x in m._stops(torch.tensor(length))] if isinstance(m, KIVI) else (length - 1, length - 1)
        recorder.k[:, b, :, stops[0] : length] = True
        recorder.v[:, b, :, max(0, stops[1] - 1) : length] = True
        for codes in (side for layer in m.codes for side in layer):
            unused = torch.arange(codes.scale.shape[2], device=codes.scale.device)[:, None] * codes.scheme.tokens >= length
            pairs += [(x[b], unused) for x in (codes.scale, codes.zero) if x is not None]
    return pairs


def spoil_multipole(m, recorder, batch):
    """Centroids that do not exist or whose request is dense; value centroids of near clusters as well, known by their tokens."""
    pairs = []
    index = torch.arange(m.counts[0].shape[-1])
    for layer, (ids, counts) in enumerate(recorder.sets):
        unread = ~((index < m._scored.cpu()[:, None])[:, None].expand(m.counts[0].shape))
        near = unread.clone()
        for b, g in [(b, g) for b in range(ids.shape[0]) for g in range(ids.shape[1])]:
            tokens = set(ids[b, g, : counts[b, g]].tolist())
            for i in range(int(m.clusters[b])):
                near[b, g, i] |= int(m.members[layer][b, g, m.starts[layer][b, g, i]]) in tokens
        pairs += [(m.centroids[layer], unread[:, :, None].to(ids.device)), (m.values[layer], near[..., None].to(ids.device))]
    return pairs


def spoil_rocket(m, recorder, batch):
    """Bounds of chunks that were not estimated, and of channels that were not chosen; those of the newest chunk are open for writing."""
    pairs = []
    for layer, bounds in enumerate(m.bounds):
        per_chunk = m.shape.kv_heads * m.size.channels * 2
        scored = torch.tensor(recorder.bytes[layer, "meta"]) // per_chunk
        chunk = torch.arange(bounds.shape[-1])
        newest = (chunk == (torch.tensor(batch.lengths) - m.removed.cpu() - 1)[:, None] // m.size.chunk)[:, None, None]
        grouped = batch.queries(layer)[1].unflatten(1, (m.shape.kv_heads, -1)).cpu()
        chosen = torch.zeros(grouped.shape[0], grouped.shape[1], m.shape.head_dim, dtype=torch.bool)
        chosen.scatter_(-1, grouped.abs().mean(2).topk(m.size.channels).indices, True)
        if bounds.shape[2] > m.shape.head_dim:
            up = grouped.sum(2) > 0
            chosen = torch.cat([chosen & up, chosen & ~up], -1)
        read = (chunk < scored[:, None])[:, None, None] & chosen[..., None]
        pairs.append((bounds, (~read & ~newest).to(bounds.device)))
    return pairs
