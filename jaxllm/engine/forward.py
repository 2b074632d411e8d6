"""The device step: one pure function `(weights, kv, last_token, batch) -> (tokens, logits, hidden, last_token, kv)`.

The whole step is one `shard_map` over the mesh: what a rank computes is written once in `models/decoder.py`, and no
collective appears that nobody wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.engine.batch import BatchShape
from jaxllm.kernels.all_reduce.api import Group, quantises
from jaxllm.kernels.all_reduce.api import all_reduce as all_reduce_few
from jaxllm.kernels.all_reduce.api import gather as gather_few
from jaxllm.kernels.all_reduce.api import scatter_sum as scatter_few
from jaxllm.kernels.linear import fp8_cuda
from jaxllm.kernels.linear.quantized import QuantizedWeight, Weight
from jaxllm.layers.embedding import greedy, vocab_logits
from jaxllm.layers.sampling import SampleOutput, token_logprobs
from jaxllm.models.config import ModelConfig
from jaxllm.models.decoder import Decoder, abstract, flat_variables
from jaxllm.parallel.collectives import Axes, Exchange, all_reduce, exchanging, gather_rows, rank, ranks
from jaxllm.parallel.context import AttentionBatch, KVPages
from jaxllm.parallel.layout import Layout
from jaxllm.parallel.mesh import partition
from jaxllm.parallel.params import ParamSpec

KV_AXES = ("pages", None, "kv_heads", None, None)
"""Logical axes of kv_PYKOH."""
MANY = 64
"""Tokens of a step whose bfloat16 products are left to cuBLAS; see `StepFunctions.compiler_options`."""


class StepFunctions:
    """The functions that are compiled for each bucket; they take weights as the flat list that `flatten` makes.

    layers: those of a pipeline stage, whose sub-mesh `mesh` then is; None: the whole model.
    """

    def __init__(self, cfg: ModelConfig, layout: Layout, mesh: Mesh, layers: range | None = None):
        layers = range(cfg.num_layers) if layers is None else layers
        model = abstract(cfg, layout, layers)
        variables = flat_variables(model)
        self.cfg = cfg
        self.layout = layout
        self.mesh = mesh
        self.layers = layers
        self.num_layers = len(layers)
        self.mixtures = [number for number in layers if cfg.sparse(number)]
        self.first = layers.start == 0
        self.last = layers.stop == cfg.num_layers
        self.paths = [path for path, _ in variables]
        self.specs: dict[str, ParamSpec] = {path: variable.spec for path, variable in variables}
        for _, variable in variables:
            # Where a weight came from must not tell layers apart that compute the same: they share one trace.
            variable.del_metadata("spec")
        self._graph, state = nnx.split(model)
        leaves, self._tree = jax.tree.flatten(state)
        # jax flattens the state in an order of its own; `_order[i]` is the path of its leaf i.
        numbered = jax.tree.unflatten(self._tree, range(len(leaves)))
        order = {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(numbered)}
        self._order = sorted(order, key=order.__getitem__)
        # Each array that a program takes costs the host a microsecond or more a step: what is small goes together. Not
        # on a GPU, which has its work ahead of time: there each row would be a copy, for a kernel that is not XLA's.
        self._together: dict[int, list[str]] = {}
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        for path, spec in self.specs.items():
            if on_cpu and len(spec.shape) == 1 and spec.axes == (None,) and spec.dtype == np.float32:
                self._together.setdefault(spec.shape[0], []).append(path)
        together = {path for paths in self._together.values() for path in paths}
        self._alone = [path for path in self.paths if path not in together]
        # Memory of GPUs for small sums over a tensor parallel group; None where XLA makes all sums, as on a CPU.
        self.group = Group.open(mesh, layout.axes("ffn"))
        stacks = [PartitionSpec()] * len(self._together)
        self._weight_specs = stacks + [partition(self.specs[path].axes) for path in self._alone]
        self._weight_specs += [] if self.group is None else [self.group.spec]

    def head(self, weights: dict[str, jax.Array]) -> Weight:
        """The parameter that logits are made with."""
        path = "embed.weight" if self.cfg.tie_embeddings else "head.weight"
        if path in weights:
            return weights[path]
        part = self.specs[f"{path}.values"].part
        assert part is not None
        values, scale, zero = (weights.get(f"{path}.{name}") for name in ("values", "scale", "zero"))
        assert values is not None and scale is not None
        return QuantizedWeight(values, scale, zero, part.format)

    @property
    def padded_vocab(self) -> int:
        """Width of the logits over all ranks."""
        path = "embed.weight" if self.cfg.tie_embeddings else "head.weight"
        return self.specs[path if path in self.specs else f"{path}.values"].shape[0]

    def kv_shape(self, page_size: int) -> tuple[int, int, int, int]:
        """Y, K, O, H of the page pools, over all ranks."""
        heads = self.layout.heads(self.cfg.num_heads, self.cfg.num_kv_heads)
        planes = 2 if self.cfg.latent is None else 1
        return (planes, heads.ranks * heads.kv_heads, page_size, self.cfg.head_dim)

    @property
    def loads(self) -> tuple[tuple[int, ...], PartitionSpec] | None:
        """Shape and place of the array that counts tokens, int32 [ranks, mixtures, E]; None where nobody wants it.

        Each rank of ep counts the tokens that it routes; each of cp those that it has, decodes among them.
        """
        if not self.layout.counts_loads or not self.mixtures or self.cfg.experts is None:
            return None
        mapping = self.layout.mapping
        return (mapping.cp * mapping.ep, len(self.mixtures), self.cfg.experts.count), PartitionSpec(("cp", "ep"))

    def weight_index(self, path: str) -> int:
        """Where a parameter that is an array of its own is in what `flatten` makes."""
        return len(self._together) + self._alone.index(path)

    def flatten(self, weights: dict[str, jax.Array]) -> list[jax.Array]:
        """The arrays that the programs take: on a CPU norm weights of one length stacked, then all others.

        Where sums go through memory that the GPUs share, what tells each of it comes last.
        """
        stack = jax.jit(lambda *rows: jnp.stack(rows), out_shardings=self.layout.sharding(self.mesh))
        stacks = [stack(*(weights[path] for path in paths)) for paths in self._together.values()]
        group = [] if self.group is None else [self.group.array]
        return [*stacks, *(weights[path] for path in self._alone), *group]

    def abstract_weights(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes of what `flatten` makes."""
        stacks = [((len(paths), size), np.dtype(np.float32)) for size, paths in self._together.items()]
        group = [] if self.group is None else [(self.group.array.shape, self.group.array.dtype)]
        alone = [(self.specs[path].shape, self.specs[path].dtype) for path in self._alone]
        return [
            jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, axes))
            for (shape, dtype), axes in zip(stacks + alone + group, self._weight_specs, strict=True)
        ]

    def _model(self, weights: list[jax.Array]) -> Decoder:
        stacks, alone = weights[: len(self._together)], weights[len(self._together) :]
        by_path = dict(zip(self._alone, alone, strict=True))
        for rows, paths in zip(stacks, self._together.values(), strict=True):
            by_path |= {path: rows[i] for i, path in enumerate(paths)}
        state = jax.tree.unflatten(self._tree, [by_path[path] for path in self._order])
        return nnx.merge(self._graph, state)

    def compiler_options(self, shape: BatchShape) -> dict[str, str | bool]:
        """Options of XLA for the step of a bucket.

        Weights and pages leave so little memory that XLA computes what is cheap anew for each layer, the page table of
        a step among it. Steps of decodes alone have a few MiB of scratch memory, and nothing to gain from that.

        From MANY tokens on, products go to cuBLASLt at once. On an H200 (jax 0.11.2, Llama-3.1-8B in bfloat16) steps of
        64, 128 and 256 tokens take 5.29, 6.25 and 9.45 ms so, and 5.47, 6.37 and 9.76 with XLA's Triton kernels to
        choose from, which also makes compiling half as long again. With fp8 weights an engine that had them to try had
        not started after 100 s: there, from what the own kernels leave on. Fewer tokens do better with them: without,
        XLA widens the bfloat16 output matrix to float32 for one token.
        """
        options: dict[str, str | bool] = {}
        if not shape.bucket.tiles:
            options["xla_disable_hlo_passes"] = "rematerialization"
        rows = shape.lanes * shape.bucket.decodes
        fp8 = any(spec.dtype == jnp.float8_e4m3fn for spec in self.specs.values())
        if shape.bucket.tiles or rows > (fp8_cuda.FEW if fp8 else MANY - 1):
            options["xla_gpu_enable_triton_gemm"] = False
        return options

    def forward(self, shape: BatchShape) -> Callable[..., tuple]:
        """The step for one bucket, as a function of (weights, kv, last_token, packed).

        It returns token_R, the most likely token of each row; logits_RV, float32 and split over the vocabulary;
        hidden_TD, the final hidden states of all tokens, those of each rank after those of the one before (None where
        no token is a prompt's: nobody wants them); last_token with token_R written; and the written pages. With
        attention data parallelism R is the rows of all ranks.

        The stages of a pipeline differ in what they have: all but the first take the stage before's x_TD as a last
        argument, and all but the last return only (x_TD, kv). Those between have no last_token: it is None.
        """
        layout, T, D = self.layout, shape.bucket.tokens(shape.tile), self.cfg.hidden_size
        prompts, requests, spread = layout.axes("prompts"), layout.axes("requests"), layout.spread(T, D)

        def step(
            weights: list[jax.Array],
            kv: list[KVPages],
            last_token: jax.Array | None,
            packed: jax.Array,
            *x_TD: jax.Array,
        ) -> tuple:
            batch = shape.unpack(_own_part(packed, prompts))
            slots_R, decodes = batch.slots_R, shape.bucket.decodes
            (x,) = x_TD or (batch.tokens_T,)
            if decodes and self.first:
                assert last_token is not None
                # Not x.at[:decodes].set(): a scatter over all of x, which crashes Shardy in jax 0.11.2.
                x = jnp.concatenate([last_token[slots_R[:decodes]], x[decodes:]])
            if shape.bucket.tiles and self.first:
                # No rank has such a token: padding is embedded as zeros, and stays so. Products of zeros take less
                # power, which is what bounds the speed of long steps on a GPU.
                x = jnp.where(batch.positions_T < 0, -1, x)
            exchange = None
            if self.group is not None:
                *weights, words = weights
                eight = quantises(self.group.ranks)
                exchange = Exchange(words, self.group.axes, all_reduce_few, scatter_few, gather_few, eight)
            model = self._model(weights)
            attention = AttentionBatch(
                decodes,
                shape.tile,
                batch.positions_T,
                batch.pages_RW,
                shape.unpack(packed[0]).positions_T[:, decodes:],
                batch.chunks_RC if shape.chunk_columns else None,
            )
            with exchanging(exchange):
                hidden_TD, kv = model(x, kv, attention)
            if not self.last:
                return hidden_TD, kv
            assert last_token is not None
            if shape.bucket.tiles:
                rows_RD = _last_rows(hidden_TD, batch.last_R, prompts, spread)
            else:  # every token is one of its own row, on every rank
                rows_RD = gather_rows(hidden_TD, spread)
            rows_RD = gather_rows(rows_RD, requests)
            slots_R = gather_rows(slots_R, requests)
            R = len(rows_RD)
            if shape.bucket.tiles and R == 1:  # without Triton, XLA widens the whole matrix to float32 for one row
                rows_RD = jnp.concatenate([rows_RD, jnp.zeros_like(rows_RD)])
            logits_RV = model.logits(rows_RD)[:R]
            with jax.named_scope("greedy"), exchanging(exchange):
                token_R = greedy(logits_RV, layout.axes("vocab"))
            hidden = hidden_TD if shape.bucket.tiles else None
            return token_R, logits_RV, hidden, last_token.at[slots_R].set(token_R), kv

        pages, stream = layout.partition(*KV_AXES), layout.stream(T, D)
        kv_specs = [pages] * self.num_layers + ([] if self.loads is None else [self.loads[1]])
        none = PartitionSpec()
        args = [self._weight_specs, kv_specs, none if self.first or self.last else None, layout.partition("requests")]
        return jax.shard_map(
            step,
            mesh=self.mesh,
            in_specs=tuple(args if self.first else [*args, stream]),
            out_specs=(none, layout.partition(None, "vocab"), stream if shape.bucket.tiles else None, none, kv_specs)
            if self.last
            else (stream, kv_specs),
            check_vma=False,
        )

    def token_logprobs(self, num_logprobs: int) -> Callable[[Weight, jax.Array, jax.Array], SampleOutput]:
        """Logprobs of given tokens after given hidden states, as a function of (head weight, hidden_TD, token_T)."""
        cfg, mesh, layout = self.cfg, self.mesh, self.layout

        def local(weight_VD: Weight, hidden_TD: jax.Array) -> jax.Array:
            return vocab_logits(hidden_TD, weight_VD, cfg.vocab_size, cfg.logit_softcap, layout.axes("vocab"))

        def run(weight_VD: Weight, hidden_TD: jax.Array, token_T: jax.Array) -> SampleOutput:
            logits_TV = jax.shard_map(
                local,
                mesh=mesh,
                in_specs=(layout.partition("vocab", None), PartitionSpec()),
                out_specs=layout.partition(None, "vocab"),
                check_vma=False,
            )(weight_VD, hidden_TD)
            logits_TV = jax.lax.with_sharding_constraint(logits_TV, layout.sharding(mesh, None, None))
            return token_logprobs(logits_TV, token_T, cfg.vocab_size, num_logprobs=num_logprobs)

        return run


def shapes_of(arrays: Any) -> Any:
    """What a tree of arrays looks like to a compiler: shapes, dtypes and shardings."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays)


def _own_part(packed: jax.Array, prompts: Axes) -> jax.Array:
    """This rank's part of its lane's batch, [length]."""
    return packed.reshape(-1) if ranks(prompts) == 1 else packed[0, rank(prompts)]


def _last_rows(hidden_TD: jax.Array, last_R: jax.Array, prompts: Axes, spread: Axes) -> jax.Array:
    """The hidden state that each row samples from, [R, D]; the one rank that has it gives it to all.

    last_R: its token, among those of all ranks of `spread`, over which rows are split; -1 on other ranks of `prompts`.
    """
    parts = (*prompts, *spread)
    if ranks(parts) == 1:
        return hidden_TD[last_R]
    rows = hidden_TD.shape[0]
    own_R = last_R - rank(spread) * rows
    here_R = (own_R >= 0) & (own_R < rows)
    return all_reduce(jnp.where(here_R[:, None], hidden_TD[jnp.clip(own_R, 0, rows - 1)], 0), parts)
