"""A paged KV cache: one pool of pages for all layers, sequences that share pages and copy on write.

Layout of each of K and V: [layers, kv_heads, pages, page_size, head_dim]. Pages of one head lie next to each other, so a run of
consecutive pages is a plain [kv_heads, tokens, head_dim] view (no gather on the CPU), and one page of one head is one
contiguous block (a single wide load on the GPU).
"""

import heapq

import torch


class OutOfPages(RuntimeError):
    """The pool has no page left."""


class PagePool:
    """Storage and reference counts of pages. A page id names the same page in every layer.

    Allocation takes the lowest free ids first, so that prompts stay contiguous.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, pages: int, page_size: int = 16, dtype=torch.float32, device="cpu"):
        if page_size < 1 or pages < 1:
            raise ValueError(f"page_size={page_size}, pages={pages}: both must be at least 1")
        shape = (layers, kv_heads, pages, page_size, head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.layers, self.kv_heads, self.pages, self.page_size, self.head_dim = shape
        self._refs = [0] * pages
        self._free = list(range(pages))

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """Id of a free page, now referenced once."""
        if not self._free:
            raise OutOfPages(f"all {self.pages} pages of {self.page_size} tokens are in use")
        page = heapq.heappop(self._free)
        self._refs[page] = 1
        return page

    def share(self, page: int) -> None:
        self._refs[page] += 1

    def shared(self, page: int) -> bool:
        return self._refs[page] > 1

    def release(self, page: int) -> None:
        self._refs[page] -= 1
        if self._refs[page] == 0:
            heapq.heappush(self._free, page)

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page's keys and values in all layers."""
        self.k[:, :, target] = self.k[:, :, source]
        self.v[:, :, target] = self.v[:, :, source]


class PagedKVCache:
    """The KV cache of a batch of B requests in a pool.

    One step is: ``extend(n)`` once (makes room, lengths grow by n, the new tokens count as visible), then ``append(layer, k, v)``
    for every layer, then reads. Device tensors for kernels: ``block_table`` int32 [B, max_pages], ``lengths`` int32 [B].
    """

    def __init__(self, pool: PagePool, batch: int = 1):
        self.pool = pool
        self.tables: list[list[int]] = [[] for _ in range(batch)]
        self.host_lengths = [0] * batch
        self._refresh_device()

    # -- layout -------------------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        return len(self.tables)

    @property
    def page_size(self) -> int:
        return self.pool.page_size

    def keys(self, layer: int) -> torch.Tensor:
        """[kv_heads, pages, page_size, head_dim], the whole pool of a layer."""
        return self.pool.k[layer]

    def values(self, layer: int) -> torch.Tensor:
        """[kv_heads, pages, page_size, head_dim], the whole pool of a layer."""
        return self.pool.v[layer]

    def runs(self, request: int) -> list[tuple[int, int, int]]:
        """Maximal contiguous pieces of a request as (first token, end token, first pool slot), from the host's copy of the table."""
        if request not in self._runs:
            out: list[tuple[int, int, int]] = []
            size = self.page_size
            for index, page in enumerate(self.tables[request]):
                start, slot = index * size, page * size
                if out and out[-1][2] + (start - out[-1][0]) == slot:
                    out[-1] = (out[-1][0], start + size, out[-1][2])
                else:
                    out.append((start, start + size, slot))
            self._runs[request] = out
        length = self.host_lengths[request]
        return [(a, min(b, length), slot) for a, b, slot in self._runs[request] if a < length]

    def slice(self, layer: int, request: int, start: int, stop: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Views (k, v), each [kv_heads, n, head_dim], that together are exactly the tokens [start, stop) of a request; nothing is copied."""
        k, v = self.pool.k[layer].flatten(1, 2), self.pool.v[layer].flatten(1, 2)
        pieces = []
        for a, b, slot in self.runs(request):
            lo, hi = max(a, start), min(b, stop)
            if lo < hi:
                here = slice(slot + lo - a, slot + hi - a)
                pieces.append((k[:, here], v[:, here]))
        return pieces

    # -- writing ------------------------------------------------------------------------------------------------------

    def reserve(self, tokens: int) -> None:
        """Make sure every request owns writable pages for ``tokens`` more tokens; block tables then stay as they are until those are used."""
        changed = False
        for request, table in enumerate(self.tables):
            length = self.host_lengths[request]
            first = length // self.page_size
            if length % self.page_size and self.pool.shared(table[first]):
                page = self.pool.take()
                self.pool.copy_page(table[first], page)
                self.pool.release(table[first])
                table[first] = page
                changed = True
            needed = -(-(length + tokens) // self.page_size)
            while len(table) < needed:
                table.append(self.pool.take())
                changed = True
        if changed:
            self._refresh_device()

    def extend(self, tokens: int) -> None:
        """Grow every request by ``tokens``; their K and V follow by ``append`` in every layer."""
        self.reserve(tokens)
        self.host_lengths = [n + tokens for n in self.host_lengths]
        self.lengths += tokens
        position = self.lengths[:, None] - tokens + torch.arange(tokens, device=self.lengths.device)
        page = self.block_table.gather(1, (position // self.page_size).long())
        self._slots = (page * self.page_size + position % self.page_size).flatten().long()

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write the K and V of the tokens of the last ``extend``: k, v [B, kv_heads, n, head_dim], keys after RoPE."""
        for pool, new in ((self.pool.k[layer], k), (self.pool.v[layer], v)):
            pool.flatten(1, 2).index_copy_(1, self._slots, new.transpose(0, 1).flatten(1, 2))

    # -- sharing ------------------------------------------------------------------------------------------------------

    def fork(self) -> "PagedKVCache":
        """A second cache with the same content: pages are shared, the partly filled one is copied when either side writes to it."""
        other = PagedKVCache.__new__(PagedKVCache)
        other.pool = self.pool
        keep = [-(-n // self.page_size) for n in self.host_lengths]
        other.tables = [table[:pages] for table, pages in zip(self.tables, keep, strict=True)]
        other.host_lengths = list(self.host_lengths)
        for table in other.tables:
            for page in table:
                self.pool.share(page)
        other._refresh_device()
        return other

    def free(self) -> None:
        """Give all pages back; the cache is empty afterwards and can be used again."""
        for table in self.tables:
            for page in table:
                self.pool.release(page)
        self.tables = [[] for _ in self.tables]
        self.host_lengths = [0] * len(self.tables)
        self._refresh_device()

    def _refresh_device(self) -> None:
        self._runs: dict[int, list[tuple[int, int, int]]] = {}
        width = max(1, max(map(len, self.tables)))
        padded = [table + [0] * (width - len(table)) for table in self.tables]
        device = self.pool.k.device
        self.block_table = torch.tensor(padded, dtype=torch.int32, device=device)
        self.lengths = torch.tensor(self.host_lengths, dtype=torch.int32, device=device)
