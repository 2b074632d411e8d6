"""From a configuration to an engine that is ready: files, mesh, weights, page pool, compiled programs; each timed."""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from jaxllm import placement
from jaxllm.config import EngineConfig
from jaxllm.engine.balancer import Balancer
from jaxllm.engine.blocks import PagePool
from jaxllm.engine.compilation_cache import enable_compilation_cache
from jaxllm.engine.devices import find, host_memory
from jaxllm.engine.forward import StepFunctions
from jaxllm.engine.lanes import Lanes
from jaxllm.engine.pipeline import Stage
from jaxllm.engine.runner import Runner
from jaxllm.engine.scheduler import Scheduler
from jaxllm.engine.sizes import DEFAULTS, HOST_SHARE, Room, Sizes, kv_cache_dtype, pool_size
from jaxllm.engine.slots import SlotTable
from jaxllm.engine.tokenizer import Tokenizer, load_tokenizer
from jaxllm.kernels.cuda.checks import begin_checks
from jaxllm.kernels.linear import packed
from jaxllm.models.checkpoint import checkpoint_shapes
from jaxllm.models.config import ModelConfig
from jaxllm.models.fit import check_mapping, place_experts
from jaxllm.models.quantization import choose
from jaxllm.models.registry import config_from_gguf, config_from_hf
from jaxllm.parallel.expert import Dispatch
from jaxllm.parallel.layout import Layout
from jaxllm.parallel.mesh import make_mesh, stage_mesh
from jaxllm.settings import ConfigError
from jaxllm.weights.dummy import dummy_params
from jaxllm.weights.experts import split_experts
from jaxllm.weights.load import load_params
from jaxllm.weights.resolve import ModelFiles, resolve_model
from jaxllm.weights.scaled import scaled

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Started:
    """The parts of a running engine; `seconds` tells how long each phase of the start took."""

    tokenizer: Tokenizer | None
    model_config: ModelConfig
    runner: Runner
    slots: SlotTable
    scheduler: Scheduler | Lanes
    seconds: dict[str, float]
    end_token_ids: tuple[int, ...]


def start(config: EngineConfig) -> Started:
    """Builds the parts of an engine.

    Raises:
        ConfigError: the settings do not fit the model or the devices.
        CheckpointError, ModelConfigError, TokenizerError: the model's files cannot be used (all are ValueErrors).
    """
    seconds: dict[str, float] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - began

    with phase("devices"):
        devices = find()
        mapping = config.resolve_mapping(len(devices), devices[0].platform)
    if config.moe_config.alias:
        logger.info("moe_config.backend %s is TensorRT-LLM's: AUTO chooses here", config.moe_config.alias)
    with phase("files"):
        files = resolve_model(config.model, need_weights=config.load_format != "dummy")
        cfg = quantized(model_config(files), config)
        page_size = config.kv_cache_config.tokens_per_block
        check_mapping(mapping, cfg, page_size=page_size, max_seq_len=config.max_seq_len)
        balancer = config.moe_config.load_balancer
        placed = place_experts(balancer, cfg, mapping.ep)
        tokenizer = None
        if not config.skip_tokenizer_init:
            tokenizer = load_tokenizer(config.tokenizer if config.tokenizer is not None else files)
    with phase("kernels"):
        enable_compilation_cache(config.compilation_cache_dir)
        mesh = make_mesh(mapping)
        platform = mesh.devices.flat[0].platform
        defaults = DEFAULTS["cpu" if platform == "cpu" else "gpu"]
        dtype = np.dtype(_dtype(config.dtype if config.dtype != "auto" else defaults.dtype or cfg.dtype))
        layout = Layout(mapping, dtype, Dispatch.of(config.moe_config), placed)
        stages = [
            StepFunctions(cfg, layout, stage_mesh(mesh, index), layers)
            for index, layers in enumerate(mapping.stage_layers(cfg.num_layers))
        ]
        sizes = Sizes.choose(config, defaults, mapping)
        # Before anything else takes memory for a while, so that the page pool, which programs are compiled for, has the
        # same size at every start.
        free = [_free_bytes(functions.mesh) for functions in stages]
        checking = begin_checks(cfg.quantization is not None, cfg.has_latents, cfg.experts is not None)
    with phase("weights"):
        weights = load_weights(config, cfg, files, stages)
        for functions, params in zip(stages, weights, strict=True):
            _fill_tables(functions, params)
        jax.block_until_ready(weights)
    with phase("kv_cache"):
        kv_dtype = kv_cache_dtype(config, dtype, cfg.quantization is not None and cfg.quantization.cache)
        stripe, host = mapping.stripe(page_size), int(HOST_SHARE * host_memory()) // len(mesh.local_devices)
        rooms = [
            _page_room(functions, stripe, kv_dtype, None if before is None else before - _bytes(held), host)
            for functions, before, held in zip(stages, free, weights, strict=True)
        ]
        span = mapping.page_span(page_size)
        num_pages, max_seq_len = pool_size(config, sizes, defaults, rooms, context=cfg.max_position, span=span)
        if config.max_seq_len is None and max_seq_len < cfg.max_position:
            logger.warning("max_seq_len lowered from %d to %d by the KV cache", cfg.max_position, max_seq_len)
        asked = config.kv_cache_config.max_tokens or 0
        if (num_pages - 1) * span < asked // span * span:
            logger.warning(
                "kv_cache_config.max_tokens lowered from %d to %d: no more fit", asked, (num_pages - 1) * span
            )
        lanes = layout.size("requests")
        slots = SlotTable(
            lanes * sizes.max_batch_size,
            config.seed,
            None if tokenizer is None else lambda text: tokenizer.encode(text, add_special_tokens=False),
            len(_end_tokens(cfg, tokenizer)),
        )
        make_stage = partial(Stage, num_pages=num_pages, page_size=page_size, kv_dtype=kv_dtype)
        runner = Runner(
            list(map(make_stage, stages, weights)),
            buckets=sizes.buckets,
            tile=sizes.tile,
            page_size=page_size,
            max_batch_size=lanes * sizes.max_batch_size,
            max_seq_len=max_seq_len,
            slots=slots,
            micro_batches=sizes.micro_batches,
            repeats=config.num_scheduler_steps,
        )
        del weights
        if balancer is not None and balancer.layer_updates_per_iter:
            moving = {"layers_per_step": balancer.layer_updates_per_iter, "every": balancer.iters_per_reading}
            runner.balancers = [Balancer(stage, **moving) for stage in runner.stages if stage.functions.mixtures]
    with phase("compile"):
        _compile(runner, config.progress)
    with phase("checks"):
        agreed = checking.join()
        if not agreed:  # programs that were traced meanwhile hold what has been turned off
            jax.clear_caches()
            _compile(runner, config.progress)
    with phase("warm_up"):
        for stage in runner.stages:
            stage.allocate()
        if platform != "cpu":
            _check_scratch(runner, mesh)
            runner.warm_up()
    ends = _end_tokens(cfg, tokenizer)
    scheduler = _make_scheduler(config, sizes, lanes, num_pages, span, max_seq_len, ends)
    logger.info("ready: %s", ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))
    return Started(tokenizer, cfg, runner, slots, scheduler, seconds, ends)


def model_config(files: ModelFiles) -> ModelConfig:
    """The sizes of a resolved model."""
    if files.config is not None:
        return config_from_hf(files.config, files.generation or None)
    assert files.metadata is not None
    tensors = None
    if files.kind != "none":
        source = files.open()
        tensors = set(source.tensors)
        source.close()
    return config_from_gguf(files.metadata, tensors, files.rope_factors)


def quantized(cfg: ModelConfig, config: EngineConfig) -> ModelConfig:
    """The model with its matrices as the settings want them kept. Raises ValueError."""
    head, widen = config.quantize_lm_head, config.dequantize_weights
    return replace(cfg, quantization=choose(cfg.quantization, config.quantization, head=head, widen=widen))


def _make_scheduler(
    config: EngineConfig,
    sizes: Sizes,
    lanes: int,
    num_pages: int,
    page_size: int,
    max_seq_len: int,
    eos_token_ids: tuple[int, ...],
) -> Scheduler | Lanes:
    policy, balance = config.scheduler_config, config.attention_dp_config
    by_priority = policy.waiting_queue_policy == "priority"
    schedulers = [
        Scheduler(
            PagePool(num_pages, page_size, config.kv_cache_config.enable_block_reuse),
            max_batch_size=sizes.max_batch_size,
            max_num_tokens=sizes.max_num_tokens,
            max_seq_len=max_seq_len,
            tile=sizes.scheduled_tile,
            max_tiles=sizes.max_tiles,
            first_slot=lane * sizes.max_batch_size,
            policy=policy.capacity_scheduler_policy,
            chunked_prefill=config.enable_chunked_prefill,
            eos_token_ids=eos_token_ids,
            priority_queue=by_priority,
            micro_batches=sizes.micro_batches,
            tile_counts={bucket.tiles for bucket in sizes.buckets if bucket.tiles},
        )
        for lane in range(lanes)
    ]
    if lanes == 1:
        return schedulers[0]
    return Lanes(
        schedulers,
        balance=balance.enable_balance,
        timeout_iters=balance.timeout_iters,
        batching_wait_iters=balance.batching_wait_iters,
        priority_queue=by_priority,
    )


def load_weights(
    config: EngineConfig, cfg: ModelConfig, files: ModelFiles, stages: list[StepFunctions]
) -> list[dict[str, jax.Array]]:
    """The parameters of each stage, on its devices."""
    if config.load_format == "dummy":
        return [dummy_params(stage.specs, stage.mesh, config.seed) for stage in stages]
    source = scaled(files.open(), None if cfg.quantization is None else cfg.quantization.stored)
    if cfg.experts is not None:
        names = cfg.experts.names
        parts = (names.module, names.gate, names.up, names.down)
        source = split_experts(source, *parts, interleaved=names.interleaved)
    try:
        ignore = (*cfg.unused_tensors, *((r"^lm_head\.weight$",) if cfg.tie_embeddings else ()))
        cpu = stages[0].mesh.devices.flat[0].platform == "cpu"
        load = partial(
            load_params,
            shapes=checkpoint_shapes(cfg),
            source=source,
            keep_quantized=cpu and not config.dequantize_weights and packed.available(),
            ignore=ignore,
            progress=config.progress,
        )
        return [load(stage.specs, mesh=stage.mesh) for stage in stages]
    finally:
        source.close()


def _fill_tables(functions: StepFunctions, params: dict[str, jax.Array]) -> None:
    """Tells the layers with experts which slot each expert is in."""
    placed, experts = functions.layout.placement, functions.cfg.experts
    if placed is None or experts is None:
        return
    everywhere = functions.layout.sharding(functions.mesh)
    for number in functions.mixtures:
        table = placement.table(placed.of(number, experts.count), experts.count)
        params[f"layers.{number - functions.layers.start}.mlp.slots"] = jax.device_put(table, everywhere)


def _page_room(functions: StepFunctions, stripe: int, kv_dtype: np.dtype, free: int | None, most: int) -> Room:
    elements = math.prod(functions.kv_shape(stripe)) // functions.layout.size("kv_heads")
    return Room(free, functions.num_layers * elements * kv_dtype.itemsize, elements, most)


def _bytes(arrays: dict[str, jax.Array]) -> int:
    """Bytes of arrays on the device of this process that has most of them."""
    held: Counter[jax.Device] = Counter()
    for array in arrays.values():
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return max(held.values(), default=0)


def _free_bytes(mesh: Mesh) -> int | None:
    """Bytes free on the fullest device; None where the platform does not tell (CPU)."""
    free = []
    for device in mesh.local_devices:
        stats = device.memory_stats()
        if not stats or "bytes_limit" not in stats:
            return None
        free.append(stats["bytes_limit"] - stats["bytes_in_use"])
    return min(free)


def _check_scratch(runner: Runner, mesh: Mesh) -> None:
    """ConfigError when the compiled programs need more scratch memory than the page pool has left."""
    free, need = _free_bytes(mesh), runner.scratch_bytes()
    if free is not None and need > free:
        raise ConfigError(
            f"a step needs {need / 2**30:.2f} GiB of scratch memory, but {free / 2**30:.2f} GiB are left beside the "
            "weights and the KV cache; lower kv_cache_config.free_gpu_memory_fraction or max_num_tokens"
        )


def _end_tokens(cfg: ModelConfig, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    if cfg.eos_token_ids:
        return cfg.eos_token_ids
    end = None if tokenizer is None else tokenizer.eos_token_id
    return () if end is None else (end,)


def _dtype(name: str) -> type:
    try:
        return {"float32": np.float32, "bfloat16": jax.numpy.bfloat16, "float16": jax.numpy.bfloat16}[name]
    except KeyError:
        raise ConfigError(f"dtype {name!r} is not supported; use float32 or bfloat16") from None


def _compile(runner: Runner, progress: bool) -> None:
    from tqdm import tqdm

    # Tracing holds the interpreter's lock, XLA does not: one worker more than cores keeps the cores busy.
    with tqdm(desc="Compiling", unit=" programs", total=runner.num_programs, disable=None if progress else True) as bar:
        runner.compile((os.cpu_count() or 1) + 1, lambda name: bar.update())
