"""DeepSeek-V2 (arXiv 2405.04434), V3 and R1 (2412.19437): latent attention, experts by groups, and shared ones."""

from __future__ import annotations

import math
from dataclasses import replace

from jaxllm.layers.mla import LatentConfig
from jaxllm.layers.rope import RopeConfig
from jaxllm.models import hf
from jaxllm.models.config import ExpertsConfig, ModelConfig
from jaxllm.models.fields import Fields


def v2_from_hf(fields: Fields) -> ModelConfig:
    fields.refuse("scoring_func", "softmax", why="DeepSeek-V2 scores experts by softmax")
    fields.refuse("norm_topk_prob", False, why="DeepSeek-V2 does not normalise the weights of the chosen experts")
    method = fields.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise fields.error(f"topk_method is {method!r}, DeepSeek-V2 has greedy and group_limited_greedy")
    count = fields.integer("n_routed_experts", 64)
    groups, best = (fields.integer("n_group"), fields.integer("topk_group")) if method != "greedy" else (1, 1)
    experts = ExpertsConfig(
        count=count,
        chosen=hf.chosen_experts(fields, count, 6),
        width=fields.integer("moe_intermediate_size"),
        normalise=False,
        groups=groups,
        groups_chosen=best,
        group_best=1,
        scale=fields.number("routed_scaling_factor", 1.0),
        shared=fields.integer("moe_intermediate_size") * fields.integer("n_shared_experts", 2),
    )
    return _from_hf(fields, "deepseek_v2", experts, fields.integer("first_k_dense_replace", 0, low=0))


def v3_from_hf(fields: Fields) -> ModelConfig:
    fields.refuse("scoring_func", "sigmoid", why="DeepSeek-V3 scores experts by sigmoid")
    fields.refuse("topk_method", "noaux_tc", why="DeepSeek-V3 chooses experts by noaux_tc")
    count = fields.integer("n_routed_experts", fields.get("num_local_experts"))
    width = fields.integer("moe_intermediate_size")
    experts = ExpertsConfig(
        count=count,
        chosen=hf.chosen_experts(fields, count, 8),
        width=width,
        normalise=fields.flag("norm_topk_prob", True),
        sigmoid=True,
        bias=True,
        groups=fields.integer("n_group", 8),
        groups_chosen=fields.integer("topk_group", 4),
        scale=fields.number("routed_scaling_factor", 2.5),
        shared=width * fields.integer("n_shared_experts", 1),
    )
    return _from_hf(fields, "deepseek_v3", experts, fields.integer("first_k_dense_replace", 3, low=0))


def _from_hf(fields: Fields, family: str, experts: ExpertsConfig, first: int) -> ModelConfig:
    """first: the first layer with experts."""
    fields.refuse("attention_bias", False, why="DeepSeek models with attention biases are not supported")
    fields.refuse("moe_layer_freq", 1, why="only experts in every layer after the first dense ones are supported")
    _check_groups(fields, experts)
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
    num_layers = fields.integer("num_hidden_layers")
    config = hf.base_config(
        fields,
        family,
        latent=latent,
        experts=experts,
        sparse_layers=tuple(layer >= first for layer in range(num_layers)) if first else (),
        # Layers after the last predict further tokens (MTP).
        unused_tensors=(rf"^model\.layers\.({'|'.join(str(num_layers + i) for i in range(9))})\.",),
    )
    scale = (latent.nope + latent.rope) ** -0.5 * _mscale(config.rope) ** 2
    return replace(config, num_kv_heads=1, head_dim=latent.width, attention_scale=scale)


def _check_groups(fields: Fields, experts: ExpertsConfig) -> None:
    count, groups, best = experts.count, experts.groups, experts.groups_chosen
    if count % groups or count < experts.group_best * groups:
        raise fields.error(f"n_group is {groups}, but {count} experts do not make groups of two or more, all equal")
    if best > groups or experts.chosen > best * (count // groups):
        raise fields.error(f"topk_group is {best}, but {experts.chosen} experts do not fit {best} of {groups} groups")


def _mscale(rope: RopeConfig) -> float:
    """What yarn adds to the temperature of attention over long contexts."""
    if rope.scaling != "yarn" or not rope.mscale_all_dim or rope.factor <= 1:
        return 1.0
    return 0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0
