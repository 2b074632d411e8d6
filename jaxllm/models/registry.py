"""Which model families there are, and which one a checkpoint belongs to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.models import deepseek, gemma, gpt_oss, llama, mistral, mixtral, qwen
from jaxllm.models.config import ModelConfig
from jaxllm.models.fields import Fields, ModelConfigError
from jaxllm.models.gguf import GGUFFields

__all__ = ["FAMILIES", "Family", "ModelConfigError", "config_from_gguf", "config_from_hf"]


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table of families: the names that checkpoints give it and the functions that read its settings."""

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    from_hf: Callable[[Fields], ModelConfig]
    gguf: str | None = None
    from_gguf: Callable[[GGUFFields], ModelConfig] | None = None


FAMILIES = (
    Family("llama", ("LlamaForCausalLM", "LLaMAForCausalLM"), ("llama",), llama.from_hf, "llama", llama.from_gguf),
    Family("mistral", ("MistralForCausalLM",), ("mistral",), mistral.from_hf),
    Family("mixtral", ("MixtralForCausalLM",), ("mixtral",), mixtral.from_hf),
    Family("qwen2", ("Qwen2ForCausalLM",), ("qwen2",), qwen.qwen2_from_hf, "qwen2", qwen.qwen2_from_gguf),
    Family("qwen3", ("Qwen3ForCausalLM",), ("qwen3",), qwen.qwen3_from_hf, "qwen3", qwen.qwen3_from_gguf),
    Family("qwen3_moe", ("Qwen3MoeForCausalLM",), ("qwen3_moe",), qwen.qwen3_moe_from_hf),
    Family("deepseek_v2", ("DeepseekV2ForCausalLM",), ("deepseek_v2",), deepseek.v2_from_hf),
    Family("deepseek_v3", ("DeepseekV3ForCausalLM",), ("deepseek_v3",), deepseek.v3_from_hf),
    Family("gpt_oss", ("GptOssForCausalLM",), ("gpt_oss",), gpt_oss.from_hf),
    Family(
        "gemma3",
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        ("gemma3_text", "gemma3"),
        gemma.from_hf,
        "gemma3",
        gemma.from_gguf,
    ),
)


def config_from_hf(config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> ModelConfig:
    """The model described by a Hugging Face `config.json`, as written by transformers 4 or 5.

    Args:
        config: the parsed file. A multimodal checkpoint's `text_config` is used, its other parts are not.
        generation_config: the parsed `generation_config.json`, whose end tokens are added to the config's.

    Raises:
        ModelConfigError: an unknown architecture, or a setting that is missing, malformed or not supported.
    """
    top = Fields(config, "config.json")
    family = _family_of(top)
    nested = top.get("text_config")
    fields = Fields(nested, "config.json text_config") if nested is not None else top
    if nested is not None:
        # transformers lets the outer config decide these
        outer = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "dtype", "torch_dtype", "quantization_config")
        fields.values = {**fields.values, **{key: top.get(key) for key in outer if top.get(key) is not None}}
    if generation_config is not None:
        extra = Fields(generation_config, "generation_config.json").token_ids("eos_token_id")
        ends = dict.fromkeys((*fields.token_ids("eos_token_id"), *extra))
        fields.values = {**fields.values, "eos_token_id": list(ends) or None}
    return family.from_hf(fields)


def _family_of(fields: Fields) -> Family:
    architectures = fields.get("architectures")
    if isinstance(architectures, str) or not isinstance(architectures or [], Sequence):
        raise fields.error(f"architectures is {architectures!r}, it must be a list of names")
    if architectures:
        names = [str(name) for name in architectures]
        found = next((family for family in FAMILIES if set(names) & set(family.architectures)), None)
        what = f"architecture {names[0]!r}" if len(names) == 1 else f"architectures {names}"
    else:
        name = fields.get("model_type")
        found = next((family for family in FAMILIES if name in family.model_types), None)
        what = f"model_type {name!r}" if name is not None else "a config with neither architectures nor model_type"
    if found is None:
        supported = ", ".join(name for family in FAMILIES for name in family.architectures)
        raise fields.error(f"{what} is not supported, the supported architectures are {supported}")
    return found


def config_from_gguf(
    metadata: Mapping[str, Any],
    tensors: Collection[str] | None = None,
    rope_factors: Sequence[float] | np.ndarray | None = None,
) -> ModelConfig:
    """The model described by the metadata of a GGUF file.

    Args:
        metadata: key to value, such as `{"general.architecture": "llama", "llama.block_count": 30, ...}`.
        tensors: the names of the file's tensors, llama.cpp's or Hugging Face's. They alone tell whether the output
            matrix is tied to the embeddings (assumed when not given) and whether projections have biases.
        rope_factors: the values of `rope_freqs.weight`, shape [head_dim / 2], where the file has it (Llama 3.1 on).

    Raises:
        ModelConfigError: an unknown architecture, or a setting that is missing, malformed or not supported.
    """
    arch = metadata.get("general.architecture")
    family = next((family for family in FAMILIES if family.gguf is not None and family.gguf == arch), None)
    if family is None or family.from_gguf is None:
        supported = ", ".join(family.gguf for family in FAMILIES if family.gguf is not None)
        raise ModelConfigError(
            f"GGUF general.architecture {arch!r} is not supported, the supported ones are {supported}"
        )
    return family.from_gguf(GGUFFields(metadata, tensors, rope_factors))
