"""Property tests of the page pool and of the scheduler, the latter on a fake device."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from jaxllm.engine.blocks import PagePool
from jaxllm.engine.request import Sequence
from jaxllm.engine.scheduler import Scheduler
from tests.engine.fake_device import EOS, STOP_ID, Harness, Params

# ---- hypothesis: the pool alone -----------------------------------------------------------------------------------


class PoolMachine(RuleBasedStateMachine):
    """Random holders of random pages, against a model that remembers the tokens behind each registered page."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(12, 2)
        self.owners: dict[int, list[int]] = {}
        self.names: dict[int, tuple[str | None, tuple[int, ...]]] = {}  # page -> (salt, all tokens up to its end)
        self.next = 0

    def _own(self, pages: list[int]) -> int:
        self.next += 1
        self.owners[self.next] = pages
        return self.next

    @rule(target=held, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9), salt=st.sampled_from([None, "a"]))
    def admit(self, tokens: list[int], salt: str | None) -> int:
        pool, chain = self.pool, []
        shared = pool.match_prefix(tokens, salt, chain)
        assert len(shared) <= (len(tokens) - 1) // 2
        for index, page in enumerate(shared):
            assert self.names[page] == (salt, tuple(tokens[: 2 * index + 2]))
        pool.incref(shared)
        needed = pool.pages_for(len(tokens)) - len(shared)
        if needed > pool.num_free:
            pool.release(shared)
            return self._own([])
        fresh = pool.allocate(needed)
        holders = [page for pages in self.owners.values() for page in pages]
        assert not set(fresh) & (set(holders) | set(shared)) and len(set(fresh)) == needed and 0 not in fresh
        pages = shared + fresh
        pool.extend_chain(chain, tokens, len(tokens) // 2, salt)
        for page in fresh:
            self.names.pop(page, None)
        for index in range(len(tokens) // 2):
            if pool.register(pages[index], chain[index + 1]):
                self.names[pages[index]] = (salt, tuple(tokens[: 2 * index + 2]))
        return self._own(pages)

    @rule(target=held, owner=held)
    def share(self, owner: int) -> int:
        pages = self.owners[owner]
        self.pool.incref(pages)
        return self._own(list(pages))

    @rule(owner=consumes(held))
    def release(self, owner: int) -> None:
        self.pool.release(self.owners.pop(owner))

    @invariant()
    def consistent(self) -> None:
        self.pool.check(self.owners.values())
        used = {page for pages in self.owners.values() for page in pages}
        assert self.pool.num_free == self.pool.capacity - len(used)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


# ---- hypothesis: the scheduler on the fake device -----------------------------------------------------------------

params = st.builds(
    Params,
    n=st.integers(1, 3),
    max_tokens=st.none() | st.integers(1, 12),
    min_tokens=st.none() | st.integers(0, 6),
    ignore_eos=st.booleans(),
    stop_token_ids=st.none() | st.just([STOP_ID]),
    wait_for_token=st.booleans(),
)
arrivals = st.tuples(
    st.just("add"),
    st.lists(st.integers(2, 3), min_size=1, max_size=30),
    params,
    st.sampled_from([0.1, 0.5, 0.9]),
    st.sampled_from([None, "a"]),
    st.booleans(),
)
operations = (
    st.tuples(st.just("run"), st.integers(1, 8))
    | st.tuples(st.sampled_from(["abort", "stop"]), st.integers(0, 9))
    | arrivals
)
schedulers = st.fixed_dictionaries(
    {
        "max_batch_size": st.integers(1, 5),
        "max_num_tokens": st.integers(1, 24),
        "max_seq_len": st.integers(2, 40),
        "tile": st.integers(1, 8),
        "max_tiles": st.integers(1, 6),
        "policy": st.sampled_from(["GUARANTEED_NO_EVICT", "MAX_UTILIZATION"]),
        "chunked_prefill": st.booleans(),
        "priority_queue": st.booleans(),
        "micro_batches": st.sampled_from([1, 1, 2, 3, 4, 8]),
        "tile_counts": st.sampled_from([(), (1, 2, 6), (2, 5)]),
    }
)
pools = st.builds(PagePool, st.integers(2, 16), st.integers(1, 5), st.booleans())


def replay(harness: Harness, load: list[tuple[Any, ...]]) -> None:
    """Does a list of `operations` one after the other, checks after each, and runs what is left to its end."""
    for kind, *args in load:
        if kind == "add":
            prompt, params, priority, salt, cached = args
            harness.add(prompt, params, priority=priority, cache_salt=salt, prefix_cache=cached)
        elif kind == "run":
            for _ in range(args[0]):
                harness.advance()
                harness.scheduler.check()
        elif harness.requests:
            request = harness.requests[args[0] % len(harness.requests)]
            if kind == "abort":
                harness.abort(request)
            else:
                alive = [seq for seq in request.sequences if not seq.finished]
                harness.stop(alive[args[0] % len(alive)])
        harness.scheduler.check()
    harness.drain()


@settings(max_examples=300, deadline=None)
@given(pools, schedulers, st.integers(1, 3), st.lists(operations, max_size=25), st.sampled_from([1, 1, 2, 4]))
def test_any_load_leaves_every_page_where_it_belongs(pool, options, depth, load, repeats) -> None:
    scheduler = Scheduler(pool, eos_token_ids=[EOS], **options)
    depth = depth if options["micro_batches"] == 1 else options["micro_batches"] + depth - 1
    harness = Harness(scheduler, depth, repeats)
    replay(harness, load)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 8), st.integers(1, 20), st.integers(1, 24), st.data())
def test_micro_batches_are_balanced(turns, count, budget, data) -> None:
    """Once all decode, each of `turns` consecutive steps has the same number of decodes, give or take one."""
    pool = PagePool(2000, 4, False)
    scheduler = Scheduler(
        pool, max_batch_size=20, max_num_tokens=max(budget, 20), max_seq_len=300, micro_batches=turns, tile=4
    )
    harness = Harness(scheduler, turns + 1)
    for _ in range(count):
        harness.add([2] * data.draw(st.integers(1, 30)), Params(max_tokens=250, ignore_eos=True))
        for _ in range(data.draw(st.integers(0, 3))):
            harness.advance()
    while scheduler.num_waiting or scheduler._running.prefilling:
        harness.advance()
    taken: list[list[Sequence]] = []
    run = harness.device.run
    harness.device.run = lambda step: taken.append(list(step.decodes)) or run(step)  # type: ignore[method-assign]
    for _ in range(8 * turns):
        harness.advance()
    groups = min(turns, count)
    for start in range(len(taken) // 2, len(taken) - groups + 1):
        window = taken[start : start + groups]
        sizes = [len(decodes) for decodes in window]
        assert max(sizes) - min(sizes) <= 1, f"unbalanced micro-batches: {sizes}"
        assert len({id(seq) for decodes in window for seq in decodes}) == sum(sizes) == count
    assert len(taken) >= 3 * turns


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 6), st.lists(st.tuples(st.integers(0, 4), st.integers(1, 12)), min_size=5, max_size=60))
def test_no_decode_starves(turns, load) -> None:
    """However sequences come and go, one that decodes has its turn within three rounds of micro-batches."""
    scheduler = Scheduler(
        PagePool(4000, 4, False), max_batch_size=16, max_num_tokens=40, max_seq_len=300, micro_batches=turns
    )
    harness = Harness(scheduler, turns + 1)
    for arrivals_now, length in load:
        for number in range(arrivals_now):
            harness.add([2 + number] * 3, Params(max_tokens=length, ignore_eos=True))
        harness.advance()
        for seq in scheduler._running.decoding:
            if seq.num_computed < seq.max_len - 1:
                waited = scheduler._num_steps - seq.last_step
                assert waited <= 3 * turns + 1, f"{seq} has waited for {waited} steps"
    harness.drain()
