"""Quantised checkpoints as other tools write them, by definitions of the formats that share nothing with jaxllm's."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 203,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
MIXTRAL = LLAMA | {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
DEEPSEEK = LLAMA | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "num_key_value_heads": 4,
    "q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
    "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
DTYPES = {"float32": "F32", "float16": "F16", "uint8": "F8_E4M3", "int8": "I8", "int32": "I32", "int64": "I64"}
AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs the first four bits of a word are of, then the next four, and so on."""


def e4m3_numbers() -> np.ndarray:
    """The number of each of the 256 patterns: a sign, four bits of exponent with a bias of 7, three of mantissa."""
    pattern = np.arange(256)
    sign, exponent, mantissa = pattern >> 7, pattern >> 3 & 15, pattern & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    return np.where((exponent == 15) & (mantissa == 7), np.nan, np.where(sign, -size, size))


NUMBERS = e4m3_numbers()


def nearest_e4m3(values: np.ndarray) -> np.ndarray:
    """The pattern of the nearest number."""
    order = np.argsort(np.where(np.isnan(NUMBERS), np.inf, NUMBERS))[:254]
    sorted_numbers = NUMBERS[order]
    at = np.clip(np.searchsorted(sorted_numbers, values), 1, 253)
    lower = values - sorted_numbers[at - 1] <= sorted_numbers[at] - values
    return order[np.where(lower, at - 1, at)].astype(np.uint8)


def fp8(weight: np.ndarray, rows: int | None, columns: int | None, leaf: str, shape: Any) -> Any:
    """e4m3 with a scale for each block; None: all rows or columns. shape: of the scale, from its blocks."""
    F, D = weight.shape
    rows, columns = rows or F, columns or D
    scale = np.zeros((-(-F // rows), -(-D // columns)), np.float32)
    patterns = np.zeros(weight.shape, np.uint8)
    numbers = np.zeros(weight.shape)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            scale[i, j] = np.abs(weight[part]).max() / 448
            patterns[part] = nearest_e4m3(weight[part] / scale[i, j])
            numbers[part] = NUMBERS[patterns[part]] * scale[i, j]
    return {"weight": patterns, leaf: scale.reshape(shape(scale))}, numbers


def grouped(weight: np.ndarray, group: int, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Unsigned values [F, D], zero points and float16 scales [F, G], and the numbers that they stand for."""
    F, D = weight.shape
    parts = weight.reshape(F, -1, group)
    low, high = np.minimum(parts.min(-1), 0), np.maximum(parts.max(-1), 0)
    most = (1 << bits) - 1
    scale = ((high - low) / most).astype(np.float16)
    wide = scale.astype(np.float64)[..., None]
    zero = np.clip(np.round(-low / scale.astype(np.float64)), 0, most)
    values = np.clip(np.round(parts / wide) + zero[..., None], 0, most)
    numbers = ((values - zero[..., None]) * wide).reshape(F, D)
    return values.reshape(F, D).astype(np.int64), zero.astype(np.int64), scale, numbers


def symmetric(weight: np.ndarray, group: int, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signed values [F, D], float16 scales [F, G], and the numbers."""
    F, D = weight.shape
    parts, half = weight.reshape(F, -1, group), 1 << bits - 1
    scale = (np.abs(parts).max(-1) / (half - 0.5)).astype(np.float16)
    wide = scale.astype(np.float64)[..., None]
    values = np.clip(np.round(parts / wide), -half, half - 1)
    return values.reshape(F, D).astype(np.int64), scale, (values * wide).reshape(F, D)


def words(values: np.ndarray, bits: int, axis: int, places: tuple[int, ...] | None = None) -> np.ndarray:
    """int32 words of neighbouring values along an axis, the first (or the one that `places` says) in the low bits."""
    per_word = 32 // bits
    moved = np.moveaxis(values, axis, -1)
    moved = moved.reshape(*moved.shape[:-1], -1, per_word)
    out = np.zeros(moved.shape[:-1], np.uint64)
    for place in range(per_word):
        out |= moved[..., places[place] if places else place].astype(np.uint64) << np.uint64(place * bits)
    return np.moveaxis(out.astype(np.uint32).view(np.int32), -1, axis)


def awq(weight: np.ndarray, group: int) -> Any:
    values, zero, scale, numbers = grouped(weight, group, 4)
    tensors = {"qweight": words(values.T, 4, 1, AWQ_PLACES), "qzeros": words(zero.T, 4, 1, AWQ_PLACES)}
    return tensors | {"scales": np.ascontiguousarray(scale.T)}, numbers


def gptq(weight: np.ndarray, group: int, bits: int, *, sym: bool, minus: int) -> Any:
    """minus: what zero points are stored without, 1 in the first version of the format."""
    if sym:
        signed, scale, numbers = symmetric(weight, group, bits)
        values, zero = signed + (1 << bits - 1), np.full(scale.shape, 1 << bits - 1)
    else:
        values, zero, scale, numbers = grouped(weight, group, bits)
    tensors = {"qweight": words(values.T, bits, 0), "qzeros": words((zero.T - minus) % (1 << bits), bits, 1)}
    index = np.arange(weight.shape[1], dtype=np.int32) // group
    return tensors | {"scales": np.ascontiguousarray(scale.T), "g_idx": index}, numbers


def packed(weight: np.ndarray, group: int) -> Any:
    values, scale, numbers = symmetric(weight, group, 4)
    return {
        "weight_packed": words(values + 8, 4, 1),
        "weight_scale": scale,
        "weight_shape": np.asarray(weight.shape, np.int64),
    }, numbers


def int8(weight: np.ndarray) -> Any:
    scale = (np.abs(weight).max(1, keepdims=True) / 127).astype(np.float32)
    values = np.round(weight / scale).astype(np.int8)
    return {"weight": values, "weight_scale": scale}, values * scale.astype(np.float64)


COMPRESSED: dict[str, Any] = {"quant_method": "compressed-tensors", "ignore": ["lm_head", "re:.*gate$"]}


def compressed(how: str, **weights: Any) -> dict[str, Any]:
    return {**COMPRESSED, "format": how, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


@dataclass(frozen=True)
class Case:
    """make: weight -> (tensors by leaf, the numbers that they stand for). table: the config's quantization_config.

    modelopt: the content of hf_quant_config.json instead.
    """

    make: Any
    table: dict[str, Any] | None
    config: dict[str, Any] = field(default_factory=lambda: LLAMA)
    modelopt: dict[str, Any] | None = None


def one(scale: np.ndarray) -> tuple[int, ...]:
    return ()


def same(scale: np.ndarray) -> tuple[int, ...]:
    return scale.shape


def static(weight: np.ndarray) -> Any:
    tensors, numbers = fp8(weight, None, None, "weight_scale", one)
    return tensors | {"input_scale": np.float32(0.01)}, numbers


def blocks(weight: np.ndarray) -> Any:
    return fp8(weight, 32, 32, "weight_scale_inv", same)


def block_table(size: int = 32) -> dict[str, Any]:
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [size, size]}


CASES = {
    "fp8_tensor_static": Case(static, {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8_channel": Case(
        lambda w: fp8(w, 1, None, "weight_scale", same),
        compressed("float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True, dynamic=False),
    ),
    "fp8_channel_mixtral": Case(
        lambda w: fp8(w, 1, None, "weight_scale", same),
        compressed("float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True, dynamic=False),
        MIXTRAL,
    ),
    "fp8_block": Case(blocks, block_table()),
    "fp8_block_mixtral": Case(blocks, block_table(), MIXTRAL),
    "fp8_block_deepseek": Case(blocks, block_table(), DEEPSEEK),
    "fp8_modelopt": Case(
        static,
        None,
        modelopt={
            "producer": {"name": "modelopt"},
            "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]},
        },
    ),
    "awq": Case(
        lambda w: awq(w, 32),
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    ),
    "gptq": Case(
        lambda w: gptq(w, 32, 4, sym=True, minus=1),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
    ),
    "gptq_v2_8_bits": Case(
        lambda w: gptq(w, 32, 8, sym=False, minus=0),
        {
            "quant_method": "gptq",
            "bits": 8,
            "group_size": 32,
            "desc_act": False,
            "sym": False,
            "checkpoint_format": "gptq_v2",
        },
    ),
    "packed_int4": Case(
        lambda w: packed(w, 32),
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=True),
    ),
    "int8_channel": Case(int8, compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True)),
}


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """The file format by hand: uint8 stands for e4m3, which numpy does not have."""
    header, at = {}, 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": DTYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": [at, at + array.nbytes],
        }  # fmt: skip
        at += array.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())


def write(name: str, shapes: dict[str, tuple[int, ...]], directory: Path) -> tuple[Path, Path]:
    """A quantised checkpoint of a case, and a plain one of the numbers that it stands for."""
    case, rng = CASES[name], np.random.default_rng(11)
    small, wide = directory / "quantised", directory / "plain"
    quantised: dict[str, np.ndarray] = {}
    plain: dict[str, np.ndarray] = {}
    for tensor, shape in shapes.items():
        weight = rng.standard_normal(shape) * 0.15
        weight *= np.exp(0.5 * rng.standard_normal(shape[:1] + (1,) * (len(shape) - 1)))  # rows of different sizes
        if len(shape) == 1:
            weight = 1 + 0.2 * rng.standard_normal(shape)
        inside = (len(shape) == 2 and "_proj" in tensor) or ".experts." in tensor
        if inside:
            tensors, weight = case.make(weight)
            stem = tensor.removesuffix(".weight")
            quantised |= {f"{stem}.{leaf}": np.asarray(value) for leaf, value in tensors.items()}
        else:
            quantised[tensor] = weight.astype(np.float32)
        plain[tensor] = weight.astype(np.float32)
    for path, tensors in ((small, quantised), (wide, plain)):
        path.mkdir()
        config = dict(case.config)
        if path is small and case.table is not None:
            config["quantization_config"] = case.table
        if path is small and case.modelopt is not None:
            (path / "hf_quant_config.json").write_text(json.dumps(case.modelopt))
        (path / "config.json").write_text(json.dumps(config))
        write_safetensors(path / "model.safetensors", tensors)
    return small, wide
