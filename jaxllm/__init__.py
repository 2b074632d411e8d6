"""jaxllm: LLM inference on many GPUs in JAX.

The names below are imported when they are first used, so that `import jaxllm` and `jaxllm --help` stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxllm.config import EngineConfig, KvCacheConfig, SchedulerConfig
    from jaxllm.llm import LLM
    from jaxllm.mapping import CpType
    from jaxllm.outputs import CompletionOutput, GenerationResult, RequestOutput
    from jaxllm.sampling_params import SamplingParams
    from jaxllm.settings import ConfigError
    from jaxllm.structured import StructuredOutputs

__version__ = "0.1.0"

_HOME = {
    "LLM": "llm",
    "SamplingParams": "sampling_params",
    "StructuredOutputs": "structured",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
    "GenerationResult": "outputs",
    "EngineConfig": "config",
    "KvCacheConfig": "config",
    "SchedulerConfig": "config",
    "ConfigError": "settings",
    "CpType": "mapping",
}

__all__ = [
    "LLM",
    "CompletionOutput",
    "ConfigError",
    "CpType",
    "EngineConfig",
    "GenerationResult",
    "KvCacheConfig",
    "RequestOutput",
    "SamplingParams",
    "SchedulerConfig",
    "StructuredOutputs",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"jaxllm.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
