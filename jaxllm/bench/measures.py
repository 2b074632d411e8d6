"""What is measured of an engine: loads through `LLM.generate`, and steps alone, without what the host does between."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxllm.bench.load import Lengths, Load, random_load
from jaxllm.settings import ConfigError

if TYPE_CHECKING:
    from jaxllm.engine.batch import PackedStep
    from jaxllm.llm import LLM

BARE_STEPS = 64
BARE_TOKENS = 16
"""Tokens that the requests of a bare step have generated at most, and one more for every step that their prompts take:
enough for all of them to decode together."""


def _decode(llm: LLM, load: Load) -> float:
    """Milliseconds per token over the steps in which all requests of the load decode, and nothing else is done."""
    log = llm._engine.iterations
    before = max((iteration.number for iteration in log.since(0)), default=0)
    generate(llm, load)
    batch = len(load.prompts)
    steps = [i for i in log.since(before) if not i.context and not i.waiting and i.running == batch]
    if not steps:
        raise ConfigError(
            f"the {batch} requests of {load.output_lens[0]} tokens never decoded together: the first had ended when "
            "the last began; raise the output length"
        )
    return 1e3 * sum(step.seconds for step in steps) * batch / sum(step.tokens for step in steps)


def _prefill(llm: LLM, load: Load) -> float:
    """Prompt tokens per second, from the submission of all prompts to the last first token."""
    outputs = generate(llm, load)
    began = min(output.timing.submitted for output in outputs)
    return load.input_tokens / (max(output.timing.first_token for output in outputs) - began)


def _throughput(llm: LLM, load: Load) -> float:
    """Output tokens per second over the whole of `LLM.generate`."""
    began = time.perf_counter()
    generate(llm, load)
    return load.output_tokens / (time.perf_counter() - began)


def _ttft(llm: LLM, load: Load) -> float:
    """Milliseconds from the submission of all prompts to the last first token."""
    return 1e3 * load.input_tokens / _prefill(llm, load)


MEASURES: dict[str, Callable[[LLM, Load], float]] = {
    "decode": _decode,
    "prefill": _prefill,
    "throughput": _throughput,
    "ttft": _ttft,
}


def generate(llm: LLM, load: Load) -> list[Any]:
    """The outputs of a load's requests, submitted at once. Raises the first request's error."""
    from jaxllm.sampling_params import SamplingParams

    params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in load.output_lens]
    outputs = llm.generate(load.prompts, params, use_tqdm=False)
    for output in outputs:
        if output.error is not None:
            raise output.error
    return outputs


def bare_step(llm: LLM, batch: int, context: int, vocab: int, steps: int = BARE_STEPS) -> float | None:
    """Milliseconds of a decode step with about `context` tokens that is launched again and again on the same input: no
    scheduler, no packing, no tokens read. None with a pipeline, where it would say nothing, and with the prefix cache
    on, whose pages it would write to.

    The median of three runs of `steps` steps, one right after the other: the first runs of a GPU that had nothing to do
    are faster than it can go on for long."""
    runner = llm._engine._runner
    if len(runner.stages) != 1 or llm.config.kv_cache_config.enable_block_reuse:
        return None
    return statistics.median(_launch_again(llm, decode_input(llm, batch, context, vocab), steps))


def _launch_again(llm: LLM, packed: PackedStep, steps: int = BARE_STEPS) -> list[float]:
    """Milliseconds of the step of an engine with one stage, of each of three runs of `steps` launches."""
    runner = llm._engine._runner
    (stage,) = runner.stages
    data = np.array(packed.data)
    program = stage.programs[packed.shape.bucket]
    times = []
    for _ in range(4):
        began = time.perf_counter()
        for _ in range(steps):
            token_R, _, _, runner._last_token, stage.kv = program(stage.weights, stage.kv, runner._last_token, data)
        token_R.block_until_ready()
        times.append(1e3 * (time.perf_counter() - began) / steps)
    return times[1:]


def far_step(llm: LLM, batch: int, context: int, vocab: int) -> list[float]:
    """Milliseconds of a decode step of `batch` requests over pages that nobody filled: how fast memory is read does not
    depend on what is there, and a prompt of a million tokens takes minutes.

    Raises ValueError with a pipeline, and for more tokens than the page pool or a request's page table holds.
    """
    from jaxllm.engine.step import LaneSteps, Step

    runner = llm._engine._runner
    if len(runner.stages) != 1:
        raise ValueError("a step alone says nothing of a pipeline; give pipeline_parallel_size 1")
    layout, (pool, _, _, page, _) = runner.functions.layout, runner.stages[0].kv[0].shape
    lanes, stripes = layout.size("requests"), layout.mapping.stripes
    rows = -(-batch // lanes)
    bucket = runner._picker.pick(rows, 0)
    packed = runner.packer.pack(LaneSteps([Step() for _ in range(lanes)]), bucket)
    width, free = -(-context // (page * stripes)), pool // layout.size("pages") - 1
    if width > packed.shape.width or rows * width > free:
        raise ValueError(
            f"{batch} x {context} tokens are more than the page pool ({free * page * stripes} tokens) or a request "
            f"({packed.shape.width * page * stripes}) holds; raise max_seq_len, or lower the row's batch or input_len"
        )
    parts = packed.shape.unpack(packed.data)
    pages = 1 + np.random.default_rng(0).permutation(free)[: rows * width]
    parts.pages_RW[:, :, :rows, :width] = pages.reshape(rows, width)
    parts.positions_T[:, :, :rows] = context - 1
    return _launch_again(llm, packed)


def step_sums(llm: LLM, batch: int, context: int, vocab: int) -> list[float]:
    """Milliseconds of the sums of a decode step of `batch` requests: after the embedding and twice in each layer, each
    with the residual and the norm after it. Alone in a program, where no rank waits for another one's products."""
    from jaxllm.bench.comm import sum_seconds

    runner = llm._engine._runner
    functions = runner.functions
    rows = -(-batch // functions.layout.size("requests"))
    seconds = sum_seconds(functions, rows)
    return [1e3 * (2 * functions.cfg.num_layers + 1) * one for one in seconds]


STEPS: dict[str, Callable[[LLM, int, int, int], list[float]]] = {"step": far_step, "sums": step_sums}
"""Rows of no load: (engine, batch, tokens of context, vocabulary) -> milliseconds of each repetition."""


def decode_input(llm: LLM, batch: int, context: int, vocab: int) -> PackedStep:
    """A packed step in which `batch` requests decode, a little short of `context` tokens each (see BARE_TOKENS)."""
    runner = llm._engine._runner
    seen: list[PackedStep] = []
    forward = runner._forward

    def noted(packed: PackedStep) -> Any:
        if not packed.shape.bucket.tiles:
            seen.append(dataclasses.replace(packed, data=packed.data.copy()))  # its memory is used again
        return forward(packed)

    # The first request goes on while the prompts of the others are computed.
    length = BARE_TOKENS + batch * context // (llm.config.max_num_tokens or 2048)
    prompt = max(1, context - length)
    runner._forward = noted  # type: ignore[method-assign]
    try:
        generate(llm, random_load(batch, Lengths(prompt, prompt), Lengths(length, length), vocab, 1, 0))
    finally:
        del runner._forward
    # Of those with the most requests, the one in which they have come furthest.
    return max(seen, key=lambda packed: (len(packed.rows), int(packed.sampled()[1][packed.rows].sum())))
