"""Property tests of the page pool and the scheduler, against a fake device that knows what every page must hold.

The fake device stores, per page and offset, a hash of the token prefix whose KV was written there, and checks before
every step that the page table of each row holds exactly the KV of that row's own prefix. Sharing the wrong page, using
one too early or giving one away too soon changes a hash. `python test_scheduler_properties.py 20000` runs the
simulation alone and prints what it did.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from jaxllm.engine.blocks import PagePool
from jaxllm.engine.request import FinishReason, Request, Sequence
from jaxllm.engine.scheduler import Scheduler
from jaxllm.engine.step import Event, Step

VOCAB, EOS, STOP_ID = 40, 0, 1


@dataclass
class Params:
    """The fields of SamplingParams that the scheduler reads."""

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool = False
    stop_token_ids: list[int] | None = None
    end_id: int | None = None
    wait_for_token: bool = False


class Truth:
    """What a sequence must consist of, whatever the scheduler does: tokens and one prefix hash per position."""

    def __init__(self, seq: Sequence) -> None:
        self.seed = seq.index
        self.tokens: list[int] = []
        self.hashes: list[int] = []
        self._last = hash((7, hash_text(seq.request.cache_salt)))
        for token in seq.request.prompt_token_ids:
            self._push(token)

    def _push(self, token: int) -> None:
        self._last = hash((self._last, token))
        self.tokens.append(token)
        self.hashes.append(self._last)

    def token(self, position: int) -> int:
        """The token at a position, sampled from the prefix when it is beyond the prompt."""
        while len(self.tokens) <= position:
            self._push(hash((self._last, self.seed, 3)) % VOCAB)
        return self.tokens[position]

    def end(self, seq: Sequence, max_seq_len: int) -> tuple[int, FinishReason]:
        """Length at which the sequence has to end by itself, and why."""
        params: Params = seq.request.params  # type: ignore[assignment]
        stops = set(params.stop_token_ids or ()) | (set() if params.ignore_eos else {EOS})
        prompt = len(seq.request.prompt_token_ids)
        limit = max_seq_len if params.max_tokens is None else min(max_seq_len, prompt + params.max_tokens)
        for position in range(prompt, limit):
            if self.token(position) in stops and position + 1 - prompt >= (params.min_tokens or 0):
                return position + 1, FinishReason.STOP
        return limit, FinishReason.LENGTH


def hash_text(text: str | None) -> int:
    return 0 if text is None else int.from_bytes(text.encode(), "little") + 1


class FakeDevice:
    """Runs steps in order on pages of prefix hashes."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.size = scheduler.pool.page_size
        self.kv = [[-1] * self.size for _ in range(scheduler.pool.num_pages)]
        self.last: dict[int, int | None] = {}  # by slot
        self.truths: dict[Sequence, Truth] = {}
        self.steps = 0
        self.sampled: dict[Sequence, int] = {}  # number of the step that a sequence's last token came from

    def truth(self, seq: Sequence) -> Truth:
        if seq not in self.truths:
            self.truths[seq] = Truth(seq)
        return self.truths[seq]

    def _read(self, seq: Sequence, stop: int) -> None:
        hashes, size = self.truth(seq).hashes, self.size
        assert len(hashes) >= stop
        full, rest = divmod(stop, size)
        for index in range(full):
            assert self.kv[seq.pages[index]] == hashes[index * size : (index + 1) * size], f"foreign KV: {seq}"
        if rest:
            assert self.kv[seq.pages[full]][:rest] == hashes[full * size : stop], f"foreign KV: {seq}"

    def _write(self, seq: Sequence, start: int, stop: int) -> None:
        hashes, pool = self.truth(seq).hashes, self.scheduler.pool
        for position in range(start, stop):
            page = seq.pages[position // self.size]
            if position == start or position % self.size == 0:
                assert page != 0
                assert pool._refs[page] == 1, f"page {page} is shared and written: {seq}"
                assert not pool.is_registered(page), f"page {page} is in the prefix cache and written: {seq}"
            self.kv[page][position % self.size] = hashes[position]

    def run(self, step: Step) -> list[list[int]]:
        """Check a step, run it, and return one token per row for each of its repeats."""
        assert len(step.counts) == (len(step.decodes) if step.repeats > 1 else 0)
        out = [self._run(step)]
        for number in range(1, step.repeats):
            out.append([-1] * step.num_rows)
            for row, (seq, position, count) in enumerate(zip(step.decodes, step.positions, step.counts, strict=True)):
                assert count == min(step.repeats, seq.max_len - 1 - position) and not seq.wait_for_token
                if number < count:
                    self._read(seq, position + number)
                    self._write(seq, position + number, position + number + 1)
                    out[-1][row] = self._sample(seq, position + number + 1)
        self.steps += 1
        return out

    def _run(self, step: Step) -> list[int]:
        scheduler = self.scheduler
        assert step.num_tokens <= scheduler.max_num_tokens * step.repeats
        assert sum(-(-(c.stop - c.start) // scheduler.tile) for c in step.prefills) <= scheduler.max_tiles
        rows = step.decodes + [chunk.seq for chunk in step.prefills]
        slots = [seq.slot for seq in rows]
        assert len(set(slots)) == len(rows) <= scheduler.max_batch_size
        assert set(slots) <= set(scheduler._running.slots)
        assert len(step.positions) == len(step.decodes)
        for seq in step.started:
            self.last[seq.slot] = None
        # A row may read what earlier steps wrote and what it writes itself, so all reads come first.
        late = [s for s in step.decodes if s.num_pending > 1 and self.steps - self.sampled[s] < scheduler.micro_batches]
        assert not late or (len(late) == len(rows) and all(seq.num_pending == 2 for seq in late)), (
            f"decoded before its last step left the pipeline: {late}"
        )
        for seq, position in zip(step.decodes, step.positions, strict=True):
            assert position + 1 < seq.max_len, f"scheduled past its end: {seq}"
            assert self.last[seq.slot] == self.truth(seq).token(position), f"wrong input token: {seq}"
            if seq.wait_for_token:
                assert seq.num_pending == 1 and len(seq.tokens) == position + 1
            self._read(seq, position)
        for chunk in step.prefills:
            assert chunk.start < chunk.stop <= len(chunk.seq.tokens)
            assert chunk.samples == (chunk.stop == len(chunk.seq.tokens))
            self.truth(chunk.seq).token(chunk.stop - 1)
            self._read(chunk.seq, chunk.start)
        tokens = []
        for seq, position in zip(step.decodes, step.positions, strict=True):
            self._write(seq, position, position + 1)
            tokens.append(self._sample(seq, position + 1))
        for chunk in step.prefills:
            self._write(chunk.seq, chunk.start, chunk.stop)
            tokens.append(self._sample(chunk.seq, chunk.stop) if chunk.samples else -1)
        assert not (step.repeats > 1 and step.prefills)
        return tokens

    def _sample(self, seq: Sequence, position: int) -> int:
        token = self.truth(seq).token(position)
        self.last[seq.slot] = token
        self.sampled[seq] = self.steps
        return token


@dataclass
class Harness:
    """Drives a scheduler and its fake device with `depth` steps in flight, and checks how every sequence ends.

    repeats: decode steps of a dispatch, where the scheduler agrees.
    """

    scheduler: Scheduler
    depth: int = 1
    repeats: int = 1
    repeated: int = 0  # dispatches of several steps
    requests: list[Request] = field(default_factory=list)  # unfinished
    histories: list[list[int]] = field(default_factory=list)  # token lists of finished sequences, for later prompts
    inflight: deque[tuple[Step, list[list[int]]]] = field(default_factory=deque)
    added: int = 0
    steps: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        self.device = FakeDevice(self.scheduler)

    def add(self, prompt: list[int], params: Params, **kwargs: object) -> Request | None:
        request = Request(self.added, prompt, params, **kwargs)  # type: ignore[arg-type]
        for seq in request.sequences:
            seq.wait_for_token = params.wait_for_token
        self.added += 1
        try:
            self.scheduler.add(request)
        except ValueError:
            one_step = min(self.scheduler.max_num_tokens, self.scheduler.max_tiles * self.scheduler.tile)
            too_long = len(prompt) > self.scheduler.max_seq_len - 1
            assert too_long or (not self.scheduler.chunked_prefill and len(prompt) > one_step)
            return None
        self.requests.append(request)
        return request

    def abort(self, request: Request) -> None:
        self.scheduler.abort(request)
        assert request.finished
        assert all(seq.pages == [] and seq.slot == -1 for seq in request.sequences)
        self._forget(request)

    def stop(self, seq: Sequence) -> None:
        """What the engine does when it finds a stop string."""
        self.scheduler.finish(seq, FinishReason.STOP, "text")
        assert seq.finished and seq.pages == []
        if seq.request.finished:
            self._forget(seq.request)

    def _forget(self, request: Request) -> None:
        if request in self.requests:  # siblings may end with the same step
            self.requests.remove(request)
        for seq in request.sequences:
            self.device.truths.pop(seq, None)
            self.device.sampled.pop(seq, None)

    def advance(self) -> list[Event]:
        """Schedule and run one step if there is room for it in flight, and take the results of one when due."""
        step = self._schedule() if len(self.inflight) < self.depth else None
        if step is not None:
            self.steps += 1
            self.inflight.append((step, self.device.run(step)))
        if not self.inflight:
            assert not self.scheduler.has_work(), f"nothing runs and nothing can: {self.requests[:3]}"
            return []
        if step is not None and len(self.inflight) < self.depth:
            return []
        step, repeats = self.inflight.popleft()
        all_events, rows = [], step.rows
        for tokens in repeats:
            events = self.scheduler.update(step, tokens)
            all_events += events
            for event in events:
                self.tokens += 1
                assert rows[event.row] is event.seq and tokens[event.row] == event.token == event.seq.tokens[-1]
                assert event.finished == event.seq.finished
                if event.finished:
                    self._check_end(event.seq)
        for seq in (seq for request in self.requests for seq in request.sequences if not seq.finished):
            assert seq.num_pending >= 0 and (self.inflight or not seq.num_pending), f"tokens are miscounted: {seq}"
        return all_events

    def _schedule(self) -> Step | None:
        before = [seq for request in self.requests for seq in request.sequences if seq.slot >= 0]
        step = self.scheduler.schedule()
        gone = [seq for seq in before if seq.slot < 0]
        kept = [seq for seq in before if seq.slot >= 0]
        if gone and step is not None:
            assert not step.started, "pages that were taken from somebody went to a new sequence"
        if gone and kept:
            assert min(seq.rank for seq in gone) > max(seq.rank for seq in kept), f"preempted the wrong one: {gone}"
        return self._repeat(step)

    def _repeat(self, step: Step | None) -> Step | None:
        """What the engine does with a step of decodes."""
        if self.repeats > 1 and step is not None and self.scheduler.can_repeat(step, self.repeats):
            self.scheduler.repeat(step, self.repeats)
            self.repeated += 1
        return step

    def _check_end(self, seq: Sequence) -> None:
        truth = self.device.truth(seq)
        length, reason = truth.end(seq, self.scheduler.max_seq_len)
        assert seq.tokens == truth.tokens[:length]
        assert seq.finish_reason == reason
        assert seq.stop_reason == (STOP_ID if seq.tokens[-1] == STOP_ID and reason == FinishReason.STOP else None)
        assert seq.pages == [] and seq.slot == -1
        if len(self.histories) < 200:
            self.histories.append(list(seq.tokens))
        if seq.request.finished:
            self._forget(seq.request)

    def drain(self) -> None:
        """Run until everything has finished; then no page may be held and no slot taken."""
        while self.scheduler.has_work() or self.inflight:
            self.advance()
        self.scheduler.check()
        assert not self.requests
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert self.scheduler.pool.num_free == self.scheduler.pool.capacity
        if self.scheduler.policy == "GUARANTEED_NO_EVICT":
            assert self.scheduler.num_preemptions == 0


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


# ---- the simulation -----------------------------------------------------------------------------------------------


def random_prompt(rng: random.Random, harness: Harness, prefixes: list[list[int]]) -> list[int]:
    kind = rng.random()
    if kind < 0.5:
        base = rng.choice(prefixes)
    elif kind < 0.7 and harness.histories:
        base = rng.choice(harness.histories)  # the next turn of a conversation
    else:
        base = []
    base = base[: rng.randrange(len(base) + 1)] if rng.random() < 0.3 else base
    return (base + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 20))])[:110]


def simulate(num_requests: int, seed: int) -> dict[str, int]:
    """Run `num_requests` requests through every combination of settings, in equal shares; returns counts."""
    rng = random.Random(seed)
    totals: dict[str, int] = {}
    settings_ = [
        (policy, depth, cache, chunked)
        for policy in ("MAX_UTILIZATION", "GUARANTEED_NO_EVICT")
        for depth in (1, 2)
        for cache in (True, True, False)
        for chunked in (True, True, False)
    ]
    for number, (policy, depth, cache, chunked) in enumerate(settings_):
        size = rng.choice([4, 8])
        turns = (1, 1, 1, 2, 1, 4)[number % 6]
        pool = PagePool((160, 400, 800)[number % 3] // size, size, cache)
        scheduler = Scheduler(
            pool,
            max_batch_size=(4, 16, 16, 32)[number % 4],
            max_num_tokens=rng.choice([32, 64, 128]),
            max_seq_len=128,
            tile=8,
            max_tiles=12,
            policy=policy,
            chunked_prefill=chunked,
            eos_token_ids=[EOS],
            priority_queue=number % 2 == 1,
            micro_batches=turns,
        )
        harness = Harness(scheduler, depth if turns == 1 else turns + depth - 1)
        prefixes = [[rng.randrange(VOCAB) for _ in range(rng.randrange(8, 40))] for _ in range(6)]
        share = num_requests // len(settings_) + (number < num_requests % len(settings_))
        while harness.added < share:
            for _ in range(rng.choice([0, 0, 1, 5])):
                if harness.added < share:
                    request_params = Params(
                        n=rng.choice([1, 1, 1, 1, 2, 4]),
                        max_tokens=rng.choice([None, None, 1, 8, 40]),
                        min_tokens=rng.choice([None, None, 3]),
                        ignore_eos=rng.random() < 0.1,
                        stop_token_ids=rng.choice([None, [STOP_ID]]),
                        wait_for_token=rng.random() < 0.1,
                    )
                    prompt = random_prompt(rng, harness, prefixes)
                    if rng.random() < 0.3:  # starts small and grows: this is what runs out of pages
                        prompt = prompt[:5]
                        request_params.max_tokens, request_params.ignore_eos = 60, True
                    harness.add(
                        prompt,
                        request_params,
                        priority=rng.choice([0.2, 0.5, 0.5, 0.8]),
                        cache_salt=rng.choice([None, None, "tenant"]),
                        prefix_cache=rng.random() < 0.95,
                    )
            events = harness.advance()
            if harness.requests and rng.random() < 0.05:
                harness.abort(rng.choice(harness.requests))
            for event in events:
                if not event.seq.finished and rng.random() < 0.01:
                    harness.stop(event.seq)
            if harness.steps % 50 == 0:
                scheduler.check()
            while len(harness.requests) > 60:  # let the queue shrink now and then
                harness.advance()
        harness.drain()
        counts = {
            "requests": harness.added,
            "steps": harness.steps,
            "tokens": harness.tokens,
            "preemptions": scheduler.num_preemptions,
            "hits": pool.stats.hits,
            "misses": pool.stats.misses,
            "evictions": pool.stats.evictions,
        }
        totals = {name: totals.get(name, 0) + count for name, count in counts.items()}
    return totals


def test_simulation_of_20000_requests_takes_under_30_s_and_no_jax() -> None:
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, __file__, "20000"], cwd=root, env={"PYTHONPATH": str(root)}, capture_output=True, text=True,
        timeout=110,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    report = dict(line.split("=") for line in result.stdout.split())
    assert report["jax"] == "False"
    assert int(report["requests"]) == 20000
    assert float(report["seconds"]) < 30  # of processor time: the machine may be busy
    for name in ("preemptions", "hits", "misses", "evictions"):
        assert int(report[name]) > 1000, f"the load exercises too little: {name} {report[name]}"


def main(num_requests: int, seed: int = 0) -> None:
    """Print the counts of one simulation, and the processor time it took, as `name=value` words."""
    start = time.process_time()
    totals = simulate(num_requests, seed)
    seconds = time.process_time() - start
    counts = [f"{name}={value}" for name, value in totals.items()]
    print(*counts, f"seconds={seconds:.1f}", f"jax={'jax' in sys.modules}")


if __name__ == "__main__":
    main(*[int(argument) for argument in sys.argv[1:]])
