"""What a checkpoint of a model must hold: the names of Hugging Face's files, and their shapes."""

from __future__ import annotations

from jaxllm.layers.mla import LatentConfig
from jaxllm.models.config import ExpertsConfig, ModelConfig


def checkpoint_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that a checkpoint of this model must hold."""
    q, kv, D, F = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim, cfg.hidden_size, cfg.intermediate_size
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
    }
    if cfg.latent is not None:
        layer |= _latent_shapes(cfg.latent, cfg.num_heads, D)
    else:
        layer |= {f"self_attn.{n}_proj.weight": (rows, D) for n, rows in (("q", q), ("k", kv), ("v", kv))}
        layer["self_attn.o_proj.weight"] = (D, q)
    mlp: dict[str, tuple[int, ...]] = {
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
    }
    if cfg.qkv_bias:
        layer |= {f"self_attn.{n}_proj.bias": (rows,) for n, rows in (("q", q), ("k", kv), ("v", kv))}
    if cfg.o_bias:
        layer["self_attn.o_proj.bias"] = (D,)
    if cfg.sinks:
        layer["self_attn.sinks"] = (cfg.num_heads,)
    if cfg.mlp_bias:
        mlp |= {"mlp.gate_proj.bias": (F,), "mlp.up_proj.bias": (F,), "mlp.down_proj.bias": (D,)}
    if cfg.qk_norm:
        layer |= {"self_attn.q_norm.weight": (cfg.head_dim,), "self_attn.k_norm.weight": (cfg.head_dim,)}
    if cfg.post_norms:
        layer |= {"pre_feedforward_layernorm.weight": (D,), "post_feedforward_layernorm.weight": (D,)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (cfg.vocab_size, D), "model.norm.weight": (D,)}
    experts = {} if cfg.experts is None else _expert_shapes(cfg.experts, D)
    for i in range(cfg.num_layers):
        parts = layer | (experts if cfg.sparse(i) else mlp)
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in parts.items()}
    if not cfg.tie_embeddings:
        shapes["lm_head.weight"] = (cfg.vocab_size, D)
    return shapes


def _latent_shapes(sizes: LatentConfig, num_heads: int, D: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "kv_a_proj_with_mqa.weight": (sizes.width, D),
        "kv_a_layernorm.weight": (sizes.rank,),
        "kv_b_proj.weight": (num_heads * (sizes.nope + sizes.value), sizes.rank),
        "o_proj.weight": (D, num_heads * sizes.value),
    }
    queries = num_heads * (sizes.nope + sizes.rope)
    if sizes.query_rank is None:
        shapes["q_proj.weight"] = (queries, D)
    else:
        shapes |= {
            "q_a_proj.weight": (sizes.query_rank, D),
            "q_a_layernorm.weight": (sizes.query_rank,),
            "q_b_proj.weight": (queries, sizes.query_rank),
        }
    return {f"self_attn.{name}": shape for name, shape in shapes.items()}


def _expert_shapes(experts: ExpertsConfig, D: int) -> dict[str, tuple[int, ...]]:
    names, F = experts.names, experts.width
    router = f"{names.module}.{names.router}"
    shapes: dict[str, tuple[int, ...]] = {f"{router}.weight": (experts.count, D)}
    if experts.router_bias:
        shapes[f"{router}.bias"] = (experts.count,)
    if experts.bias:
        shapes[f"{names.module}.gate.e_score_correction_bias"] = (experts.count,)
    if experts.shared:
        for name, shape in (("gate", (experts.shared, D)), ("up", (experts.shared, D)), ("down", (D, experts.shared))):
            shapes[f"{names.module}.shared_experts.{name}_proj.weight"] = shape
    for number in range(experts.count):
        for name, matrix in ((names.gate, (F, D)), (names.up, (F, D)), (names.down, (D, F))):
            shapes[f"{names.module}.experts.{number}.{name}.weight"] = matrix
            if experts.biases:
                shapes[f"{names.module}.experts.{number}.{name}.bias"] = matrix[:1]
    return shapes
