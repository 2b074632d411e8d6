"""A plan as text for people, and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxllm.mapping import Mapping
from jaxllm.plan.collectives import Collective
from jaxllm.plan.compile import TOLERANCE, CompiledStage
from jaxllm.plan.plan import Plan

GIB = 2**30
SCHEMA = 1
"""Raised when a key of the JSON is renamed, removed or changes its meaning; new keys do not count."""


def text(plan: Plan, compiled: Sequence[CompiledStage] = ()) -> str:
    """The plan as it is printed, with what compiling it showed."""
    lanes = _lanes(plan)
    blocks = [_head(plan), _mesh(plan.mapping, plan.model.num_layers)]
    if plan.stages:
        blocks += [_memory(plan), _pool(plan)]
    if plan.speeds:
        blocks.append(_speeds(plan))
    for what, rows in (
        (f"decode step of {lanes * plan.max_batch_size} requests", plan.decode_collectives),
        (f"prompt step of {lanes * plan.max_num_tokens} tokens", plan.prompt_collectives),
    ):
        if rows:
            blocks.append(_collectives(what, rows))
    if compiled:
        blocks.append(_compiled(compiled))
    blocks += [f"note: {note}" for note in plan.notes]
    return "\n\n".join([*blocks, verdict(plan)])


def verdict(plan: Plan) -> str:
    """`OK`, or why not and what would fit."""
    if plan.ok:
        return "OK"
    near = "; ".join(f"{mapping} ({mapping.world_size} devices)" for mapping in plan.nearest)
    return "\n".join(
        [f"does not fit: {problem}" for problem in plan.problems] + [f"what fits: {near or 'nothing near'}"]
    )


def _head(plan: Plan) -> str:
    model, gpu = plan.model, plan.gpu
    active = f", {model.active / 1e9:.1f} B of them for a token" if model.active < 0.9 * model.parameters else ""
    return (
        f"{model.name}: {model.kind}, {model.num_layers} layers, {model.parameters / 1e9:.2f} B parameters{active}\n"
        f"{plan.mapping}: {plan.mapping.world_size} x {gpu.name}, {_gib(gpu.memory)} GiB each of which XLA uses "
        f"{_gib(plan.usable)}; activations {plan.dtype}, KV cache {plan.kv_dtype}"
    )


def _mesh(mapping: Mapping, num_layers: int) -> str:
    """Ranks by stage and cp row; expert groups are separated by bars."""
    try:
        stages = mapping.stage_layers(num_layers)
    except ValueError:
        return f"mesh pp={mapping.pp} cp={mapping.cp} ep={mapping.ep} tp={mapping.tp}"
    width = len(str(mapping.world_size - 1))
    lines = ["ranks (tp runs fastest" + (", expert groups between bars)" if mapping.ep > 1 else ")")]
    rank = 0
    for number, layers in enumerate(stages):
        for cp in range(mapping.cp):
            groups = []
            for _ in range(mapping.ep):
                groups.append(" ".join(f"{n:{width}}" for n in range(rank, rank + mapping.tp)))
                rank += mapping.tp
            name = f"  stage {number}, layers {layers.start}-{layers.stop - 1}" if cp == 0 else ""
            row = f"  cp {cp}" if mapping.cp > 1 else ""
            lines.append(f"{name:26}{row}   {' | '.join(groups)}")
    return "\n".join(lines)


def _memory(plan: Plan) -> str:
    lines = [f"{'GiB on each device':<22}{'weights':>9}{'KV':>9}{'activations':>13}{'buffers':>9}{'free':>9}"]
    for number, stage in enumerate(plan.stages):
        sizes = [stage.weights, stage.kv, stage.activations, stage.buffers, stage.free]
        cells = "".join(f"{size / GIB:>{w}.2f}" for size, w in zip(sizes, (9, 9, 13, 9, 9), strict=True))
        lines.append(f"  stage {number:<14}{cells}")
    return "\n".join(lines)


def _pool(plan: Plan) -> str:
    pools = _lanes(plan)
    many = f"{pools} pools of " if pools > 1 else ""
    pages = max(0, plan.pages - 1)
    return (
        f"KV cache: {many}{pages:,} pages of {plan.page_tokens} tokens = {plan.pool_tokens:,} tokens, or "
        f"{plan.pool_tokens // max(1, plan.max_seq_len):,} sequences of max_seq_len {plan.max_seq_len:,}"
    )


def _speeds(plan: Plan) -> str:
    assert plan.load is not None
    lines = [
        f"at the roofline, for prompts of {plan.load.input} tokens and {plan.load.output} generated ones:",
        f"  {'batch':>7}{'TPOT ms':>11}{'TTFT ms':>11}{'output tok/s':>15}",
    ]
    for speed in plan.speeds:
        row = f"{speed.batch:>7}{speed.tpot * 1e3:>11.2f}{speed.ttft * 1e3:>11.1f}{speed.throughput:>15,.0f}"
        lines.append(f"  {row}")
    return "\n".join([*lines, f"  {plan.gpu.source}; the formulas stand in jaxllm/plan/roofline.py"])


def _collectives(what: str, rows: tuple[Collective, ...]) -> str:
    total = sum(c.count for c in rows)
    lines = [f"collectives of a {what}: {total}"]
    for c in rows:
        where = c.where + ", if needed" * c.conditional
        lines.append(f"  {c.count:>5} x {c.kind:<15}{_bytes(c.bytes):>10}  over {'+'.join(c.axes):<9} {where}")
    return "\n".join(lines)


def _compiled(stages: Sequence[CompiledStage]) -> str:
    lines = ["compiled decode step, on each device"]
    for number, stage in enumerate(stages):
        agree = "as planned" if stage.difference <= TOLERANCE else f"but planned are {stage.planned:,}"
        found = ", ".join(f"{count} {name}" for name, count in stage.collectives.items()) or "no collectives"
        lines += [
            f"  stage {number}: {stage.seconds:.0f} s; arguments {stage.arguments:,} bytes, {agree} "
            f"({stage.difference:.2%} apart); scratch {stage.scratch / 2**20:.0f} MiB; {found}"
        ]
    return "\n".join(lines)


def as_json(plan: Plan, compiled: Sequence[CompiledStage] = ()) -> dict[str, Any]:
    """The plan as plain values; sizes in bytes, times in seconds."""
    model, mapping, gpu = plan.model, plan.mapping, plan.gpu
    return {
        "schema": SCHEMA,
        "ok": plan.ok,
        "problems": list(plan.problems),
        "notes": list(plan.notes),
        "nearest": [_mapping(near) for near in plan.nearest],
        "model": {
            "name": model.name,
            "kind": model.kind,
            "layers": model.num_layers,
            "parameters": model.parameters,
            "active_parameters": model.active,
            "engine_runs_it": model.config is not None,
        },
        "mapping": _mapping(mapping),
        "ranks": [
            dict(zip(("pp", "cp", "ep", "tp"), mapping.coordinates(r), strict=True)) for r in range(mapping.world_size)
        ],
        "gpu": {
            "name": gpu.name,
            "memory_bytes": gpu.memory,
            "usable_bytes": plan.usable,
            "bandwidth": gpu.bandwidth,
            "flops": gpu.flops,
            "link": gpu.link,
            "latency": gpu.latency,
            "source": gpu.source,
        },
        "settings": {
            "dtype": plan.dtype,
            "kv_dtype": plan.kv_dtype,
            "max_batch_size": plan.max_batch_size,
            "max_num_tokens": plan.max_num_tokens,
            "max_seq_len": plan.max_seq_len,
        },
        "stages": [
            {
                "layers": [stage.layers.start, stage.layers.stop],
                "weight_bytes": stage.weights,
                "kv_bytes": stage.kv,
                "activation_bytes": stage.activations,
                "buffer_bytes": stage.buffers,
                "total_bytes": stage.total,
                "free_bytes": stage.free,
            }
            for stage in plan.stages
        ],
        "kv_cache": {"pages": plan.pages, "page_tokens": plan.page_tokens, "tokens": plan.pool_tokens},
        "roofline": {
            "input_tokens": plan.load.input if plan.load else 0,
            "output_tokens": plan.load.output if plan.load else 0,
            "speeds": [
                {"batch": s.batch, "tpot_s": s.tpot, "ttft_s": s.ttft, "output_tokens_per_s": s.throughput}
                for s in plan.speeds
            ],
        },
        "collectives": {
            "decode": [_collective(c) for c in plan.decode_collectives],
            "prompt": [_collective(c) for c in plan.prompt_collectives],
        },
        "compiled": [
            {
                "seconds": stage.seconds,
                "argument_bytes": stage.arguments,
                "planned_bytes": stage.planned,
                "scratch_bytes": stage.scratch,
                "collectives": stage.collectives,
            }
            for stage in compiled
        ],
    }


def _mapping(mapping: Mapping) -> dict[str, Any]:
    return {
        "tp": mapping.tp,
        "pp": mapping.pp,
        "cp": mapping.cp,
        "ep": mapping.ep,
        "cp_type": mapping.cp_type.name if mapping.cp_type else None,
        "attention_dp": mapping.attention_dp,
        "devices": mapping.world_size,
    }


def _collective(c: Collective) -> dict[str, Any]:
    return {
        "kind": c.kind,
        "where": c.where,
        "axes": list(c.axes),
        "ranks": c.ranks,
        "count": c.count,
        "bytes": c.bytes,
        "conditional": c.conditional,
    }


def _lanes(plan: Plan) -> int:
    """Ranks of attention data parallelism, each with requests and a page pool of its own."""
    return plan.mapping.ep * plan.mapping.tp if plan.mapping.attention_dp else 1


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"


def _bytes(size: int) -> str:
    for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"
