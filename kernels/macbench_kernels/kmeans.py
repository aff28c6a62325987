"""k-means of several independent sets of points at once, in float32 (float64 for float64 points); torch operations for every device.

Shapes: points [H, n, d], centroids [H, k, d], labels int64 [H, n]. Random choices come from a generator on the host, so that they do
not depend on the device. Means are sums in whatever order the device adds.
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


def draw(points: torch.Tensor, k: int, generator: torch.Generator) -> torch.Tensor:
    """Indices int64 [H, k] of k distinct random points of each set."""
    chosen = [torch.randperm(points.shape[1], generator=generator)[:k] for _ in range(points.shape[0])]
    return torch.stack(chosen).to(points.device)


def take(points: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """points[h, index[h]]: [H, k, d]."""
    return points.gather(1, index[..., None].expand(-1, -1, points.shape[-1]))


def lloyd(points: torch.Tensor, centroids: torch.Tensor, iterations: int, generator: torch.Generator) -> torch.Tensor:
    """Centroids after ``iterations`` of assigning and averaging; an empty cluster starts again at a random point, or stays where it is in the end."""
    k = centroids.shape[1]
    # All at once: every transfer waits for the device.
    random = torch.randint(points.shape[1], (iterations - 1, *centroids.shape[:2]), generator=generator).to(points.device)
    for i in range(iterations):
        average, count = means(points, nearest(points, centroids), k)
        other = centroids if i == iterations - 1 else take(points, random[i])
        centroids = torch.where(count[..., None] > 0, average, other)
    return centroids
