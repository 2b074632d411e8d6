"""The names that scripts import from `tensorrt_llm.llmapi`, for those that jaxllm has.

Porting a script is changing the import: `from jaxllm.llmapi import LLM, SamplingParams, KvCacheConfig`. A name that
stands for something jaxllm does not have yet says so when it is imported.
"""

from __future__ import annotations

from typing import Any

from jaxllm.config import AttentionDpConfig, CpConfig, KvCacheConfig, SchedulerConfig
from jaxllm.llm import LLM
from jaxllm.mapping import CpType
from jaxllm.moe_config import MoeConfig
from jaxllm.outputs import CompletionOutput, GenerationResult, RequestOutput
from jaxllm.sampling_params import SamplingParams

# TensorRT-LLM calls the settings of an LLM by this name.
from jaxllm.config import EngineConfig as LlmArgs  # isort: skip
from jaxllm.structured import StructuredOutputs as GuidedDecodingParams  # isort: skip

_NOT_SUPPORTED_YET = {
    "CacheTransceiverConfig": "disaggregated serving",
    "DisaggregatedParams": "disaggregated serving",
    "DraftTargetDecodingConfig": "speculative decoding",
    "EagleDecodingConfig": "speculative decoding",
    "LoRARequest": "LoRA",
    "MTPDecodingConfig": "speculative decoding",
    "NGramDecodingConfig": "speculative decoding",
    "QuantConfig": "QuantConfig (LLM's `quantization` rounds a plain checkpoint; quantised ones load as they are)",
}

__all__ = [
    "LLM",
    "AttentionDpConfig",
    "CompletionOutput",
    "CpConfig",
    "CpType",
    "GenerationResult",
    "GuidedDecodingParams",
    "KvCacheConfig",
    "LlmArgs",
    "MoeConfig",
    "RequestOutput",
    "SamplingParams",
    "SchedulerConfig",
]


def __getattr__(name: str) -> Any:
    if name in _NOT_SUPPORTED_YET:
        raise NotImplementedError(f"jaxllm.llmapi.{name}: {_NOT_SUPPORTED_YET[name]} is not supported yet")
    raise AttributeError(f"module 'jaxllm.llmapi' has no attribute {name!r}")
