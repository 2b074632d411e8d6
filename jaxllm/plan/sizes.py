"""What a plan needs to know of a model: its parameters with their mesh axes, and what it caches for a token.

They are described by `models.decoder.param_specs`, the very declarations that the engine allocates from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Mapping as TypingMapping
from dataclasses import dataclass, replace

from jaxllm.config import EngineConfig
from jaxllm.formats import Format
from jaxllm.kernels.grouped_matmul.reference import ROOM
from jaxllm.models.checkpoint import checkpoint_shapes
from jaxllm.models.config import ModelConfig
from jaxllm.models.decoder import param_specs
from jaxllm.models.quantization import choose
from jaxllm.parallel.layout import Layout
from jaxllm.parallel.params import ParamSpec


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter, or several alike.

    shape: over all ranks, padding included. itemsize: bytes of an element, block scales included.
    axes: mesh axes that split each dimension, as `ParamSpec.axes`.
    choice: (chosen, available) of experts, of which a token uses some; None for what every token uses.
    lookup: an embedding table, of which a step reads a few rows. fp8: steps of many tokens multiply it in e4m3.
    """

    path: str
    shape: tuple[int, ...]
    itemsize: float
    axes: tuple[tuple[str, ...] | None, ...]
    choice: tuple[int, int] | None = None
    lookup: bool = False
    fp8: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def split(self) -> set[str]:
        """The mesh axes that it is split over."""
        return {name for names in self.axes for name in names or ()}


@dataclass(frozen=True, slots=True)
class Cache:
    """What one layer keeps of a token on one device, and what attention to it costs.

    arrays: elements of a token in each array of the layer (K and V, or the latents of MLA).
    decode_flops, prompt_flops: of all query heads of the device, for each pair of a query and a visible key.
    """

    arrays: tuple[int, ...]
    decode_flops: int
    prompt_flops: int

    @property
    def elements(self) -> int:
        return sum(self.arrays)


@dataclass(frozen=True, slots=True)
class Sizes:
    """A model as laid out by one Layout.

    embed, layers, norm, head: its parameters; tied: embed and head are one table.
    padded_vocab: over all ranks. query_heads, query_width: of a device. ffn_width, expert_width: of its widest
    activations in dense layers, and in those with experts, of which so many tokens are computed at a time as it says.
    """

    layout: Layout
    embed: Weight
    layers: tuple[tuple[Weight, ...], ...]
    norm: Weight
    head: Weight
    tied: bool
    cache: Cache
    padded_vocab: int
    query_heads: int
    query_width: int
    ffn_width: int
    expert_width: int = 0

    def shards(self, axes: set[str]) -> int:
        """Devices along these mesh axes."""
        mapping = self.layout.mapping
        sizes = {"cp": mapping.cp, "ep": mapping.ep, "tp": mapping.tp}
        return math.prod(sizes[axis] for axis in axes)

    def stage(self, layers: range) -> list[Weight]:
        """The parameters of the pipeline stage with these layers."""
        first, last = layers.start == 0, layers.stop == len(self.layers)
        out = [self.embed] if first else []
        for index in layers:
            out += self.layers[index]
        if last:
            out += [self.norm] if self.tied and first else [self.norm, self.head]
        return out

    def chosen(self, layers: range) -> list[tuple[int, bool]]:
        """For each of these layers with experts, how many a token gets, and whether there are shared ones besides."""
        return [
            (w.choice[0], any(".shared." in other.path for other in self.layers[i]))
            for i in layers
            for w in self.layers[i]
            if w.choice and w.path.endswith("down")
        ]

    def elements(self, weight: Weight) -> int:
        """Elements of a parameter on one device."""
        return weight.elements // self.shards(weight.split())

    def bytes(self, weights: list[Weight]) -> int:
        """What parameters take on one device."""
        return math.ceil(sum(self.elements(w) * w.itemsize for w in weights))


@dataclass(frozen=True, slots=True)
class Model:
    """A model to plan for, before anything is known of its layout.

    lay_out: its Sizes under a layout. parameters, active: of the checkpoint, and those that one token uses.
    """

    name: str
    kind: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden_size: int
    vocab_size: int
    max_position: int
    windows: tuple[int | None, ...]
    dtype: str
    parameters: int
    active: int
    num_experts: int | None
    lay_out: Callable[[Layout], Sizes]
    config: ModelConfig | None = None


def quantized(model: Model, config: EngineConfig) -> Model:
    """The model with its matrices as the settings want them kept. Raises ValueError."""
    if model.config is None:
        return model
    head, widen = config.quantize_lm_head, config.dequantize_weights
    chosen = choose(model.config.quantization, config.quantization, head=head, widen=widen)
    return (
        model if chosen == model.config.quantization else dense(model.name, replace(model.config, quantization=chosen))
    )


def dense(name: str, cfg: ModelConfig) -> Model:
    """A model that the engine runs."""
    parameters = active = sum(math.prod(shape) for shape in checkpoint_shapes(cfg).values())
    if cfg.experts is not None:
        each = 3 * cfg.experts.width * cfg.hidden_size
        active -= sum(map(cfg.sparse, range(cfg.num_layers))) * (cfg.experts.count - cfg.experts.chosen) * each
    return Model(
        name=name,
        kind=cfg.family if cfg.quantization is None else f"{cfg.family}, {cfg.quantization.format.kind} weights",
        num_layers=cfg.num_layers,
        num_heads=cfg.num_heads,
        num_kv_heads=cfg.num_kv_heads,
        hidden_size=cfg.hidden_size,
        vocab_size=cfg.vocab_size,
        max_position=cfg.max_position,
        windows=cfg.windows,
        dtype=cfg.dtype,
        parameters=parameters,
        active=active,
        num_experts=cfg.num_experts,
        lay_out=lambda layout: _dense_sizes(cfg, layout),
        config=cfg,
    )


def _dense_sizes(cfg: ModelConfig, layout: Layout) -> Sizes:
    # Alike layers have the same parameters: declare one, so that hundreds of layouts can be looked at in a second.
    kinds = [cfg.sparse(index) for index in range(cfg.num_layers)]
    layers: dict[bool, tuple[Weight, ...]] = {}
    for sparse in set(kinds):
        one = replace(cfg, num_layers=1, layer_windows=(), sparse_layers=(sparse,))
        weights = _weights(param_specs(one, layout), cfg, layout)
        layers[sparse] = tuple(weight for path, weight in weights.items() if path.startswith("layers."))
    embed = weights["embed.weight"]
    heads = layout.heads(cfg.num_heads, cfg.num_kv_heads)
    flops = 4 * heads.q_heads * cfg.head_dim
    return Sizes(
        layout=layout,
        embed=replace(embed, lookup=True),
        layers=tuple(layers[kind] for kind in kinds),
        norm=weights["norm.weight"],
        head=embed if cfg.tie_embeddings else weights["head.weight"],
        tied=cfg.tie_embeddings,
        cache=Cache((heads.kv_heads * cfg.head_dim,) * (1 if cfg.has_latents else 2), flops, flops),
        padded_vocab=embed.shape[0],
        query_heads=heads.q_heads,
        query_width=heads.q_heads * cfg.head_dim,
        ffn_width=-(-cfg.intermediate_size // layout.size("ffn")) if False in layers else 0,
        expert_width=_expert_width(cfg, layout) if True in layers else 0,
    )


def _expert_width(cfg: ModelConfig, layout: Layout) -> int:
    """All that the experts of a layer have for a token."""
    assert cfg.experts is not None
    share = ROOM * cfg.experts.chosen / layout.size("experts")
    return math.ceil(share * (cfg.experts.width / layout.size("expert_ffn") + cfg.hidden_size))


def _weights(specs: TypingMapping[str, ParamSpec], cfg: ModelConfig, layout: Layout) -> dict[str, Weight]:
    """Parameters by their paths; the arrays of a quantised one as one, with the bytes that its elements take in all."""
    found: dict[str, Weight] = {}
    for path, spec in specs.items():
        choice = None if cfg.experts is None or not spec.stacked else (cfg.experts.chosen, cfg.experts.count)
        whole = spec if spec.part is None else spec.part.whole
        path = path if spec.part is None else path.removesuffix(f".{spec.part.name}")
        # Dense products want one scale for each row, those of experts take groups of inputs.
        fp8 = spec.part is not None and (
            spec.part.format == Format("fp8") or (spec.part.format.kind == "fp8" and spec.stacked)
        )
        one = Weight(path, whole.shape, 0.0, whole.axes, choice, fp8=fp8)
        # Scales may be on more devices than the matrix.
        each = spec.nbytes / _shards(spec.axes, layout) * _shards(whole.axes, layout) / one.elements
        found[path] = replace(one, itemsize=each + (found[path].itemsize if path in found else 0.0))
    return found


def _shards(axes: tuple[tuple[str, ...] | None, ...], layout: Layout) -> int:
    """Devices that an array is split over."""
    sizes = {"cp": layout.mapping.cp, "ep": layout.mapping.ep, "tp": layout.mapping.tp}
    return math.prod(sizes[axis] for names in axes for axis in names or ())
