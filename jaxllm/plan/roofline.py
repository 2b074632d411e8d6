"""The least time that steps can take on a layout: bytes over bandwidth or operations over peak, and the collectives.

    step     = max(bytes read / bandwidth, operations / peak) + collectives, for each pipeline stage
    bytes    = weights (of experts: those that the tokens choose) + keys and values of the context
    TPOT     = sum of the stages' steps; with pp stages each works on batch / pp requests while the others do
    TTFT     = sum of the stages' steps for one chunk of the prompt + (chunks - 1) x the slowest stage's
    tokens/s = batch x output / (output x TPOT + batch x chunks x the slowest stage's step / lanes)

Lanes are the ranks of attention data parallelism, which compute a prompt each at a time; else there is one.

What is not counted makes it slower: conditional collectives, launches, norms, sampling, the host, imbalance. An honest
engine gets 50-90 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxllm.kernels.grouped_matmul.tiles_cuda import MEAN
from jaxllm.mapping import CpType
from jaxllm.plan.collectives import collectives
from jaxllm.plan.gpus import Gpu
from jaxllm.plan.sizes import Model, Sizes, Weight


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of `input` prompt tokens and `output` generated ones."""

    input: int
    output: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds for each output token of a request and to the first one; output tokens per second of all requests."""

    batch: int
    tpot: float
    ttft: float
    throughput: float


@dataclass(frozen=True, slots=True)
class Roofline:
    """Times of one layout. stages: the layers of each pipeline stage."""

    model: Model
    sizes: Sizes
    stages: list[range]
    gpu: Gpu
    kv_itemsize: int
    max_num_tokens: int

    def speed(self, batch: int, load: Load) -> Speed:
        """The speed with `batch` requests running, halfway through their output."""
        context = load.input + load.output // 2
        micro = math.ceil(batch / len(self.stages))
        tpot = sum(self.step(stage, micro, context, prompt=False) for stage in self.stages)
        chunks = math.ceil(load.input / self.max_num_tokens)
        length = math.ceil(load.input / chunks)
        # The average chunk: queries of the whole prompt see (input + 1) / 2 keys on average.
        lanes = self.sizes.layout.size("requests")
        times = [self.step(stage, length * lanes, (load.input + 1) // 2, prompt=True) for stage in self.stages]
        ttft = sum(times) + (chunks - 1) * max(times)
        busy = load.output * tpot + batch * chunks * max(times) / lanes
        return Speed(batch, tpot, ttft, batch * load.output / busy)

    def step(self, stage: range, tokens: int, context: int, *, prompt: bool) -> float:
        """Seconds of one step of a stage: `tokens` tokens that see `context` earlier ones on average."""
        weights = self.sizes.stage(stage)
        read = sum(self._bytes(weight, tokens, prompt) for weight in weights)
        flops = sum(self._flops(weight, tokens, prompt) for weight in weights)
        layout, cache = self.sizes.layout, self.sizes.cache
        lanes, stripes = layout.size("requests"), layout.mapping.stripes
        tokens = -(-tokens // lanes) * lanes  # the busiest lane counts
        pairs = sum(
            tokens * self._visible(window, context, prompt) for window in self.model.windows[stage.start : stage.stop]
        )
        share = pairs / (lanes * stripes)
        flops += share * (cache.prompt_flops if prompt else cache.decode_flops)
        # The queries of a chunk share one reading of its context.
        read += share / (tokens / lanes if prompt else 1) * cache.elements * self.kv_itemsize
        exchange = collectives(self.model, self.sizes, stage, tokens, prompt=prompt)
        return max(read / self.gpu.bandwidth, flops / self.gpu.flops) + sum(
            c.seconds(self.gpu) for c in exchange if not c.conditional
        )

    def _visible(self, window: int | None, context: int, prompt: bool) -> int:
        star = self.sizes.layout.mapping.star
        if prompt and star is not None and self.sizes.layout.cp_type is CpType.STAR:
            context = min(context, star.anchor_size + star.block_size // 2)
        return context if window is None else min(window, context)

    def _bytes(self, weight: Weight, tokens: int, prompt: bool) -> float:
        if weight.lookup:
            return tokens * weight.shape[-1] * weight.itemsize
        touched = 1.0
        if weight.choice is not None:
            chosen, available = weight.choice
            touched = 1 - (1 - chosen / available) ** tokens
        return self.sizes.elements(weight) * weight.itemsize * touched

    def _flops(self, weight: Weight, tokens: int, prompt: bool) -> float:
        if weight.lookup or len(weight.shape) == 1:
            return 0
        if prompt and weight is self.sizes.head:
            tokens = 1  # only the last token of a prompt is sampled from
        # Tokens are split over the devices that do not split the weight itself.
        over = set(self.sizes.layout.axes("tokens" if prompt else "requests")) - weight.split()
        share, small = 1.0, False
        if weight.choice is not None:
            share = weight.choice[0] / weight.choice[1]
            small = tokens * share < MEAN  # an expert's tokens
        if weight.fp8 and not small:
            share /= self.gpu.fp8
        return 2 * self.sizes.elements(weight) * tokens / self.sizes.shards(over) * share
