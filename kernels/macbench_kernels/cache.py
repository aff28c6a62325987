"""A paged KV cache: one pool of pages for all layers, sequences that share pages and copy on write.

Layout of each of K and V: [layers, kv_heads, pages, page_size, head_dim]. Pages of one head lie next to each other, so a run of
consecutive pages is a plain [kv_heads, tokens, head_dim] view (no gather on the CPU), and one page of one head is one
contiguous block (a single wide load on the GPU).
"""

import copy
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

    With ``width`` (pages per request at most) the device tensors stay the same memory for the cache's whole life, so that a captured
    CUDA graph may read them: ``extend`` is then ``count`` on the host and ``advance`` on the device. Requests that are not active
    (``activate``) do not grow, and what is appended for them goes to a spare page.
    """

    def __init__(self, pool: PagePool, batch: int = 1, width: int | None = None):
        self.pool, self.width = pool, width
        self.tables: list[list[int]] = [[] for _ in range(batch)]
        self.host_lengths = [0] * batch
        self.active = [True] * batch
        device = pool.k.device
        with torch.inference_mode(False):  # whoever makes the cache, anyone may change these
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
            self.growing = torch.ones(batch, dtype=torch.int32, device=device)
            self.block_table = torch.zeros(batch, width or 1, dtype=torch.int32, device=device)
            self._spare_page = torch.zeros((), dtype=torch.int32, device=device)  # a captured step reads it: the page changes with every use
        self._spare: int | None = None
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

    def stacked(self, layers: slice, request: int, start: int, stop: int, side: int) -> torch.Tensor:
        """Keys (side 0) or values (side 1) of the tokens [start, stop) of a request in several layers, [layers, kv_heads, n, head_dim]: a view
        if the pages are contiguous."""
        rows = (self.pool.k, self.pool.v)[side][layers].flatten(2, 3)
        spans = [(max(a, start), min(b, stop), slot - a) for a, b, slot in self.runs(request)]
        pieces = [rows[:, :, lo + shift : hi + shift] for lo, hi, shift in spans if lo < hi]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2) if pieces else rows[:, :, :0]

    def only(self, request: int) -> "PagedKVCache":
        """One request as a cache of its own, to be read from until this one grows; nothing is copied."""
        view, row = copy.copy(self), slice(request, request + 1)
        view.tables, view.host_lengths, view.active, view._runs = self.tables[row], self.host_lengths[row], self.active[row], {}
        view.lengths, view.growing, view.block_table = self.lengths[row], self.growing[row], self.block_table[row]
        return view

    # -- writing ------------------------------------------------------------------------------------------------------

    def reserve(self, tokens: int | list[int]) -> None:
        """Make sure every active request owns writable pages for ``tokens`` more tokens (one number, or one per request).

        Block tables then stay as they are until those are used.
        """
        changed = False
        each = [tokens] * self.batch if isinstance(tokens, int) else tokens
        for request, (table, tokens) in enumerate(zip(self.tables, each, strict=True)):
            if not self.active[request]:
                continue
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
        """Grow every active request by ``tokens``; their K and V follow by ``append`` in every layer."""
        self.count(tokens)
        self.advance(tokens)

    def count(self, tokens: int) -> None:
        """The host's half of ``extend``: pages and lengths."""
        self.reserve(tokens)
        self.host_lengths = [n + tokens * active for n, active in zip(self.host_lengths, self.active, strict=True)]

    def advance(self, tokens: int) -> None:
        """The device's half of ``extend``: lengths, and where the new rows go. No host synchronisation."""
        self.lengths += self.growing * tokens
        position = (self.lengths[:, None] - tokens + torch.arange(tokens, device=self.lengths.device)).clamp(min=0)
        page = self.block_table.gather(1, (position // self.page_size).long())
        if self._spare is not None:
            page = torch.where(self.growing[:, None] > 0, page, self._spare_page)
        self.slots = (page * self.page_size + position % self.page_size).flatten().long()

    def activate(self, active: list[bool]) -> None:
        """Which requests grow from now on; needs a page to spare the first time that one does not."""
        if self._spare is None and not all(active):
            self._spare = self.pool.take()
            self._spare_page.fill_(self._spare)
        if active != self.active:
            self.active = list(active)
            self.growing.copy_(torch.tensor(active, dtype=torch.int32))

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write the K and V of the tokens of the last ``extend``: k, v [B, kv_heads, n, head_dim], keys after RoPE."""
        for pool, new in ((self.pool.k[layer], k), (self.pool.v[layer], v)):
            pool.flatten(1, 2).index_copy_(1, self.slots, new.transpose(0, 1).flatten(1, 2))

    # -- sharing ------------------------------------------------------------------------------------------------------

    def fork(self) -> "PagedKVCache":
        """A second cache with the same content: pages are shared, the partly filled one is copied when either side writes to it."""
        other = PagedKVCache(self.pool, self.batch)
        other.share([(self, request) for request in range(self.batch)])
        return other

    def share(self, sources: "list[tuple[PagedKVCache, int]]") -> None:
        """Become a fork of requests of other caches of the pool; an empty cache takes at most ``batch`` of them, the rest stays empty."""
        for request, (source, index) in enumerate(sources):
            length = source.host_lengths[index]
            self.tables[request] = source.tables[index][: -(-length // self.page_size)]
            self.host_lengths[request] = length
            for page in self.tables[request]:
                self.pool.share(page)
        self._refresh_device()

    def free(self) -> None:
        """Give all pages back; the cache is empty afterwards and can be used again."""
        for table in self.tables:
            for page in table:
                self.pool.release(page)
        if self._spare is not None:
            self.pool.release(self._spare)
            self._spare = None
        self.tables = [[] for _ in self.tables]
        self.host_lengths = [0] * len(self.tables)
        self.activate([True] * len(self.tables))
        self._refresh_device()

    def _refresh_device(self) -> None:
        self._runs: dict[int, list[tuple[int, int, int]]] = {}
        longest = max(1, *map(len, self.tables))
        if self.width is not None and longest > self.width:
            raise OutOfPages(f"a request needs {longest} pages, this cache has room for {self.width}")
        width = self.width or longest
        padded = torch.tensor([table + [0] * (width - len(table)) for table in self.tables], dtype=torch.int32)
        if padded.shape != self.block_table.shape:
            with torch.inference_mode(False):
                self.block_table = padded.to(self.block_table.device, copy=True)
        else:
            self.block_table.copy_(padded)
        self.lengths.copy_(torch.tensor(self.host_lengths, dtype=torch.int32))
