"""Logits of every position of several ragged prompts, from one step of the real decoder over paged KV."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxllm.engine.batch import BatchShape
from jaxllm.engine.buckets import Bucket
from jaxllm.engine.forward import KV_AXES, StepFunctions
from jaxllm.mapping import Mapping
from jaxllm.models.checkpoint import checkpoint_shapes
from jaxllm.models.config import ModelConfig
from jaxllm.parallel.layout import Layout
from jaxllm.parallel.mesh import make_mesh
from jaxllm.weights.experts import split_experts
from jaxllm.weights.load import load_params
from jaxllm.weights.source import Source

PAGE_SIZE = 4


class FullLogits:
    """A model on `tp` devices in float32, run without scheduler or engine."""

    def __init__(self, cfg: ModelConfig, source: Source, tp: int = 1) -> None:
        self.cfg = cfg
        self.mesh = make_mesh(Mapping(tp=tp))
        layout = Layout(Mapping(tp=tp), np.dtype(np.float32))
        self.functions = StepFunctions(cfg, layout, self.mesh)
        if cfg.experts is not None:
            names = cfg.experts.names
            parts = (names.module, names.gate, names.up, names.down)
            source = split_experts(source, *parts, interleaved=names.interleaved)
        params = load_params(self.functions.specs, checkpoint_shapes(cfg), source, self.mesh)
        self.weights = self.functions.flatten(params)
        self.kv_shape = self.functions.kv_shape(PAGE_SIZE)

    def __call__(self, prompts: Sequence[Sequence[int]], tile: int | None) -> list[np.ndarray]:
        """Float32 logits [len(prompt), vocab] of each prompt.

        `tile` prompt tokens share one row of the batch; with None every token is a decode row, as if the prompts were
        being generated, except that all of their keys and values are written at once.
        """
        widths = [-(-len(prompt) // PAGE_SIZE) for prompt in prompts]
        # Only one position of a row gives logits, so there are as many rows as tokens; tiles left over are padding.
        total = sum(map(len, prompts))
        bucket, tile = (Bucket(total, 0), 1) if tile is None else (Bucket(0, total), tile)
        shape = BatchShape(bucket, tile, max(widths))
        packed = np.zeros(shape.shape, np.int32)
        tokens, positions, slots, last, pages, _ = shape.unpack(packed[0, 0])
        positions[:] = -1
        slots[:] = np.arange(len(slots))  # decode rows find their tokens there; rows past the last one are padding
        # Pages in no order, so that a mistake in the page table shows.
        free = np.random.default_rng(0).permutation(np.arange(1, sum(widths) + 1)).tolist()
        tile_row = out_row = 0
        for prompt, width in zip(prompts, widths, strict=True):
            n, tiles = len(prompt), -(-len(prompt) // tile)
            start = tile_row * tile
            tokens[start : start + n] = prompt
            positions[start : start + n] = np.arange(n)
            pages[tile_row : tile_row + tiles, :width] = [free.pop() for _ in range(width)]
            last[out_row : out_row + n] = np.arange(start, start + n)
            tile_row += tiles
            out_row += n
        page_shape = (sum(widths) + 1, *self.kv_shape)
        place = self.functions.layout.sharding(self.mesh, *KV_AXES)
        kv = [jax.device_put(jnp.zeros(page_shape, jnp.float32), place) for _ in range(self.cfg.num_layers)]
        everywhere = NamedSharding(self.mesh, jax.sharding.PartitionSpec())
        step = jax.jit(self.functions.forward(shape))
        with jax.default_matmul_precision("highest"):
            out = step(
                self.weights,
                kv,
                jax.device_put(tokens[:total], everywhere),
                jax.device_put(packed, everywhere),
            )
        self.hidden = None if out[2] is None else np.asarray(out[2])
        self.positions = positions
        logits = np.asarray(out[1])[:total, : self.cfg.vocab_size]
        return np.split(logits, np.cumsum([len(prompt) for prompt in prompts])[:-1])
