"""The inputs of one benchmark cell: caches and rings larger than the L2 cache, and a stream of queries with a chosen hit rate."""

from dataclasses import dataclass, replace

import torch
from macbench_kernels import MacParams, PagedKVCache, PagePool, Ring

# The calls of a round must together read this many times the L2 cache, so that nothing is warm by accident.
L2_ROUNDS = 4
# Rings of a round: even where one call alone outgrows the L2 cache, and at most.
LEAST_RINGS, MOST_RINGS = 3, 48
# Distance of a synthetic hit from its row, per channel; a far query is an independent normal vector, about sqrt(2 d) away.
_NEAR = 0.02


@dataclass(frozen=True)
class Cell:
    """Sizes of one attention call, and MAC's knobs (see macbench.methods.mac).

    ``ctx``: visible tokens of every request at the first step; ``max_gap``: synthetic hits lie 1 to max_gap back.
    """

    q_heads: int
    kv_heads: int
    batch: int
    ctx: int
    head_dim: int = 128
    page_size: int = 16
    window: int = 512
    band: int = 256
    tau: float = 0.45
    sink: int = 0
    min_context: int = 0
    max_chain: int | None = None
    max_gap: int = 64
    dtype: torch.dtype = torch.bfloat16
    scattered: bool = False

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def params(self) -> MacParams:
        return MacParams(self.tau * (2 * self.head_dim) ** 0.5, self.band, self.sink, self.min_context, self.max_chain)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def cache_bytes(self) -> int:
        """K and V of one layer at the first step."""
        return self.batch * self.kv_heads * self.ctx * 2 * self.head_dim * self.itemsize

    @property
    def hit_bytes(self) -> int:
        """What a step reads at the very least: all ring queries, and band and sinks of every KV head."""
        ring = self.batch * self.q_heads * self.window * self.head_dim * self.itemsize
        return ring + self.batch * self.kv_heads * (self.band + self.sink) * 2 * self.head_dim * self.itemsize

    @property
    def ring_bytes(self) -> int:
        """Memory of one layer's ring."""
        return self.batch * self.q_heads * self.window * (self.head_dim * (self.itemsize + 4) + 8)


def rotation(cell: Cell, windows: tuple[int, ...], l2_bytes: int, free_bytes: int) -> tuple[int, int]:
    """(caches, rings) through which the calls of a round rotate; a round makes one call per ring, each with its own queries.

    So many that a round flushes the L2 cache even if everything hits. Every ring has a cache of its own as far as memory goes, else
    call i reads cache i % caches. (On an H100 that happens at 32/8 heads, batch 64 and 127K: one cache is 34 GB, and each of the calls
    that share it reads six times what L2 holds.)
    """
    least, most = (replace(cell, window=choose(windows)) for choose in (min, max))
    wanted = min(max(LEAST_RINGS, -(-L2_ROUNDS * l2_bytes // least.hit_bytes)), MOST_RINGS)
    memory = 0.8 * free_bytes
    each = 2 * most.ring_bytes  # the ring, its queries of all steps, and a share of the copies that are made to check results
    rings = int(max(1, min(wanted, memory / 2 // each)))
    return int(max(1, min(rings, (memory - rings * each) // cell.cache_bytes))), rings


class Problem:
    """A filled cache of ``layers`` layers for ``steps`` decode steps, shared by all methods of a cell.

    A round of MAC makes ``rings`` calls (at least as many as there are layers, which is the default), full attention one per layer.
    ``q`` [rings, B, Hq, d]: queries after RoPE.
    """

    def __init__(self, cell: Cell, device: str, layers: int, steps: int, seed: int, rings: int | None = None):
        self.cell, self.device, self.layers, self.steps = cell, device, layers, steps
        self.rings = rings or layers
        self.generator = torch.Generator(device).manual_seed(seed)
        pages = cell.batch * -(-(cell.ctx + steps) // cell.page_size)
        pool = PagePool(layers, cell.kv_heads, cell.head_dim, pages, cell.page_size, cell.dtype, device)
        for storage in (pool.k, pool.v):
            for layer in storage:
                layer.normal_(generator=self.generator)
        self.cache = PagedKVCache(pool, cell.batch)
        self.cache.reserve(cell.ctx + steps)
        if cell.scattered:
            order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed)).int()
            self.cache.block_table = order.to(device)[self.cache.block_table.long()].contiguous()
            self.cache.tables = self.cache.block_table.tolist()
        self.rewind()
        self.q = self.normal(self.rings, cell.batch, cell.q_heads, cell.head_dim)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device, dtype=torch.float32).to(self.cell.dtype)

    def layer(self, call: int) -> int:
        """Which layer of the cache a call of a round reads."""
        return call % self.layers

    def rewind(self) -> None:
        """Every request sees ``ctx`` tokens again."""
        self.cache.lengths.fill_(self.cell.ctx)
        self.cache.host_lengths = [self.cell.ctx] * self.cell.batch

    def advance(self) -> None:
        """One token more for every request. In a captured step only the device's lengths go on growing, and kernels need no others."""
        self.cache.lengths += 1
        self.cache.host_lengths = [n + 1 for n in self.cache.host_lengths]


class Stream:
    """Rings and pre-RoPE queries of all steps, in which exactly a share of the query heads finds a near row.

    ``queries`` [steps, rings, B, Hq, d]; ``hits`` bool [steps, rings, B, Hq]: which heads find one. ``misses``: 'random' draws the
    missing heads anew for every step and ring; 'clustered' lets whole groups miss, as far as the number allows. The rows that hits
    find follow from the stream itself: a hit repeats, with a little noise, the query of 1 to max_gap steps before.
    """

    def __init__(self, problem: Problem, hit_rate: float, misses: str, rings: list[Ring] | None = None):
        cell, steps = problem.cell, problem.steps
        shape = (problem.rings, cell.batch, cell.q_heads)
        generator, device, window = problem.generator, problem.device, cell.window
        history = torch.empty(window + steps, *shape, cell.head_dim, dtype=cell.dtype, device=device)
        for row in history[:window]:
            row.copy_(problem.normal(*row.shape))
        self.hits = torch.empty(steps, *shape, dtype=torch.bool, device=device)
        each, request, head = torch.meshgrid(*(torch.arange(n, device=device) for n in shape), indexing="ij")
        missing = round((1 - hit_rate) * cell.batch * cell.q_heads)
        for step in range(steps):
            gap = torch.randint(1, min(cell.max_gap, window) + 1, shape, generator=generator, device=device)
            near = history[window + step - gap, each, request, head]
            noise = problem.normal(*near.shape)
            self.hits[step] = ~_missing(shape, cell, missing, misses, generator, device)
            history[window + step] = torch.where(self.hits[step, ..., None], near + _NEAR * noise, noise)
        self.queries = history[window:]
        self.rings = rings or [Ring.create(cell.batch, cell.q_heads, window, cell.head_dim, cell.dtype, device) for _ in range(problem.rings)]
        rows = torch.arange(cell.ctx - 1 - window, cell.ctx - 1, device=device) % window
        for i, ring in enumerate(self.rings):
            ring.q[:, :, rows] = history[:window, i].permute(1, 2, 0, 3)
            ring.out.normal_(generator=generator)
            ring.lse.uniform_(5, 7, generator=generator)
            ring.depth.zero_()


def _missing(shape, cell: Cell, count: int, misses: str, generator, device) -> torch.Tensor:
    """bool [rings, B, Hq] with ``count`` heads missing in every call."""
    rings, batch, heads = shape
    group = heads // cell.kv_heads
    if misses == "random":
        rank = torch.rand(rings, batch * heads, generator=generator, device=device).argsort(-1).argsort(-1)
    else:
        rank = torch.rand(rings, batch * cell.kv_heads, generator=generator, device=device).argsort(-1).argsort(-1)
        rank = (rank[..., None] * group + torch.arange(group, device=device)).flatten(1)
    return (rank < count).view(rings, batch, heads)


def some_requests(cache: PagedKVCache, chosen: list[int]) -> PagedKVCache:
    """The same pages seen as a smaller batch; for comparing a few requests with a reference."""
    small = PagedKVCache(cache.pool, len(chosen))
    small.tables = [cache.tables[i] for i in chosen]
    lengths = cache.lengths.tolist()
    small.host_lengths = [lengths[i] for i in chosen]
    small._refresh_device()
    return small


def some_rows(ring: Ring, chosen: list[int]) -> Ring:
    """A copy of the rings of some requests."""
    return Ring(*(x[chosen].clone() for x in (ring.q, ring.out, ring.lse, ring.depth)))
