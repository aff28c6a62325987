"""The paged cache against a plain tensor that does the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from macbench_kernels import OutOfPages, PagedKVCache, PagePool


def content(cache: PagedKVCache, layer: int, request: int) -> torch.Tensor:
    """K of a request as [Hkv, n, d], read through the device-side block table, as a kernel would."""
    n, size = int(cache.lengths[request]), cache.page_size
    rows = [cache.keys(layer)[:, int(cache.block_table[request, i // size]), i % size] for i in range(n)]
    return torch.stack(rows, 1) if rows else torch.empty(2, 0, 4)


def grow(cache: PagedKVCache, mirror: list[torch.Tensor], n: int) -> list[torch.Tensor]:
    new = torch.randn(cache.batch, 2, n, 4)
    cache.extend(n)
    for layer in range(2):
        cache.append(layer, new + layer, -new)
    return [torch.cat([old, new[b]], 1) for b, old in enumerate(mirror)]


def agree(cache: PagedKVCache, mirror: list[torch.Tensor]) -> None:
    for b, want in enumerate(mirror):
        torch.testing.assert_close(content(cache, 0, b), want)
        torch.testing.assert_close(content(cache, 1, b), want + 1)
        if want.shape[1]:
            pieces = cache.slice(0, b, 0, want.shape[1])
            torch.testing.assert_close(torch.cat([k for k, _ in pieces], 1), want)
            torch.testing.assert_close(torch.cat([v for _, v in pieces], 1), -want)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["grow", "fork", "free"]), st.integers(0, 5), st.integers(1, 9)), max_size=25), st.integers(1, 5))
def test_any_sequence_of_grow_fork_and_free(steps, page_size):
    pool = PagePool(2, 2, 4, 2000, page_size)
    live = [(PagedKVCache(pool, 2), [torch.empty(2, 0, 4)] * 2)]
    for action, which, n in steps:
        i = which % len(live)
        cache, mirror = live[i]
        if action == "grow":
            live[i] = (cache, grow(cache, mirror, n))
        elif action == "fork":
            live.append((cache.fork(), list(mirror)))
        elif len(live) > 1:
            cache.free()
            del live[i]
        for cache, mirror in live:
            agree(cache, mirror)
    for cache, _ in live:
        cache.free()
    assert pool.free_pages == pool.pages


def test_fork_shares_pages_and_copies_only_the_last():
    pool = PagePool(2, 2, 4, 20, 4)
    cache = PagedKVCache(pool)
    grow(cache, [torch.empty(2, 0, 4)], 10)  # 3 pages, the last half full
    assert pool.free_pages == 17
    fork = cache.fork()
    assert pool.free_pages == 17
    grow(fork, [torch.empty(2, 0, 4)], 1)
    assert pool.free_pages == 16
    assert fork.tables[0][:2] == cache.tables[0][:2]
    assert fork.tables[0][2] != cache.tables[0][2]


def test_reserved_pages_keep_the_block_table_in_place():
    cache = PagedKVCache(PagePool(1, 2, 4, 20, 4))
    cache.reserve(30)
    table = cache.block_table
    for _ in range(30):
        cache.extend(1)
    assert cache.block_table is table
    assert int(cache.lengths) == 30


def test_running_out_of_pages_says_so():
    with pytest.raises(OutOfPages, match="all 2 pages"):
        PagedKVCache(PagePool(1, 1, 4, 2, 4)).extend(9)
