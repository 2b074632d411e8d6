"""What scripts/bench_node.py measures: groups of rows, each a process with some of a host's GPUs, the best first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxllm.bench.suite import Row

SETTINGS: dict[str, Any] = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "progress": False,
    "max_seq_len": 2304,
    "token_buckets": [8192],
}
CACHE: dict[str, Any] = {"enable_block_reuse": False, "free_gpu_memory_fraction": 0.8}
FP8: dict[str, Any] = {"quantization": "fp8", "kv_cache_config": CACHE | {"dtype": "fp8"}}
BF16: dict[str, Any] = {"kv_cache_config": CACHE}
LONGEST = 1_000_000
BLOCK = 4096
"""Tokens of a block of star attention: a step computes one on every rank."""

ONE_H200_70B, EIGHT_H200_405B, FOUR_H200_235B = 2909.0, 3330.0, 4 * 3288.0
"""Output tokens a second that NVIDIA publishes for TensorRT-LLM in fp8 (Qwen3-235B-A22B: 3,288 for each of 4 GPUs)."""

SMALL, LARGE = "Llama-3.1-8B", "Llama-3.3-70B"


@dataclass(slots=True)
class Engine:
    """A model that `jaxllm plan` knows, with what its config.json is changed by, and settings of the engine."""

    model: str
    settings: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Group:
    """Rows that one process measures on `gpus` GPUs, in at most `seconds`. engines: by the names that rows have."""

    name: str
    gpus: int
    seconds: float
    engines: dict[str, Engine]
    rows: list[Row]


def engine(model: str, batches: Sequence[int], precision: dict[str, Any], **settings: Any) -> Engine:
    """Steps of these batch sizes only: every size is a program to compile."""
    sizes = {"max_batch_size": max(batches), "batch_buckets": sorted(batches)}
    return Engine(model, SETTINGS | sizes | precision | settings)


def speeds(
    name: str, batches: Sequence[int], *, prefill: bool = True, sums: Sequence[int] = (), steps: int = 128
) -> list[Row]:
    """Decode rows of so many steps, one of prompts, and what the sums over ranks take of a decode step."""
    rows = [Row(f"{name}-decode-{n}", "decode", name, n, 128, steps) for n in batches]
    rows += [Row(f"{name}-prefill-8x2048", "prefill", name, 8, 2048, 1)] if prefill else []
    return rows + [Row(f"{name}-sums-{n}", "sums", name, n, 128, 1) for n in sums]


def throughput(name: str, requests: int, peer: float | None = None) -> Row:
    load = {"batch": requests, "input_len": 1000, "output_len": 1000}
    return Row(f"{name}-throughput-{requests}", "throughput", name, **load, peer=peer, repeat=1, warm_up=False)


def tensor_parallel(
    model: str, gpus: int, precision: str, batches: Sequence[int], seconds: float, **more: Any
) -> Group:
    """A dense model over all of its GPUs. more: requests (of throughput), peer, prefill."""
    name = f"{model.lower()}-{precision}-tp{gpus}"
    made = engine(model, batches, FP8 if precision == "fp8" else BF16, tensor_parallel_size=gpus)
    rows = [throughput(name, more["requests"], more.get("peer"))] if "requests" in more else []
    rows += speeds(name, batches, prefill=more.get("prefill", True), sums=batches if gpus > 1 else ())
    return Group(name, gpus, seconds, {name: made}, rows)


def context(gpus: int, lengths: Sequence[int], star: Sequence[int] | None = None) -> list[Group]:
    """Llama-3.1-8B with each kind of context parallelism: prompts of these lengths, and decodes over long contexts.

    star: lengths of the prompts of star attention, to which long ones are cheap.
    """
    groups = []
    for kind in ("RING", "STAR", "HELIX", "ULYSSES"):
        name = f"{SMALL.lower()}-cp{gpus}-{kind.lower()}"
        chunk = BLOCK * gpus
        prompts = lengths if star is None or kind != "STAR" else star
        made = engine(
            SMALL,
            [1],
            BF16,
            context_parallel_size=gpus,
            cp_config={"cp_type": kind} | ({"block_size": BLOCK} if kind == "STAR" else {}),
            max_num_tokens=chunk,
            # A chunk of star attention may lie in one block, and in most steps each rank has one: two programs.
            token_buckets=[BLOCK, chunk] if kind == "STAR" else [chunk],
            max_seq_len=max([LONGEST, *lengths]) + 4 * BLOCK,
        )
        made.config["max_position_embeddings"] = made.settings["max_seq_len"]
        # Attention of a million tokens is 2.6e17 operations in this model: two minutes of four GPUs.
        rows = [Row(f"{name}-ttft-{n}", "ttft", name, 1, n, 1, repeat=1) for n in prompts]
        if kind == "HELIX":
            rows.insert(0, Row(f"{name}-step-{LONGEST}", "step", name, 1, LONGEST, 1))
        groups.append(Group(name, gpus, 60 + sum(rows_seconds(row, gpus) for row in rows), {name: made}, rows))
    return groups


def rows_seconds(row: Row, gpus: int) -> float:
    """About what a prompt of 8B parameters takes, at half of the speed of matrix products, and half as much again."""
    if row.kind != "ttft":
        return 5.0
    # Star attention looks at its own block, the first one and, for the last tokens, the whole.
    seen = 3 * BLOCK if "-star-" in row.name else row.input_len
    flops = 2 * 8e9 * row.input_len + 2 * row.input_len * seen * 4096 * 32
    return 5 + 1.5 * flops / (0.5 * 787e12 * gpus)


def mixture(tp: int, ep: int, batches: Sequence[int], seconds: float = 110) -> Group:
    """Mixtral-8x7B: experts over ep ranks, the columns of each over tp."""
    name = f"mixtral-8x7b-tp{tp}-ep{ep}"
    made = engine("Mixtral-8x7B", batches, BF16, tensor_parallel_size=tp, moe_expert_parallel_size=ep)
    return Group(name, tp * ep, seconds, {name: made}, speeds(name, batches, sums=[1, 64] if tp * ep > 1 else ()))


def experts_everywhere(gpus: int, requests: int, precision: str = "fp8") -> Group:
    """Qwen3-235B-A22B, its experts over all GPUs, requests split over them, too (attention data parallelism)."""
    name = f"qwen3-235b-a22b-{precision}-ep{gpus}-dp"
    each = -(-requests // gpus)
    made = engine(
        "Qwen3-235B-A22B",
        sorted({-(-64 // gpus), each}),
        FP8 if precision == "fp8" else BF16,
        tensor_parallel_size=1,
        moe_expert_parallel_size=gpus,
        enable_attention_dp=True,
    )
    prompts = 4  # of a rank: a step of 8,192 tokens
    if gpus == 2:  # 113 of 126 GiB are weights
        made.settings |= {"max_num_tokens": 2048, "token_buckets": [2048]}
        prompts = 2
    peer = FOUR_H200_235B if gpus == 4 and precision == "fp8" else None
    rows = [Row(f"{name}-decode-{n}", "decode", name, n, 128, 128, repeat=1) for n in sorted({64, requests})]
    rows.append(throughput(name, requests, peer))
    rows.append(Row(f"{name}-prefill-{prompts * gpus}x2048", "prefill", name, prompts * gpus, 2048, 1))
    return Group(name, gpus, 230, {name: made}, rows)


def groups(gpus: int, lengths: Sequence[int], requests: int) -> list[Group]:
    """All groups for a host with so many GPUs, the most valuable first.

    lengths: of the prompts of context parallelism. requests: of the throughput of the largest layouts.
    """
    if gpus == 2:
        return two(lengths, requests)
    batches, mixed = [1, 64, 256], [1, 16, 64, 256]
    # What needs fewer GPUs than there are runs side by side, beside the row of a single one.
    found = [
        tensor_parallel(LARGE, gpus, "fp8", batches, 200, requests=min(requests, 256)),
        alone(),
        tensor_parallel(SMALL, 1, "bf16", [1, 64], 90, prefill=False),
        tensor_parallel(SMALL, 2, "bf16", [1, 64], 90, prefill=False),
        tensor_parallel(LARGE, 2, "fp8", [1, 64], 110, prefill=False),
    ]
    if gpus == 8:
        found.append(tensor_parallel(LARGE, 4, "fp8", [1, 64], 110, prefill=False))
        found.append(tensor_parallel(SMALL, 4, "bf16", [1, 64], 90, prefill=False))
    found += [mixture(2, 1, mixed), mixture(1, 2, mixed), experts_everywhere(gpus, requests)]
    short = [n for n in lengths if n < LONGEST // 2]
    long = [n for n in lengths if n not in short]
    ring, star, helix, ulysses = context(gpus, short, star=lengths)
    found += [ring, helix, star, ulysses, tensor_parallel(SMALL, gpus, "bf16", [1, 64], 90, prefill=False)]
    wide, *others = eight() if gpus == 8 else [four()]
    found += [wide, mixture(2, gpus // 2, [1, 64]), *others]
    found += [tensor_parallel(LARGE, gpus, "bf16", batches, 150), mixture(1, gpus, [1, 64])]
    if gpus == 8:
        found.append(tensor_parallel(LARGE, 4, "bf16", batches, 150))
    for group in context(gpus, long, star=[]) if long else []:
        rows = [row for row in group.rows if row.kind == "ttft"]
        if rows:
            found.append(Group(f"{group.name}-long", gpus, group.seconds, group.engines, rows))
    return found


def alone() -> Group:
    """Llama-3.3-70B in fp8 on one GPU: as many requests at a time as its memory holds, twice as many in all."""
    at_once = 176
    group = tensor_parallel(LARGE, 1, "fp8", [1, 64, at_once], 260, prefill=False)
    name = group.name
    cache = FP8["kv_cache_config"] | {"free_gpu_memory_fraction": 0.92}  # 350,000 tokens
    group.engines[name].settings["kv_cache_config"] = cache
    group.rows = [throughput(name, 2 * at_once, ONE_H200_70B), *speeds(name, [64, 1], prefill=False)]
    return group


def two(lengths: Sequence[int], requests: int) -> list[Group]:
    """What fits two GPUs."""
    mixed = [1, 16, 64, 256]
    ring, _, helix, ulysses = context(2, lengths)
    helix.rows = helix.rows[:1]
    return [
        alone(),
        mixture(1, 1, mixed),  # beside it
        tensor_parallel(LARGE, 2, "fp8", [1, 64, 256], 150, requests=min(requests, 256)),
        helix,
        mixture(2, 1, mixed),
        mixture(1, 2, mixed),
        experts_everywhere(2, 80),
        tensor_parallel(LARGE, 2, "bf16", [1, 64], 110),
        tensor_parallel(SMALL, 1, "bf16", [1, 64], 90, prefill=False),
        tensor_parallel(SMALL, 2, "bf16", [1, 64], 90, prefill=False),
        ring,
        ulysses,
    ]


def four() -> Group:
    """Llama-3.1-405B in fp8 on four GPUs."""
    name = "llama-3.1-405b-fp8-tp4"
    made = engine("Llama-3.1-405B", [1, 64], FP8, tensor_parallel_size=4)
    # 64 requests of 2,000 tokens are 8 GiB of a GPU, of the 40 that the weights leave.
    made.settings["kv_cache_config"] = FP8["kv_cache_config"] | {"free_gpu_memory_fraction": 0.6}
    rows = [throughput(name, 64), *speeds(name, [1, 64], sums=[1, 64], steps=64)]
    return Group(name, 4, 230, {name: made}, rows)


def eight() -> list[Group]:
    """Llama-3.1-405B in fp8 on eight GPUs, in two stages of four and eight wide."""
    found = []
    for tp, pp in ((4, 2), (8, 1)):
        name = f"llama-3.1-405b-fp8-tp{tp}" + (f"-pp{pp}" if pp > 1 else "")
        made = engine("Llama-3.1-405B", [1, 64, 256], FP8, tensor_parallel_size=tp, pipeline_parallel_size=pp)
        rows = [throughput(name, 512, EIGHT_H200_405B)]
        rows += speeds(name, [1, 64, 256], sums=[1, 64] if pp == 1 else (), steps=64)
        found.append(Group(name, 8, 300, {name: made}, rows))
    return found
