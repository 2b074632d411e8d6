"""How large the batches and the page pool of an engine are: from the settings, the model and the free memory alone.

Imports no jax, so that `jaxllm plan` decides as the engine does, on a machine that has neither the model nor a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from jaxllm.config import EngineConfig
from jaxllm.engine import buckets
from jaxllm.mapping import CpType, Mapping
from jaxllm.settings import ConfigError

MEMORY_FRACTION = 0.9
"""Share of a GPU that XLA reserves; the rest is for CUDA, NCCL and what else runs there. JAX's own default is 0.75."""

HOST_SHARE = 0.5
"""Share of the host's memory that pages may take on a CPU; the rest is for weights, activations and what else runs."""

MAX_ELEMENTS = 2**31 - 1
"""XLA addresses the elements of an array with 32 bits."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """Sizes for what the user left open, by platform.

    max_prompt_tokens: of a step, beside the decodes. kv_tokens: page pool where the device cannot tell its memory.
    tile: query tokens of a prompt tile. fine_buckets: see `buckets.plan`.
    """

    max_batch_size: int
    max_prompt_tokens: int
    kv_tokens: int
    tile: int
    fine_buckets: bool
    dtype: str | None


DEFAULTS = {
    # bfloat16 products of one row are twelve times slower than float32 ones in XLA:CPU.
    "cpu": Defaults(64, max_prompt_tokens=512, kv_tokens=32_768, tile=32, fine_buckets=True, dtype="float32"),
    "gpu": Defaults(256, max_prompt_tokens=8192, kv_tokens=65_536, tile=128, fine_buckets=False, dtype=None),
}


def kv_cache_dtype(config: EngineConfig, activations: np.dtype, quantised: bool) -> np.dtype:
    """Of the page pool. quantised: the checkpoint was made for keys and values in e4m3."""
    name = config.kv_cache_config.dtype
    if name == "fp8" or (name == "auto" and quantised):
        return np.dtype(ml_dtypes.float8_e4m3fn)
    if name == "auto":
        return activations
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(np.float32)


def memory_fraction_variable() -> dict[str, str]:
    """The environment variable by which JAX learns the share, with the user's value if there is one."""
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        if os.environ.get(name):
            return {name: os.environ[name]}
    return {"XLA_CLIENT_MEM_FRACTION": str(MEMORY_FRACTION)}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Batch sizes after defaults: what the scheduler may put into a step, and the buckets that hold it.

    tile: prompt tokens of a row, on each rank. scheduled_tile: as many tokens of a prompt take at most one tile of each
    rank that prompts are split over. max_tiles: tiles of a step, on each rank.
    micro_batches: steps that the decodes take turns in, so that the stages of a pipeline all have one to work on.
    """

    max_batch_size: int
    max_num_tokens: int
    tile: int
    scheduled_tile: int
    max_tiles: int
    micro_batches: int
    buckets: list[buckets.Bucket]

    @classmethod
    def choose(cls, config: EngineConfig, defaults: Defaults, mapping: Mapping) -> Sizes:
        batch = config.max_batch_size or defaults.max_batch_size
        # Left open, the budget is for prompts, and decodes take nothing from it: tiles stay full.
        prompts = config.max_num_tokens or defaults.max_prompt_tokens
        tokens = config.max_num_tokens or prompts + batch
        if tokens < batch:
            raise ConfigError(
                f"max_num_tokens = {tokens} is less than max_batch_size = {batch}, but every running sequence needs "
                "one token per step; raise the first or lower the second"
            )
        # A chunk of star attention may lie in one block, and so on one rank.
        parts = 1 if mapping.cp_type is CpType.STAR else mapping.prompt_parts
        tile = min(defaults.tile, -(-prompts // parts))
        if parts > 1 and mapping.stripes > 1:
            # Wherever a chunk of parts * tile tokens starts, no rank has more than a tile of it.
            page = config.kv_cache_config.tokens_per_block
            tile = -(-tile // page) * page
        scheduled = parts * tile
        max_tiles = -(-prompts // scheduled)
        counts = None
        if config.token_buckets:
            counts = sorted({-(-n // scheduled) for n in config.token_buckets})
        # The plain loop has one step in flight: there is nobody to take turns with.
        turns = 1 if mapping.pp == 1 or config.disable_overlap_scheduler else mapping.pp * config.pp_micro_batches
        plan = buckets.plan(
            batch,
            max_tiles,
            batch_sizes=config.batch_buckets,
            tile_counts=counts,
            micro_batches=turns,
            fine=defaults.fine_buckets,
        )
        return cls(batch, tokens, tile, scheduled, max_tiles, turns, plan)


@dataclass(frozen=True, slots=True)
class Room:
    """What a pipeline stage has for pages on each device.

    free: bytes, None where the platform does not tell. page_bytes: of a page in all layers of the stage.
    page_elements: of a page in its largest array. most: bytes of all pages, where `free` is None and somebody knows.
    """

    free: int | None
    page_bytes: int
    page_elements: int
    most: int | None = None


def longest_sequence(config: EngineConfig, context: int) -> int:
    """The longest sequence that the settings and the model's context allow. Raises ConfigError."""
    if config.max_seq_len is not None and config.max_seq_len > context:
        raise ConfigError(f"max_seq_len = {config.max_seq_len} is more than the model's context of {context}; lower it")
    return config.max_seq_len or context


def pool_size(
    config: EngineConfig, sizes: Sizes, defaults: Defaults, rooms: Sequence[Room], *, context: int, span: int
) -> tuple[int, int]:
    """Pages of the pool (the dummy page included), the same in all stages, and the longest sequence.

    Args:
        context: of the model, in tokens.
        span: tokens of a page, over all devices that the context is spread over.

    Raises:
        ConfigError: not a single page fits.
    """
    kv, longest = config.kv_cache_config, longest_sequence(config, context)
    guess = -(-max(defaults.kv_tokens, longest) // span) if kv.max_tokens is None else None
    limits = [MAX_ELEMENTS // room.page_elements - 1 for room in rooms]
    for room in rooms:
        if room.free is not None:
            limits.append(int(room.free * kv.free_gpu_memory_fraction) // room.page_bytes)
            continue
        if room.most is not None:
            limits.append(room.most // room.page_bytes)
        if guess is not None:
            limits += [guess, -(-sizes.max_batch_size * longest // span)]
    if kv.max_tokens is not None:
        limits.append(kv.max_tokens // span)
    pages = min(limits)
    if pages < 1:
        room = max(rooms, key=lambda room: room.page_bytes)
        free = (room.most or 0) if room.free is None else room.free
        raise ConfigError(
            f"no room for the KV cache: a page of {span} tokens takes {room.page_bytes:,} bytes a device, and "
            f"{max(0, free):,} are free after the weights; use more devices or a smaller model"
        )
    return pages + 1, min(longest, pages * span + 1)
