"""What the user may set: pydantic models, and YAML + keyword arguments -> EngineConfig.

Every check that needs nothing but the settings themselves lives here, so that a mistake is reported before a model
is touched. Names and meanings follow TensorRT-LLM's LlmArgs, so that its snippets port; this module imports no jax.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from jaxllm import mapping
from jaxllm.mapping import CpType, StarConfig
from jaxllm.moe_config import MoeConfig
from jaxllm.settings import NOT_SUPPORTED_YET, Strict, load_yaml, merge_settings, one_of

logger = logging.getLogger(__name__)


class KvCacheConfig(Strict):
    """The paged KV cache.

    Attributes:
        enable_block_reuse: keep full pages of finished requests and share them by prefix (hash chain, LRU).
        free_gpu_memory_fraction: share of the device memory that is free after loading the weights, 0 < f <= 1.
        max_tokens: explicit size in tokens; with both limits given the smaller one wins. On a CPU the cache takes at
            most half of the machine's memory.
        tokens_per_block: page size in tokens, a power of two.
        dtype: element type of the cache; "fp8" = e4m3, half of bfloat16's memory; "auto" = what the checkpoint says,
            else the dtype of the activations.
    """

    enable_block_reuse: bool = True
    free_gpu_memory_fraction: float = Field(default=0.9, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    tokens_per_block: int = Field(default=32, ge=1, le=1024)
    dtype: Literal["auto", "float32", "bfloat16", "fp8"] = "auto"

    @field_validator("tokens_per_block")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            near = 1 << value.bit_length()
            raise ValueError(f"tokens_per_block = {value} must be a power of two, for example {near}")
        return value

    @model_validator(mode="after")
    def _at_least_one_page(self) -> KvCacheConfig:
        if self.max_tokens is not None and self.max_tokens < self.tokens_per_block:
            raise ValueError(
                f"kv_cache_config.max_tokens = {self.max_tokens} is less than one page "
                f"(tokens_per_block = {self.tokens_per_block}); raise it or make the pages smaller"
            )
        return self


class SchedulerConfig(Strict):
    """Who runs when the page pool is short.

    Attributes:
        capacity_scheduler_policy: MAX_UTILIZATION admits by the pages free now and preempts (recomputes) when they run
            out; GUARANTEED_NO_EVICT admits a request only if all running ones can reach their max_tokens.
        waiting_queue_policy: "fcfs", or "priority" (higher first, then first come).
    """

    capacity_scheduler_policy: Literal["MAX_UTILIZATION", "GUARANTEED_NO_EVICT"] = "MAX_UTILIZATION"
    waiting_queue_policy: Literal["fcfs", "priority"] = "fcfs"


class CpConfig(Strict):
    """How the context is parallel. Each key but the first belongs to one type.

    Attributes:
        cp_type: a CpType, its name in any case, or its number. ULYSSES exchanges tokens for heads around attention;
            RING passes keys and values round; HELIX does so for decodes only, with the other weights split over the
            same devices; STAR is blockwise and approximate, and `context_parallel_size` 1 runs it on one device.
        block_size: STAR: tokens of a block of the context; None = 4096.
        cp_anchor_size: STAR: tokens of the anchor that every block sees, at most block_size; None = block_size.
        tokens_per_block: HELIX: tokens of a page, as `kv_cache_config.tokens_per_block` has it.
    """

    cp_type: CpType = CpType.ULYSSES
    block_size: int | None = Field(default=None, ge=1)
    cp_anchor_size: int | None = Field(default=None, ge=1)
    tokens_per_block: int | None = Field(default=None, ge=1)

    @field_validator("cp_type", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        names = CpType.__members__
        if isinstance(value, str) and value.upper() in names:
            return names[value.upper()]
        if isinstance(value, int) and not isinstance(value, bool) and value in [kind.value for kind in CpType]:
            return CpType(value)
        if not isinstance(value, CpType):
            raise ValueError(f"cp_type = {value!r} is not a kind of context parallelism; use {one_of(names)}")
        return value

    @model_validator(mode="after")
    def _keys_belong_to_the_type(self) -> CpConfig:
        owners = {"block_size": CpType.STAR, "cp_anchor_size": CpType.STAR, "tokens_per_block": CpType.HELIX}
        for name, owner in owners.items():
            if getattr(self, name) is not None and self.cp_type is not owner:
                legal = ["cp_type", *(key for key, kind in owners.items() if kind is self.cp_type)]
                raise ValueError(
                    f"cp_config.{name} = {getattr(self, name)} belongs to cp_type {owner.name}, not "
                    f"{self.cp_type.name}, which takes {one_of(legal, 'and')}"
                )
        star = self.star
        if star is not None and star.anchor_size > star.block_size:
            raise ValueError(
                f"cp_config.cp_anchor_size = {star.anchor_size} is more than block_size = {star.block_size}; "
                "the anchor is at most a block"
            )
        return self

    @property
    def star(self) -> StarConfig | None:
        """The sizes of Star attention; None for the other types."""
        if self.cp_type is not CpType.STAR:
            return None
        block = self.block_size or 4096
        return StarConfig(block, self.cp_anchor_size or block)


class AttentionDpConfig(Strict):
    """How requests are spread over the ranks of attention data parallelism.

    Attributes:
        enable_balance: hold prompts back for a while, so that the ranks compute prompts in the same steps.
        timeout_iters: steps that a prompt waits at most for the other ranks to have one as well.
        batching_wait_iters: further steps to wait for more prompts, once every rank has one.
    """

    enable_balance: bool = False
    timeout_iters: int = Field(default=50, ge=0)
    batching_wait_iters: int = Field(default=10, ge=0)


class EngineConfig(Strict):
    """Everything an engine needs to know before it starts.

    Attributes:
        model: directory, .gguf file, hub id, or "smollm2-135m".
        tokenizer: directory or hub id of another tokenizer than the model's own.
        skip_tokenizer_init: load no tokenizer; prompts must be token ids and outputs have no text.
        dtype: of weights and activations; "auto" = the checkpoint's on a GPU, float32 on a CPU.
        quantization: matrices of attention, MLPs and experts in fewer bits, rounded while they are loaded: "fp8" (e4m3,
            a scale for each row; in bfloat16 activations too, a scale for each token), "int8" (a scale for each row)
            or "int4" (one for 128 inputs); None = as the checkpoint has them.
        quantize_lm_head: the output matrix too. It is a small part of most models, and rounding it moves every logit.
        dequantize_weights: expand quantised blocks to dtype when loading. Otherwise, on a CPU, Q4_0, Q4_1 and Q8_0
            stay as they are and are expanded in the kernels: the same values in a sixth of the memory.
        load_format: "auto" reads the checkpoint, "dummy" makes random weights of the same shapes.
        tensor_parallel_size: devices the heads, the MLP and the vocabulary are split over.
        pipeline_parallel_size: stages that the layers are split into.
        context_parallel_size: devices that the tokens of a sequence are split over, the way `cp_config` says.
        moe_expert_parallel_size, moe_tensor_parallel_size: groups that the experts are split over, and devices that
            each expert is; None or -1 = derived. `jaxllm.mapping.Mapping.resolve` tells what they mean together.
        pp_partition: layers of each stage; None = as even as possible.
        pp_micro_batches: decode steps in flight for each stage; more hide the host, and make each step smaller.
        enable_attention_dp: split the requests, not the heads, over the devices of tensor parallelism.
        attention_dp_config: how; without effect unless enable_attention_dp is set.
        moe_config: how mixtures of experts are computed.
        max_batch_size: sequences that run at the same time, with attention data parallelism on each rank; None = chosen
            for the device.
        max_num_tokens: tokens computed in one step (decodes + prompt chunks); None = chosen for the device.
        max_seq_len: prompt + output tokens of one sequence; None = the model's context, or what fits the KV cache.
        enable_chunked_prefill: split long prompts over several steps.
        disable_overlap_scheduler: wait for each step's tokens before the next one is launched (the plain loop).
        num_scheduler_steps: decode steps of one dispatch, where no request waits for what one of them would change; the
            tokens of a dispatch arrive together, a request that comes may wait for two dispatches, and what follows an
            end token within one is dropped. More than one pays where the host takes longer than the device.
        stream_interval: streaming requests are told about every this many tokens.
        seed: of dummy weights, and of requests that sample without a seed of their own.
        kv_cache_config, scheduler_config: the page pool, and who runs when it is short.
        compilation_cache_dir: persistent XLA cache; None = ~/.cache/jaxllm/xla (or $JAXLLM_CACHE/xla), "" = none.
        batch_buckets, token_buckets: decode batch sizes and prefill token counts to compile for; None = chosen.
        progress: show bars while loading and compiling, if stderr is a terminal.

    Raises:
        ConfigError (a ValueError): a setting is unknown, has a wrong value, contradicts another one, or belongs to
            something that jaxllm does not have.
    """

    model: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantization: Literal["fp8", "int8", "int4"] | None = None
    quantize_lm_head: bool = False
    dequantize_weights: bool = False
    load_format: Literal["auto", "dummy"] = "auto"

    tensor_parallel_size: int = Field(default=1, ge=1)
    pipeline_parallel_size: int = Field(default=1, ge=1)
    context_parallel_size: int = Field(default=1, ge=1)
    moe_tensor_parallel_size: int | None = None
    moe_expert_parallel_size: int | None = None
    cp_config: CpConfig = Field(default_factory=CpConfig)
    pp_partition: list[int] | None = None
    pp_micro_batches: int = Field(default=1, ge=1)
    enable_attention_dp: bool = False
    attention_dp_config: AttentionDpConfig = Field(default_factory=AttentionDpConfig)
    moe_config: MoeConfig = Field(default_factory=MoeConfig)

    # What nobody needs and no compiler comes to an end with.
    max_batch_size: int | None = Field(default=None, ge=1, le=2**16)
    max_num_tokens: int | None = Field(default=None, ge=1, le=2**20)
    max_seq_len: int | None = Field(default=None, ge=2)
    enable_chunked_prefill: bool = True
    disable_overlap_scheduler: bool = False
    kv_cache_config: KvCacheConfig = Field(default_factory=KvCacheConfig)
    scheduler_config: SchedulerConfig = Field(default_factory=SchedulerConfig)
    num_scheduler_steps: int = Field(default=1, ge=1, le=64)
    stream_interval: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)

    compilation_cache_dir: str | None = None
    batch_buckets: list[int] | None = None
    token_buckets: list[int] | None = None
    progress: bool = True

    @model_validator(mode="before")
    @classmethod
    def _page_spelling_of_overlap(cls, values: Any) -> Any:
        """`pytorch_backend_config: {enable_overlap_scheduler: ...}`, as older YAML files have it, is understood."""
        if not isinstance(values, Mapping) or "pytorch_backend_config" not in values:
            return values
        values = dict(values)
        old = values.pop("pytorch_backend_config")
        if old is None:
            return values
        if not isinstance(old, Mapping) or set(old) - {"enable_overlap_scheduler"}:
            raise ValueError(
                f"pytorch_backend_config = {old!r}: only 'enable_overlap_scheduler' is understood there; "
                "put other settings at the top level"
            )
        if old:
            enabled = old["enable_overlap_scheduler"]
            if not isinstance(enabled, bool):
                raise ValueError(f"pytorch_backend_config.enable_overlap_scheduler = {enabled!r} must be true or false")
            if values.setdefault("disable_overlap_scheduler", not enabled) is enabled:
                raise ValueError(
                    f"pytorch_backend_config.enable_overlap_scheduler = {enabled} contradicts "
                    f"disable_overlap_scheduler = {enabled}; keep only the second"
                )
            logger.warning(
                "pytorch_backend_config.enable_overlap_scheduler is obsolete: write disable_overlap_scheduler: %s",
                str(not enabled).lower(),
            )
        return values

    @field_validator("model", "tokenizer", "compilation_cache_dir", mode="before")
    @classmethod
    def _path_to_str(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator(
        "kv_cache_config", "scheduler_config", "cp_config", "attention_dp_config", "moe_config", mode="before"
    )
    @classmethod
    def _none_is_default(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("model")
    @classmethod
    def _model_is_named(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("model is empty; give a directory, a .gguf file, a hub id or 'smollm2-135m'")
        return value

    @field_validator("batch_buckets", "token_buckets")
    @classmethod
    def _ascending(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and (not value or value[0] < 1 or sorted(set(value)) != value):
            raise ValueError(f"buckets {value!r} must be positive, ascending and unrepeated, for example [1, 4, 16]")
        return value

    @model_validator(mode="after")
    def _fields_agree(self) -> EngineConfig:
        self.resolve_mapping(None)  # what contradicts itself on any number of devices
        pages = self.cp_config.tokens_per_block
        if pages is not None and pages != self.kv_cache_config.tokens_per_block:
            raise ValueError(
                f"cp_config.tokens_per_block = {pages} differs from kv_cache_config.tokens_per_block = "
                f"{self.kv_cache_config.tokens_per_block}; a page is a page: leave the first out"
            )
        if self.max_batch_size and self.max_num_tokens and self.max_num_tokens < self.max_batch_size:
            raise ValueError(
                f"max_num_tokens = {self.max_num_tokens} is less than max_batch_size = {self.max_batch_size}, but "
                "every running sequence needs one token per step; raise the first or lower the second"
            )
        if self.batch_buckets and self.max_batch_size and self.batch_buckets[-1] < self.max_batch_size:
            raise ValueError(
                f"batch_buckets end at {self.batch_buckets[-1]}, below max_batch_size = {self.max_batch_size}; "
                f"add {self.max_batch_size} to the buckets or lower max_batch_size"
            )
        if self.num_scheduler_steps > 1 and self.pipeline_parallel_size > 1:
            raise ValueError(
                f"num_scheduler_steps = {self.num_scheduler_steps} contradicts pipeline_parallel_size = "
                f"{self.pipeline_parallel_size}: the stages work on different steps at a time; leave the first out"
            )
        if self.skip_tokenizer_init and self.tokenizer is not None:
            raise ValueError(
                f"tokenizer = {self.tokenizer!r} contradicts skip_tokenizer_init = True; leave one of them out"
            )
        return self

    @classmethod
    def knows(cls, name: str) -> bool:
        """Whether a setting of this name is understood, if only to say that it is not supported."""
        return name in cls.model_fields or name in NOT_SUPPORTED_YET or name == "pytorch_backend_config"

    def resolve_mapping(self, devices: int | None, platform: str = "") -> mapping.Mapping:
        """The parallel layout on this many devices. Raises ValueError when the sizes do not fit them."""
        return mapping.Mapping.resolve(
            devices,
            tp=self.tensor_parallel_size,
            pp=self.pipeline_parallel_size,
            cp=self.context_parallel_size,
            ep=self.moe_expert_parallel_size,
            moe_tp=self.moe_tensor_parallel_size,
            cp_type=self.cp_config.cp_type,
            star=self.cp_config.star,
            attention_dp=self.enable_attention_dp,
            pp_partition=self.pp_partition,
            platform=platform,
        )

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], **overrides: Any) -> EngineConfig:
        """Read settings from a YAML file; `overrides` win over the file (nested settings are merged).

        Raises:
            ConfigError: the file is missing or not a mapping, or a setting is wrong.
        """
        return cls(**merge_settings(load_yaml(path), overrides))
