"""What the decoder needs to know of a model, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxllm.layers.mla import LatentConfig
from jaxllm.layers.rope import RopeConfig
from jaxllm.models.quantization import Quantization


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """What a checkpoint calls the parts of a mixture of experts, each a part of a tensor's name.

    interleaved: it has stacks of experts in which rows of gate and up take turns; see `weights.interleaved`.
    """

    module: str = "mlp"
    router: str = "gate"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """The mixture of experts in a layer: a router gives each token `chosen` of `count` gated MLPs, `width` wide.

    normalise: the weights of the chosen ones are scaled so that they add up to one.
    sigmoid: the weights come from a sigmoid of the router's output, not from a softmax.
    bias: a number for each expert is added to the weights for the choice, and only for it.
    router_bias: the router's product has a bias. biases: the experts' products have.
    groups, groups_chosen: experts come from the best groups, by the sum of the `group_best` best experts of each.
    scale: of the weights, at the end. shared: width of an MLP that every token goes through besides; 0 for none.
    """

    count: int
    chosen: int
    width: int
    normalise: bool = True
    sigmoid: bool = False
    bias: bool = False
    router_bias: bool = False
    biases: bool = False
    groups: int = 1
    groups_chosen: int = 1
    group_best: int = 2
    scale: float = 1.0
    shared: int = 0
    names: ExpertNames = field(default_factory=ExpertNames)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer. Sizes are the model's own, before any padding for parallelism."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float = 1e-5
    rope: RopeConfig = field(default_factory=RopeConfig)
    local_rope: RopeConfig | None = None
    """Rope of the sliding-window layers where it differs (Gemma 3)."""
    layer_windows: tuple[int | None, ...] = ()
    """Sliding window per layer in tokens, None for full attention; empty means full attention everywhere."""
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    experts: ExpertsConfig | None = None
    """The mixture of experts in place of the MLP, whose width is `intermediate_size`; None for a dense model."""
    sparse_layers: tuple[bool, ...] = ()
    """Which layers have experts, where not all of them do."""
    qk_norm: bool = False
    activation: Literal["silu", "gelu_tanh", "gelu", "swiglu_clamped"] = "silu"
    latent: LatentConfig | None = None
    """Multi-head latent attention: then there is one KV head, and head_dim is the width of what is kept of a token."""
    attention_scale: float | None = None
    """Factor on q·k; None means head_dim ** -0.5."""
    attention_softcap: float | None = None
    sinks: bool = False
    """Each head has a number that counts as the score of one more key, whose value is zero (gpt-oss)."""
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    post_norms: bool = False
    """Norms after attention and after the MLP as well as before them (Gemma)."""
    norm_offset: float = 0.0
    """Added to norm weights at load time: 1.0 for Gemma, which stores them minus one."""
    unused_tensors: tuple[str, ...] = ()
    """Regular expressions of the checkpoint's tensors that the decoder does without."""
    dtype: str = "float32"
    """The checkpoint's own dtype."""
    quantization: Quantization | None = None
    """Which matrices are kept in fewer bits, and how."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def scale(self) -> float:
        return self.attention_scale if self.attention_scale is not None else self.head_dim**-0.5

    @property
    def rope_dim(self) -> int:
        """The part of a head that is rotated."""
        return self.head_dim if self.latent is None else self.latent.rope

    @property
    def has_latents(self) -> bool:
        """Whether latents are kept of a token, not keys and values."""
        return self.latent is not None

    @property
    def num_experts(self) -> int | None:
        return None if self.experts is None else self.experts.count

    def sparse(self, layer: int) -> bool:
        """Whether a layer has experts in place of an MLP."""
        return self.experts is not None and (not self.sparse_layers or self.sparse_layers[layer])

    @property
    def windows(self) -> tuple[int | None, ...]:
        return self.layer_windows or (None,) * self.num_layers
