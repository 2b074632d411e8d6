"""The page pool: which pages of the KV cache are free, held, or kept because a later prompt may need them again.

A page holds the KV of `page_size` consecutive positions in every layer. Full pages are named by a hash chain, as in
vLLM's automatic prefix caching: the digest of a page covers its tokens, all tokens before it and the salt, so equal
digests mean equal prefixes. A page that nobody holds but that has a digest waits in LRU order for a hit or an eviction.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b


class OutOfPagesError(RuntimeError):
    """More pages were asked for than are free; the scheduler checks `num_free` first, so this is a defect."""


@dataclass(slots=True)
class PoolStats:
    """Counts of pages since the start: found in the prefix cache, looked up in vain, and evicted from it."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


def root_digest(salt: str | None) -> bytes:
    """The digest that a chain starts from; different salts never share a page."""
    return blake2b(b"" if salt is None else b"salt:" + salt.encode(), digest_size=16).digest()


def page_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The digest of one full page: its parent's digest and its tokens (64 bit each)."""
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class PagePool:
    """Reference counts, free list, prefix table and LRU order of `num_pages` pages.

    Page 0 is the dummy that absorbs padding writes: it is never handed out. A page is in exactly one of three places:
    held (reference count > 0), cached (count 0, has a digest, in LRU order) or free (count 0, no digest).
    """

    def __init__(self, num_pages: int, page_size: int, prefix_cache: bool = True) -> None:
        if num_pages < 2:
            raise ValueError(f"num_pages is {num_pages}, but page 0 is a dummy: at least 2 are needed")
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}, but a page holds at least one token")
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_cache = prefix_cache
        self.stats = PoolStats()
        self._refs = [0] * num_pages
        self._digests: list[bytes | None] = [None] * num_pages
        self._table: dict[bytes, int] = {}
        self._free = list(range(num_pages - 1, 0, -1))  # a stack: low pages first, recently used ones again soon
        self._lru: dict[int, None] = {}  # insertion order: the first is evicted first

    @property
    def capacity(self) -> int:
        """Pages that can be handed out at all."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can hand out now, evictable ones included."""
        return len(self._free) + len(self._lru)

    @property
    def num_cached(self) -> int:
        """Pages that a prompt could hit now, held ones included."""
        return len(self._table)

    def pages_for(self, num_tokens: int) -> int:
        """Number of pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def is_registered(self, page: int) -> bool:
        """True when the page can be hit: then its contents must never change."""
        return self._digests[page] is not None

    def allocate(self, count: int) -> list[int]:
        """Hand out `count` pages, each held once; unused pages first, then the least recently used cached ones.

        Raises OutOfPagesError, and hands out none, when fewer are free.
        """
        if count > self.num_free:
            raise OutOfPagesError(f"{count} pages wanted, {self.num_free} of {self.capacity} free")
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page = next(iter(self._lru))
                del self._lru[page]
                digest = self._digests[page]
                if digest is not None:
                    del self._table[digest]
                self._digests[page] = None
                self.stats.evictions += 1
            self._refs[page] = 1
            pages.append(page)
        return pages

    def incref(self, pages: Iterable[int]) -> None:
        """Hold pages once more: pages that somebody holds, or cached ones that `match_prefix` found."""
        for page in pages:
            if self._refs[page] == 0:
                if page not in self._lru:
                    raise RuntimeError(f"page {page} is free and cannot be shared")
                del self._lru[page]
            self._refs[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Let go of pages once. Registered ones stay hittable until they are evicted, the end of a prefix first."""
        for page in reversed(pages):
            refs = self._refs[page] - 1
            if refs < 0:
                raise RuntimeError(f"page {page} was released twice")
            self._refs[page] = refs
            if refs == 0:
                if self._digests[page] is None:
                    self._free.append(page)
                else:
                    self._lru[page] = None

    def match_prefix(
        self, tokens: Sequence[int], salt: str | None = None, chain: list[bytes] | None = None
    ) -> list[int]:
        """The cached pages of the longest known prefix, at most (len - 1) // page_size so that one token is computed.

        The pages are not held yet: `incref` them before anything is allocated. `chain` keeps the digests of these
        tokens from call to call. Nothing is counted in `stats`, since a request that waits looks again at every step;
        `record_lookup` does that.
        """
        pages: list[int] = []
        if not self.prefix_cache:
            return pages
        if chain is None:
            chain = []
        limit = (len(tokens) - 1) // self.page_size
        for index in range(limit):
            if len(chain) < index + 2:
                self.extend_chain(chain, tokens, index + 1, salt)
            page = self._table.get(chain[index + 1])
            if page is None:
                break
            pages.append(page)
        return pages

    def has(self, digest: bytes) -> bool:
        """True when a page of this name could be hit now."""
        return digest in self._table

    def record_lookup(self, hits: int, misses: int) -> None:
        """Count one lookup's pages, found and not found."""
        self.stats.hits += hits
        self.stats.misses += misses

    def extend_chain(self, chain: list[bytes], tokens: Sequence[int], num_pages: int, salt: str | None) -> None:
        """Make `chain` (root digest, then one per full page) cover the first `num_pages` pages of `tokens`."""
        if not chain:
            chain.append(root_digest(salt))
        size = self.page_size
        for index in range(len(chain) - 1, num_pages):
            chain.append(page_digest(chain[index], tokens[index * size : (index + 1) * size]))

    def register(self, page: int, digest: bytes) -> bool:
        """Let later prompts find a held, full page. False when it has a name or another page has this one already."""
        if not self.prefix_cache or self._digests[page] is not None or digest in self._table:
            return False
        if self._refs[page] < 1:
            raise RuntimeError(f"page {page} is not held and cannot be registered")
        self._digests[page] = digest
        self._table[digest] = page
        return True

    def check(self, owners: Iterable[Sequence[int]] | None = None) -> None:
        """Verify every invariant; RuntimeError names the first that is broken. For tests: it costs O(pages).

        With `owners` (the page list of each holder) the reference counts are compared with what is really held.
        """

        def require(condition: bool, message: str) -> None:
            if not condition:
                raise RuntimeError(f"page pool: {message}")

        free = set(self._free)
        require(len(free) == len(self._free), "a page is twice in the free list")
        require(self._refs[0] == 0 and self._digests[0] is None, "the dummy page is in use")
        require(0 not in free and 0 not in self._lru, "the dummy page is in the free list")
        for page in range(1, self.num_pages):
            refs, digest = self._refs[page], self._digests[page]
            require(refs >= 0, f"page {page} has {refs} holders")
            places = (refs > 0) + (page in free) + (page in self._lru)
            require(places == 1, f"page {page} is in {places} places (holders {refs})")
            require(page not in free or digest is None, f"free page {page} has a digest")
            require(page not in self._lru or digest is not None, f"cached page {page} has no digest")
            require(digest is None or self._table.get(digest) == page, f"page {page} is not in the prefix table")
        named = sum(digest is not None for digest in self._digests)
        require(named == len(self._table), f"{len(self._table)} digests in the table, {named} on pages")
        if owners is not None:
            held = Counter(page for pages in owners for page in pages)
            require(held[0] == 0, "somebody holds the dummy page")
            for page in range(1, self.num_pages):
                require(held[page] == self._refs[page], f"page {page}: {self._refs[page]} counted, {held[page]} held")
