"""Whether a parallel layout fits a model: the checks that need the model's sizes and nothing else."""

from __future__ import annotations

from typing import Protocol

from jaxllm.mapping import CpType, Mapping
from jaxllm.models.config import ModelConfig
from jaxllm.moe_config import MoeLoadBalancerConfig
from jaxllm.parallel.heads import HeadLayout
from jaxllm.placement import Placement


class ModelSizes(Protocol):
    """The sizes that decide whether a layout fits: those of a ModelConfig, or of a model that is only planned for."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def max_position(self) -> int: ...
    @property
    def num_experts(self) -> int | None: ...


def check_mapping(mapping: Mapping, cfg: ModelSizes, *, page_size: int, max_seq_len: int | None = None) -> None:
    """Whether the model can be cut like this.

    Args:
        page_size: tokens of a page of the KV cache on one device.
        max_seq_len: the longest sequence that will run; None = the model's context.

    Raises:
        ValueError: blocks of star attention that are not whole pages, fewer layers than stages, a `pp_partition` of
            another model, fewer heads than the ranks they are split over, experts that do not divide evenly, or a
            context that leaves some ranks of context parallelism without a page.
    """
    mapping.stage_layers(cfg.num_layers)
    if cfg.num_experts is not None and cfg.num_experts % mapping.ep:
        legal = [size for size in range(1, cfg.num_experts + 1) if cfg.num_experts % size == 0]
        raise ValueError(
            f"moe_expert_parallel_size = {mapping.ep} does not divide the model's {cfg.num_experts} experts; use one "
            f"of {legal}"
        )
    HeadLayout.plan(cfg.num_heads, cfg.num_kv_heads, head_ranks(mapping))
    if mapping.star is not None and mapping.cp > 1 and mapping.star.block_size % page_size:
        raise ValueError(
            f"cp_config.block_size = {mapping.star.block_size} must be a multiple of kv_cache_config.tokens_per_block "
            f"= {page_size}, because a rank keeps whole blocks in whole pages"
        )
    context = min(max_seq_len or cfg.max_position, cfg.max_position)
    if mapping.cp > 1 and context < mapping.cp * page_size:
        raise ValueError(
            f"context_parallel_size = {mapping.cp} with pages of {page_size} tokens needs a context of at least "
            f"{mapping.cp * page_size} tokens, but the longest sequence has {context}; use at most "
            f"{max(1, context // page_size)}, or smaller pages (kv_cache_config.tokens_per_block)"
        )


def place_experts(balancer: MoeLoadBalancerConfig | None, cfg: ModelConfig, ep: int) -> Placement | None:
    """Where the experts of a model go; None without a load balancer.

    Raises:
        ValueError: the model has no experts, fewer slots than experts, slots that do not divide evenly over `ep` ranks,
            or assignments of another model: of a layer without experts, of another number of slots, of an expert that
            there is not, or without one that there is.
    """
    if balancer is None:
        return None
    where = "moe_config.load_balancer"
    if cfg.experts is None:
        raise ValueError(f"{where} is set, but a {cfg.family} model has no experts; leave it out")
    E, given = cfg.experts.count, balancer.initial_global_assignments or {}
    slots = balancer.num_slots or len(next(iter(given.values()), range(E)))
    if slots < E:
        raise ValueError(f"{where}.num_slots = {slots} is less than the model's {E} experts; use at least {E}")
    if slots % ep:
        near = [n for n in (slots // ep * ep, (slots // ep + 1) * ep) if n >= E]
        raise ValueError(
            f"{where}.num_slots = {slots} does not divide evenly over moe_expert_parallel_size = {ep}; use "
            f"{' or '.join(map(str, near))}"
        )
    sparse = [layer for layer in range(cfg.num_layers) if cfg.sparse(layer)]
    for layer, experts in given.items():
        at = f"{where}.initial_global_assignments of layer {layer}"
        if layer not in sparse:
            raise ValueError(
                f"{at}: the layers with experts of this model are {sparse[0]} to {sparse[-1]}; is the file another "
                "model's?"
            )
        if len(experts) != slots:
            raise ValueError(f"{at} are {len(experts)}, but there are num_slots = {slots}; give one expert for each")
        wrong = [expert for expert in experts if not 0 <= expert < E]
        if wrong:
            raise ValueError(
                f"{at} name expert {wrong[0]}, but the model has {E}, from 0 on; is the file another model's?"
            )
        missing = sorted(set(range(E)) - set(experts))
        if missing:
            raise ValueError(f"{at} leave expert {missing[0]} without a slot; every expert needs one")
    layers = tuple((layer, tuple(experts)) for layer, experts in sorted(given.items()))
    return Placement(slots, layers, online=balancer.layer_updates_per_iter > 0)


def head_ranks(mapping: Mapping) -> int:
    """Ranks that the attention heads are split over."""
    ranks = 1 if mapping.attention_dp else mapping.ep * mapping.tp
    return ranks * mapping.cp if mapping.cp_type is CpType.ULYSSES else ranks
