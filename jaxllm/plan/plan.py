"""The plan of an engine: what it will allocate where, whether that fits, and how fast it could be."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import islice, product

import jax.numpy as jnp
import numpy as np

from jaxllm.config import EngineConfig
from jaxllm.engine.buckets import Bucket
from jaxllm.engine.sizes import DEFAULTS, Room, kv_cache_dtype, longest_sequence, memory_fraction_variable, pool_size
from jaxllm.engine.sizes import Sizes as BatchSizes
from jaxllm.engine.slots import Variant
from jaxllm.mapping import AXES, CpType, Mapping
from jaxllm.models.fit import check_mapping, place_experts
from jaxllm.parallel.expert import Dispatch
from jaxllm.parallel.layout import Layout
from jaxllm.plan.collectives import Collective, collectives
from jaxllm.plan.gpus import Gpu
from jaxllm.plan.roofline import Load, Roofline, Speed
from jaxllm.plan.sizes import Model, Sizes, quantized
from jaxllm.settings import ConfigError

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16), "float16": np.dtype(jnp.bfloat16)}


@dataclass(frozen=True, slots=True)
class Stage:
    """Bytes on each device of one pipeline stage.

    weights, kv, buffers: arrays that live as long as the engine. activations: an estimate of what a step needs beside
    them. free: what is left of the memory that XLA may use.
    """

    layers: range
    weights: int
    kv: int
    activations: int
    buffers: int
    free: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.activations + self.buffers


@dataclass(frozen=True, slots=True)
class Plan:
    """See the module. Sizes are bytes a device unless said otherwise; without `problems` the layout fits.

    max_batch_size, max_num_tokens: of each lane of attention data parallelism. tile: prompt tokens of a row.
    decode_bucket: the largest step of decodes alone, of one pipeline stage.
    usable: of a device's memory. pool_tokens: that all page pools hold together; pages: of one pool.
    nearest: layouts that fit, if this one does not.
    """

    model: Model
    config: EngineConfig
    mapping: Mapping
    gpu: Gpu
    usable: int
    dtype: str
    kv_dtype: str
    max_batch_size: int = 0
    max_num_tokens: int = 0
    max_seq_len: int = 0
    tile: int = 0
    decode_bucket: Bucket = field(default=Bucket(0, 0))
    page_tokens: int = 0
    pages: int = 0
    pool_tokens: int = 0
    stages: tuple[Stage, ...] = ()
    speeds: tuple[Speed, ...] = ()
    load: Load | None = None
    decode_collectives: tuple[Collective, ...] = ()
    prompt_collectives: tuple[Collective, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    nearest: tuple[Mapping, ...] = field(default=())

    @property
    def ok(self) -> bool:
        return not self.problems


def usable_memory(gpu: Gpu) -> int:
    """Bytes that XLA reserves of a device for everything that the engine allocates."""
    (share,) = memory_fraction_variable().values()
    return int(gpu.memory * float(share))


def make_plan(model: Model, config: EngineConfig, mapping: Mapping, gpu: Gpu, load: Load | None = None) -> Plan:
    """The plan of one layout, with the nearest that fit if it does not.

    Args:
        load: requests to estimate speeds for; None = prompt and output each half of the longest sequence, at most 1000.

    Raises:
        ValueError: a setting that the model takes on no layout.
    """
    model = quantized(model, config)
    if model.config is not None:
        place_experts(config.moe_config.load_balancer, model.config, ep=1)
    plan = _plan(model, config, mapping, gpu, load)
    if plan.ok:
        return plan
    return replace(plan, nearest=tuple(_nearest(model, config, mapping, gpu)))


def _plan(model: Model, config: EngineConfig, mapping: Mapping, gpu: Gpu, load: Load | None = None) -> Plan:
    dtype = DTYPES[config.dtype if config.dtype != "auto" else model.dtype]
    kept = None if model.config is None else model.config.quantization
    kv_dtype = kv_cache_dtype(config, dtype, kept is not None and kept.cache)
    page = config.kv_cache_config.tokens_per_block
    defaults = DEFAULTS["gpu"]
    plan = Plan(model, config, mapping, gpu, usable_memory(gpu), str(dtype), str(kv_dtype))
    longest, batch = longest_sequence(config, model.max_position), BatchSizes.choose(config, defaults, mapping)
    try:
        check_mapping(mapping, model, page_size=page, max_seq_len=longest)
        placed = None
        if model.config is not None:
            placed = place_experts(config.moe_config.load_balancer, model.config, mapping.ep)
        layout = Layout(mapping, dtype, Dispatch.of(config.moe_config), placed)
        sizes, span = model.lay_out(layout), layout.mapping.page_span(page)
    except ValueError as error:
        return replace(plan, problems=(str(error),))

    stages = mapping.stage_layers(model.num_layers)
    weights = [sizes.bytes(sizes.stage(layers)) for layers in stages]
    each_device = span // layout.mapping.stripes  # tokens of a page on each device
    page_bytes = [len(layers) * sizes.cache.elements * each_device * kv_dtype.itemsize for layers in stages]
    rooms = [
        Room(max(0, plan.usable - taken), each, sizes.cache.elements * each_device)
        for taken, each in zip(weights, page_bytes, strict=True)
    ]
    buffers = [_buffers(sizes, batch, layers) for layers in stages]
    scratch = [_activations(model, sizes, batch, layers, dtype.itemsize) for layers in stages]
    problems, notes = [], []
    pages, max_seq_len = 0, longest
    try:
        pages, max_seq_len = pool_size(config, batch, defaults, rooms, context=model.max_position, span=span)
    except ConfigError as error:
        problems.append(str(error))
    rows = []
    for layers, taken, each, fixed, work in zip(stages, weights, page_bytes, buffers, scratch, strict=True):
        free = plan.usable - taken - pages * each - fixed - work
        rows.append(Stage(layers, taken, pages * each, work, fixed, free))
    worst = min(rows, key=lambda row: row.free)
    if worst.free < 0 and not problems:
        problems.append(
            f"a step needs {_gib(worst.activations + worst.buffers)} GiB beside the weights and the KV cache, but only "
            f"{_gib(max(0, worst.free + worst.activations + worst.buffers))} GiB are left; lower "
            "kv_cache_config.free_gpu_memory_fraction, max_num_tokens or max_batch_size"
        )
    if worst.weights > plan.usable:
        problems = [
            f"the weights take {_gib(worst.weights)} GiB of each device's {_gib(plan.usable)} GiB; use more devices"
        ]
    if max_seq_len < longest and not problems:
        notes.append(f"the page pool holds less than max_seq_len = {longest}: sequences end at {max_seq_len} tokens")
    lanes = layout.size("requests")
    tokens = max(0, pages - 1) * span * lanes
    half = max(1, min(1000, max_seq_len // 2))
    load = load or Load(half, half)
    speeds: list[Speed] = []
    if not problems:
        roof = Roofline(model, sizes, stages, gpu, kv_dtype.itemsize, batch.max_num_tokens)
        most = max(1, min(batch.max_batch_size * lanes, tokens // (load.input + load.output)))
        speeds = [roof.speed(n, load) for n in sorted({n for n in (1, 8, 64) if n < most} | {most})]
    micro = -(-batch.max_batch_size * lanes // len(stages))
    return replace(
        plan,
        max_batch_size=batch.max_batch_size,
        max_num_tokens=batch.max_num_tokens,
        max_seq_len=max_seq_len,
        tile=batch.tile,
        decode_bucket=max(bucket for bucket in batch.buckets if not bucket.tiles),
        page_tokens=span,
        pages=pages,
        pool_tokens=tokens,
        stages=tuple(rows),
        speeds=tuple(speeds),
        load=load,
        decode_collectives=_step(model, sizes, stages, micro, prompt=False),
        prompt_collectives=_step(model, sizes, stages, batch.max_num_tokens * lanes, prompt=True),
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _step(model: Model, sizes: Sizes, stages: list[range], tokens: int, *, prompt: bool) -> tuple[Collective, ...]:
    """The collectives of a step through all stages, alike ones together."""
    merged: dict[tuple[object, ...], Collective] = {}
    for layers in stages:
        for c in collectives(model, sizes, layers, tokens, prompt=prompt):
            key = (c.kind, c.where, c.axes, c.bytes)
            merged[key] = replace(c, count=c.count + merged[key].count) if key in merged else c
    return tuple(merged.values())


def _buffers(sizes: Sizes, batch: BatchSizes, layers: range) -> int:
    """Arrays of the runner besides weights and pages: the last token of each slot; where tokens are sampled, what each
    sequence has said and, for each number of rows, the last changes to its logits (row, token and value)."""
    slots = sizes.layout.size("requests") * batch.max_batch_size + 1
    if layers.stop < len(sizes.layers):
        return 4 * slots
    rows = {bucket.rows * sizes.layout.size("requests") for bucket in batch.buckets}
    return 4 * slots + 2 * slots * sizes.padded_vocab + sum(12 * Variant.FULL.bias_capacity(n) for n in rows)


def _activations(model: Model, sizes: Sizes, batch: BatchSizes, layers: range, itemsize: int) -> int:
    """An estimate of the scratch memory of the largest step.

    The residual stream, its norm and one sum each in the width of the model; the widest intermediate with its input;
    on the last stage the logits in float32, once split over the vocabulary and once gathered for sampling.
    """
    own = max(bucket.tokens(batch.tile) for bucket in batch.buckets)
    spread = own * sizes.layout.size("requests")
    attention = own * 3 * sizes.query_width
    limit = sizes.layout.dispatch.max_tokens
    experts = spread if limit is None else min(spread, limit)
    ffn = 3 * max(spread * sizes.ffn_width, experts * sizes.expert_width)
    step = itemsize * (3 * own * model.hidden_size + max(attention, ffn))
    if layers.stop < len(sizes.layers):
        return step
    rows = max(bucket.rows for bucket in batch.buckets) * sizes.layout.size("requests")
    shards = sizes.shards(sizes.head.split())
    return max(step + 4 * rows * sizes.padded_vocab // shards, 4 * rows * sizes.padded_vocab * 3)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"


def _nearest(model: Model, config: EngineConfig, asked: Mapping, gpu: Gpu, count: int = 3) -> list[Mapping]:
    """Layouts that fit: of the same kind and number of devices if there are any, else with the fewest more."""
    axes = [axis for axis, size in zip(AXES, asked.shape, strict=True) if size > 1 or axis in ("pp", "tp")]
    smallest: float = DTYPES[config.dtype if config.dtype != "auto" else model.dtype].itemsize
    if model.config is None or model.config.quantization is not None or config.quantization is not None:
        smallest = 0.5

    def distance(mapping: Mapping) -> tuple[float, int]:
        return sum(abs(math.log2(a / b)) for a, b in zip(mapping.shape, asked.shape, strict=True)), -mapping.tp

    for factor in (1, 2, 4, 8, 16):
        devices = asked.world_size * factor
        if model.parameters * smallest / devices > usable_memory(gpu):
            continue
        divisors = [d for d in range(1, devices + 1) if devices % d == 0]
        candidates = []
        for shape in product(*(divisors if axis in axes else [1] for axis in AXES)):
            pp, cp, ep, tp = shape
            if math.prod(shape) != devices or shape == asked.shape:
                continue
            cp_type = asked.cp_type if cp > 1 or asked.cp_type is CpType.STAR else None
            partition = asked.pp_partition if pp == asked.pp else None
            candidates.append(replace(asked, pp=pp, cp=cp, ep=ep, tp=tp, cp_type=cp_type, pp_partition=partition))
        fits = (mapping for mapping in sorted(candidates, key=distance) if _plan(model, config, mapping, gpu).ok)
        if found := list(islice(fits, count)):
            return found
    return []
