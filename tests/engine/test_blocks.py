"""The page pool: what is handed out, what is kept for later, and what is refused."""

import pytest

from jaxllm.engine.blocks import OutOfPagesError, PagePool


def store(pool: PagePool, tokens: list[int], salt: str | None = None) -> list[int]:
    """Compute a prompt: take its pages and register the full ones."""
    chain: list[bytes] = []
    pages = pool.match_prefix(tokens, salt, chain)
    pool.incref(pages)
    pages = pages + pool.allocate(pool.pages_for(len(tokens)) - len(pages))
    full = len(tokens) // pool.page_size
    pool.extend_chain(chain, tokens, full, salt)
    for index in range(full):
        pool.register(pages[index], chain[index + 1])
    return pages


def test_page_0_is_never_handed_out() -> None:
    pool = PagePool(5, 4)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert pool.num_free == 0
    with pytest.raises(OutOfPagesError, match="1 pages wanted, 0 of 4 free"):
        pool.allocate(1)
    pool.check()


def test_too_large_an_allocation_takes_nothing() -> None:
    pool = PagePool(5, 4)
    with pytest.raises(OutOfPagesError):
        pool.allocate(5)
    assert pool.num_free == 4


def test_a_prefix_is_found_up_to_the_last_full_page_but_never_whole() -> None:
    pool = PagePool(20, 4)
    pages = store(pool, list(range(12)))
    assert pool.match_prefix(list(range(12))) == pages[:2]  # one token has to be computed
    assert pool.match_prefix(list(range(13))) == pages
    assert pool.match_prefix(list(range(7))) == pages[:1]
    assert pool.match_prefix([9, *range(1, 12)]) == []
    assert pool.match_prefix([*range(4), 9, 9, 9, 9, 9]) == pages[:1]
    assert pool.match_prefix([1]) == []


def test_a_page_is_named_by_everything_before_it() -> None:
    pool = PagePool(20, 2)
    store(pool, [1, 1, 5, 5])
    assert pool.match_prefix([2, 2, 5, 5, 0]) == []


def test_salts_do_not_share() -> None:
    pool = PagePool(20, 4)
    tokens = list(range(9))
    pages = store(pool, tokens, "a")
    assert pool.match_prefix(tokens, "a") == pages[:2]
    assert pool.match_prefix(tokens, "b") == []
    assert pool.match_prefix(tokens) == []
    assert pool.match_prefix(tokens, "") == []


def test_released_pages_stay_hittable_until_they_are_evicted() -> None:
    pool = PagePool(6, 4)
    tokens = list(range(9))
    pages = store(pool, tokens)
    pool.release(pages)
    assert pool.num_free == 5
    assert pool.match_prefix(tokens) == pages[:2]
    pool.allocate(3)  # the three pages without a name go first
    assert pool.match_prefix(tokens) == pages[:2]
    pool.allocate(1)  # the end of the prefix goes before its beginning
    assert pool.match_prefix(tokens) == pages[:1]
    assert pool.stats.evictions == 1
    pool.allocate(1)
    assert pool.match_prefix(tokens) == []
    pool.check()


def test_eviction_takes_the_least_recently_used() -> None:
    pool = PagePool(4, 2)
    first, second, third = ([n, n, n] for n in (1, 2, 3))
    for tokens in (first, second, third):
        pool.release(store(pool, tokens[:2]))  # three pages, one prefix each
    again = pool.match_prefix(first)
    assert len(again) == 1
    pool.incref(again)
    pool.release(again)  # now `second` is the oldest
    pool.allocate(1)
    assert pool.match_prefix(first) == again
    assert pool.match_prefix(second) == []
    assert len(pool.match_prefix(third)) == 1


def test_a_held_page_is_not_evicted() -> None:
    pool = PagePool(4, 2)
    pages = store(pool, [1, 1, 2])
    assert pool.allocate(1)[0] not in pages
    with pytest.raises(OutOfPagesError):
        pool.allocate(1)


def test_two_requests_may_compute_the_same_page() -> None:
    pool = PagePool(10, 2)
    chain: list[bytes] = []
    pool.extend_chain(chain, [1, 2], 1, None)
    first, second = pool.allocate(2)
    assert pool.register(first, chain[1])
    assert not pool.register(second, chain[1])
    assert not pool.register(first, chain[1])
    pool.release([second])
    assert pool.match_prefix([1, 2, 3]) == [first]
    pool.check([[first]])


def test_without_a_prefix_cache_nothing_is_kept() -> None:
    pool = PagePool(10, 2, prefix_cache=False)
    pages = store(pool, [1, 2, 3, 4, 5])
    assert pool.match_prefix([1, 2, 3, 4, 5]) == []
    pool.release(pages)
    assert pool.num_cached == 0 and pool.num_free == 9
    pool.check()


def test_misuse_is_refused() -> None:
    pool = PagePool(10, 2)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(RuntimeError, match="released twice"):
        pool.release(pages)
    with pytest.raises(RuntimeError, match="cannot be shared"):
        pool.incref(pages)
    with pytest.raises(RuntimeError, match="cannot be registered"):
        pool.register(pages[0], b"digest")


@pytest.mark.parametrize(("pages", "size", "message"), [(1, 4, "num_pages is 1"), (4, 0, "page_size is 0")])
def test_bad_sizes(pages: int, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PagePool(pages, size)


def test_check_sees_what_is_wrong() -> None:
    pool = PagePool(6, 2)
    pages = pool.allocate(2)
    pool.check([pages])
    with pytest.raises(RuntimeError, match="1 counted, 0 held"):
        pool.check([pages[:1]])
    with pytest.raises(RuntimeError, match="1 counted, 2 held"):
        pool.check([pages, pages])
    pool._free.append(pages[0])
    with pytest.raises(RuntimeError, match="is in 2 places"):
        pool.check()
