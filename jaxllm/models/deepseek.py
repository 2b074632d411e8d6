"""DeepSeek-V3 and R1: latent attention, and experts chosen by groups beside shared ones (arXiv 2412.19437)."""

from __future__ import annotations

import math
from dataclasses import replace

from jaxllm.layers.mla import LatentConfig
from jaxllm.layers.rope import RopeConfig
from jaxllm.models import hf
from jaxllm.models.config import ExpertsConfig, ModelConfig
from jaxllm.models.fields import Fields


def v3_from_hf(fields: Fields) -> ModelConfig:
    fields.refuse("attention_bias", False, why="DeepSeek models with attention biases are not supported")
    fields.refuse("scoring_func", "sigmoid", why="DeepSeek-V3 scores experts by sigmoid")
    fields.refuse("topk_method", "noaux_tc", why="DeepSeek-V3 chooses experts by noaux_tc")
    fields.refuse("moe_layer_freq", 1, why="only experts in every layer after the first dense ones are supported")
    latent = LatentConfig(
        query_rank=fields.optional_integer("q_lora_rank"),
        rank=fields.integer("kv_lora_rank"),
        nope=fields.integer("qk_nope_head_dim"),
        rope=fields.integer("qk_rope_head_dim"),
        value=fields.integer("v_head_dim"),
        interleaved=fields.flag("rope_interleave", True),
    )
    if latent.rope % 2 or latent.rank % 2:
        raise fields.error(f"qk_rope_head_dim {latent.rope} and kv_lora_rank {latent.rank} must be even")
    # The head_dim of a config is that of the rotated part; heads are checked by what is kept of a token.
    fields.defaults = {**fields.defaults, "head_dim": latent.rope}
    num_layers, first = fields.integer("num_hidden_layers"), fields.integer("first_k_dense_replace", 3, low=0)
    config = hf.base_config(
        fields,
        "deepseek_v3",
        latent=latent,
        experts=_experts(fields),
        sparse_layers=tuple(layer >= first for layer in range(num_layers)) if first else (),
        # Layers after the last predict further tokens (MTP).
        unused_tensors=(rf"^model\.layers\.({'|'.join(str(num_layers + i) for i in range(9))})\.",),
    )
    scale = (latent.nope + latent.rope) ** -0.5 * _mscale(config.rope) ** 2
    return replace(config, num_kv_heads=1, head_dim=latent.width, attention_scale=scale)


def _experts(fields: Fields) -> ExpertsConfig:
    count = fields.integer("n_routed_experts", fields.get("num_local_experts"))
    groups, best = fields.integer("n_group", 8), fields.integer("topk_group", 4)
    chosen, width = hf.chosen_experts(fields, count, 8), fields.integer("moe_intermediate_size")
    if count % groups or count < 2 * groups:
        raise fields.error(f"n_group is {groups}, but {count} experts do not make groups of two or more, all equal")
    if best > groups or chosen > best * (count // groups):
        raise fields.error(f"topk_group is {best}, but {chosen} experts do not fit that many of {groups} groups")
    return ExpertsConfig(
        count=count,
        chosen=chosen,
        width=width,
        normalise=fields.flag("norm_topk_prob", True),
        sigmoid=True,
        bias=True,
        groups=groups,
        groups_chosen=best,
        scale=fields.number("routed_scaling_factor", 2.5),
        shared=width * fields.integer("n_shared_experts", 1),
    )


def _mscale(rope: RopeConfig) -> float:
    """What yarn adds to the temperature of attention over long contexts."""
    if rope.scaling != "yarn" or not rope.mscale_all_dim or rope.factor <= 1:
        return 1.0
    return 0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0
