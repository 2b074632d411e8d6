"""What all settings classes share: strict fields, one-line errors, and YAML files."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator


class ConfigError(ValueError):
    """A setting is unknown, has a wrong value or contradicts another one. The message is one line."""


def check_environment() -> None:
    """Looks at JAX's variables that people set to run jaxllm, since JAX ends with a traceback where one is wrong.

    Raises ConfigError.
    """
    name = "JAX_NUM_CPU_DEVICES"
    if (value := os.environ.get(name)) is None:
        return
    try:
        fits = int(value) > 0 or int(value) == -1  # -1 is JAX's own value for none
    except ValueError:
        fits = False
    if not fits:
        raise ConfigError(
            f"{name} = {value!r} is not a number of devices; set it to how many the CPU shall play, 8 for example, "
            "or unset it"
        )


# Names of TensorRT-LLM's LlmArgs that a script being ported may carry. They are not fields here, but a value that
# asks for nothing (None, False, "auto", 0) is harmless and everything else deserves better than "unknown name".
NOT_SUPPORTED_YET = {
    "allreduce_strategy": "choosing the all-reduce",
    "attn_backend": "choosing the attention kernels",
    "backend": "choosing another runtime",
    "batched_logits_processor": "logits processors",
    "build_config": "building engines (max_batch_size, max_num_tokens and max_seq_len are settings themselves)",
    "cache_transceiver_config": "disaggregated serving",
    "cuda_graph_config": "choosing CUDA graphs (XLA makes them; batch_buckets names batch sizes)",
    "disk_cache_path": "KV offload",
    "disk_cache_size": "KV offload",
    "fifo_version": "choosing the all-to-all of Helix",
    "enable_iter_perf_stats": "switching statistics of iterations off and on (they are kept)",
    "enable_lora": "LoRA",
    "gpus_per_node": "several hosts",
    "guided_decoding_backend": "choosing what makes masks of structured outputs (llguidance does)",
    "host_cache_size": "KV offload",
    "lora_config": "LoRA",
    "max_beam_width": "beam search",
    "max_attention_window": "overriding the attention windows of a model",
    "max_input_len": "a separate limit on the prompt (max_seq_len bounds prompt + output)",
    "moe_cluster_parallel_size": "splitting each expert over a cluster of devices",
    "orchestrator_type": "several processes",
    "quant_config": "QuantConfig (quantization and kv_cache_config.dtype say it; quantised checkpoints need none)",
    "revision": "choosing a hub revision (download it and pass the directory)",
    "sparse_attention_config": "sparse attention",
    "speculative_config": "speculative decoding",
    "torch_compile_config": "torch.compile",
    "tokenizer_revision": "choosing a hub revision (download it and pass the directory)",
    "trust_remote_code": "running code from a checkpoint",
    "use_low_precision_moe_combine": "adding up experts in less than the dtype of the activations",
    "use_nccl_for_alltoall": "choosing the all-to-all of Helix",
}
_HARMLESS: tuple[object, ...] = (None, False, 0, "auto")
# Values beside these that say what is so anyway: TensorRT-LLM's own defaults, above all.
_SO_ANYWAY: dict[str, object] = {
    "allreduce_strategy": "AUTO",
    "attn_backend": "TRTLLM",
    "backend": "pytorch",
    "enable_iter_perf_stats": True,
    "max_beam_width": 1,
}


def unknown_name_message(name: str, valid: Iterable[str], what: str = "setting") -> str:
    """There is no such `what`: say so, with the nearest valid name, or all of them when none is near."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"the valid ones are {', '.join(valid)}"
    return f"unknown {what} {name!r}; {hint}"


def _describe(error: ValidationError, title: str) -> str:
    """All problems of a pydantic error in one line."""
    problems = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"])
        text = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        if item["type"] == "missing":
            problems.append(f"{title} needs a value for {where!r}")
        elif where and item["type"] != "value_error":
            problems.append(f"{where} = {item['input']!r}: {text[0].lower()}{text[1:]}")
        else:
            problems.append(text)
    return "; ".join(problems)


class Strict(BaseModel):
    """Base of every settings class: no unknown names, no silent conversions, one-line errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_describe(error, type(self).__name__)) from None

    @model_validator(mode="before")
    @classmethod
    def _known_names_only(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        kept = {}
        for name, value in values.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in NOT_SUPPORTED_YET:
                # identity for the booleans and 0: 0 == False, and 0.0 is nobody's "off"
                harmless = (*_HARMLESS, _SO_ANYWAY.get(name))
                if not any(value is off or (isinstance(value, str) and value == off) for off in harmless):
                    raise ValueError(
                        f"{name} = {value!r}: {NOT_SUPPORTED_YET[name]} is not supported yet; leave {name!r} out"
                    )
            else:
                what = "setting" if cls.__name__ == "EngineConfig" else f"setting of {cls.__name__}"
                raise ValueError(unknown_name_message(str(name), cls.model_fields, what))
        return kept


def one_of(names: Iterable[str], joint: str = "or") -> str:
    """ "A, B or C"."""
    *most, last = names
    return f"{', '.join(most)} {joint} {last}" if most else last


def merge_settings(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`base` updated by `overrides`; mappings and settings objects under the same name are merged, not replaced."""
    merged = dict(base)
    for name, value in overrides.items():
        if isinstance(value, BaseModel) and name in merged:
            value = value.model_dump(exclude_unset=True)
        if isinstance(value, Mapping) and isinstance(merged.get(name), Mapping):
            value = merge_settings(merged[name], value)
        merged[name] = value
    return merged


def load_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a YAML file as a dict. Raises ConfigError when it cannot be read or is not a mapping."""
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """YAML allows no key twice; PyYAML takes the last one."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
            if twice is not None:
                line = node.start_mark.line + 1
                raise yaml.YAMLError(f"{twice!r} is given twice in the mapping that starts in line {line}; keep one")
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the config file {os.fspath(path)!r}: {reason}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{os.fspath(path)!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{os.fspath(path)!r} must hold settings as 'name: value' lines")
    return content


def choices(config: type[BaseModel], name: str) -> tuple[str, ...]:
    """The values a Literal setting may have besides None, for help texts."""
    values = get_args(config.model_fields[name].annotation)
    inner = [value for part in values for value in get_args(part)]
    return tuple(str(value) for value in inner or values)
