"""k-means of several independent sets of points at once, in float32 (float64 for float64 points); torch operations for every device.

Shapes: points [H, n, d], centroids [H, k, d], labels int64 [H, n]. Random choices are made on the host, so that they do not depend on the
device. Means are sums in whatever order the device adds.
"""

import torch

# Distances that are held at once.
_MOST_DISTANCES = 1 << 26


def nearest(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Label of the nearest centroid (Euclidean) of every point."""
    offset = (centroids * centroids).sum(-1)[:, None]
    rows = max(1, _MOST_DISTANCES // (centroids.shape[0] * centroids.shape[1]))
    # |p - c|^2 without the |p|^2 that all centroids share.
    return torch.cat([torch.baddbmm(offset, piece, centroids.mT, alpha=-2).argmin(-1) for piece in points.split(rows, 1)], 1)


def means(rows: torch.Tensor, labels: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of the rows [H, n, d] of every label, [H, k, d] (0 where there are none), and their number, int64 [H, k]."""
    total = torch.zeros(rows.shape[0], k, rows.shape[2], dtype=rows.dtype, device=rows.device)
    total.scatter_add_(1, labels[..., None].expand_as(rows), rows)
    count = torch.zeros(labels.shape[0], k, dtype=torch.int64, device=rows.device).scatter_add_(1, labels, torch.ones_like(labels))
    return total / count.clamp(min=1)[..., None], count


def draw(sets: int, n: int, k: int, generator: torch.Generator) -> torch.Tensor:
    """Indices int64 [sets, k] of k distinct random points of n for each set, on the host."""
    return torch.stack([torch.randperm(n, generator=generator)[:k] for _ in range(sets)])


def take(points: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """points[h, index[h]]: [H, k, d]."""
    return points.gather(1, index[..., None].expand(-1, -1, points.shape[-1]))


def lloyd(points: torch.Tensor, centroids: torch.Tensor, anew: torch.Tensor) -> torch.Tensor:
    """Centroids after one more iteration of assigning and averaging than ``anew`` has rows. An empty cluster starts again at the point that its
    row of ``anew`` int [iterations - 1, H, k] names, or stays where it is in the end."""
    for row in [*anew.to(points.device).long(), None]:
        average, count = means(points, nearest(points, centroids), centroids.shape[1])
        other = centroids if row is None else take(points, row)
        centroids = torch.where(count[..., None] > 0, average, other)
    return centroids
