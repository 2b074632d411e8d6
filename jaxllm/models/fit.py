"""Whether a parallel layout fits a model: the checks that need the model's sizes and nothing else."""

from __future__ import annotations

from typing import Protocol

from jaxllm.mapping import CpType, Mapping
from jaxllm.parallel.heads import HeadLayout


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


def head_ranks(mapping: Mapping) -> int:
    """Ranks that the attention heads are split over."""
    ranks = 1 if mapping.attention_dp else mapping.ep * mapping.tp
    return ranks * mapping.cp if mapping.cp_type is CpType.ULYSSES else ranks
