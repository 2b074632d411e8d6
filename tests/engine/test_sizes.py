"""Sizes of the page pool: what limits it, alone and together."""

from __future__ import annotations

import pytest

from jaxllm.config import EngineConfig
from jaxllm.engine.devices import host_memory
from jaxllm.engine.sizes import DEFAULTS, Room, Sizes, longest_sequence, pool_size
from jaxllm.mapping import Mapping
from jaxllm.settings import ConfigError

CPU = DEFAULTS["cpu"]


def pool(rooms: list[Room], span: int = 32, context: int = 1000, **settings) -> tuple[int, int]:
    config = EngineConfig(model="m", **{"max_batch_size": 4, **settings})
    return pool_size(config, Sizes.choose(config, CPU, Mapping()), CPU, rooms, context=context, span=span)


def test_by_free_memory():
    room = Room(free=1_000_000, page_bytes=1000, page_elements=10)
    assert pool([room]) == (901, 1000)  # 0.9 of it, and the dummy page
    assert pool([room], kv_cache_config={"free_gpu_memory_fraction": 0.5}) == (501, 1000)
    assert pool([room], kv_cache_config={"max_tokens": 3200}) == (101, 1000)
    assert pool([room], kv_cache_config={"max_tokens": 320_000}) == (901, 1000)  # not over what is there


def test_the_fullest_stage_decides():
    rooms = [Room(1_000_000, 1000, 10), Room(1_000_000, 3000, 10), Room(500_000, 1000, 10)]
    assert pool(rooms) == (301, 1000)


def test_where_the_platform_does_not_tell():
    room = Room(None, 1000, 10)
    assert pool([room], context=100) == (14, 100)  # four sequences
    assert pool([room], context=100, kv_cache_config={"max_tokens": 64}) == (3, 65)
    assert pool([room], context=100_000, max_batch_size=64)[0] == 100_000 // 32 + 1  # one sequence


def test_what_a_cpu_has_at_most():
    room = Room(None, 1000, 10, most=20_000)
    assert pool([room], context=100_000) == (21, 641)
    assert pool([room], kv_cache_config={"max_tokens": 64}) == (3, 65)
    assert pool([room], kv_cache_config={"max_tokens": 10**14}) == (21, 641)
    assert pool([room, Room(None, 2000, 10, most=20_000)], context=100_000) == (11, 321)
    with pytest.raises(ConfigError, match="a page of 32 tokens takes 30,000 bytes a device, and 20,000 are free"):
        pool([Room(None, 30_000, 10, most=20_000)])
    assert 2**28 < host_memory() < 2**50


def test_the_context_spread_over_devices():
    room = Room(1_000_000, 1000, 10)
    assert pool([room], span=128, context=100_000, kv_cache_config={"max_tokens": 1280}) == (11, 1281)


def test_what_xla_can_address():
    assert pool([Room(10**12, 1000, 2**21)])[0] == 1023


def test_refused():
    with pytest.raises(ConfigError, match="a page of 32 tokens takes 2,000 bytes a device, and 1,000 are free"):
        pool([Room(1000, 2000, 10)])
    with pytest.raises(ConfigError, match="max_seq_len = 2000 is more than the model's context of 1000"):
        longest_sequence(EngineConfig(model="m", max_seq_len=2000), 1000)
