"""Which matrices of a model are kept quantised, and how: from `quantization_config`, or as the settings want it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxllm.formats import Format, Storage, Stored
from jaxllm.models.fields import Fields

HEAD = "lm_head.weight"
GROUP = 128
"""Inputs that share a scale in 4 bits, unless a checkpoint says otherwise."""
ONLINE = {"fp8": Format("fp8"), "int8": Format("int8"), "int4": Format("int4", group=GROUP)}
"""What a plain checkpoint can be quantised to while it is loaded."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """format: of the matrices of attention, MLPs and experts. head: whether that of the output is among them.

    ignored: regular expressions of modules that are not. cache: the checkpoint was made for keys and values in e4m3.
    stored: how the checkpoint has them; None: in plain numbers.
    """

    format: Format
    head: bool = False
    ignored: tuple[str, ...] = ()
    cache: bool = False
    stored: Stored | None = None

    def applies(self, names: Iterable[str]) -> bool:
        """Whether a parameter that is made of these tensors is quantised."""
        modules = [name.removesuffix(".weight") for name in names]
        if not self.head and HEAD.removesuffix(".weight") in modules:
            return False
        return not any(re.fullmatch(pattern, module) for pattern in self.ignored for module in modules)


def choose(found: Quantization | None, wanted: str | None, *, head: bool, widen: bool) -> Quantization | None:
    """What a model is kept in.

    Args:
        found: what its checkpoint is in; None: plain numbers.
        wanted: a key of `ONLINE`; None: as the checkpoint is.
        head: whether that is for the output matrix, too.
        widen: keep nothing quantised.

    Raises:
        ValueError: the checkpoint is in another format.
    """
    if found is not None and wanted is not None and found.format.kind != wanted:
        raise ValueError(
            f"quantization = {wanted!r}, but the checkpoint's weights are {found.format.kind} already; leave it out"
        )
    if wanted is not None and widen:
        raise ValueError(f"quantization = {wanted!r} contradicts dequantize_weights = True; leave one of them out")
    if found is not None and widen:
        return replace(found, ignored=(".*",))
    if found is None and wanted is not None:
        found = Quantization(ONLINE[wanted])
    return found if found is None or not head else replace(found, head=True)


def from_hf(fields: Fields) -> Quantization | None:
    """What the `quantization_config` of a config.json says; None without one.

    Activations are quantised as they come, each token by its own largest number, whatever scales a checkpoint has for
    them: that is at least as exact.

    Raises:
        ModelConfigError: a method, or a variant of one, that is not supported.
    """
    values = fields.get("quantization_config")
    if not values:
        return None
    table = Fields(values, f"{fields.where} quantization_config")
    method = table.get("quant_method")
    if method not in METHODS:
        raise table.error(f"quant_method {method!r} is not supported, the supported ones are {', '.join(METHODS)}")
    return METHODS[method](table)


def _fp8(table: Fields) -> Quantization:
    """Of DeepSeek and transformers: e4m3, with scales for blocks, or one for a matrix or row."""
    table.refuse("fmt", "e4m3", why="fp8 checkpoints are in e4m3")
    block = table.get("weight_block_size")
    if block is not None and (not isinstance(block, list) or len(block) != 2 or not all(_size(n) for n in block)):
        raise table.error(f"weight_block_size is {block!r}, it must be two sizes such as [128, 128]")
    stored = Stored(Storage.SCALED, Format("fp8", group=block[1] if block else None), rows=block[0] if block else 1)
    names = [*_names(table, "modules_to_not_convert"), *_names(table, "ignored_layers")]
    return Quantization(stored.format, ignored=_patterns(names), stored=stored)


def _modelopt(table: Fields) -> Quantization:
    algorithm = table.get("quant_algo")
    if algorithm != "FP8":
        raise table.error(f"quant_algo {algorithm!r} of ModelOpt is not supported, only FP8 is")
    cache = table.get("kv_cache_quant_algo")
    if cache not in (None, "FP8"):
        raise table.error(f"kv_cache_quant_algo {cache!r} is not supported, only FP8 is")
    stored = Stored(Storage.SCALED, Format("fp8"))
    names = [*_names(table, "exclude_modules"), *_names(table, "ignore")]
    scheme = cache is not None or _cache(table)
    return Quantization(stored.format, ignored=_patterns(names), cache=scheme, stored=stored, head=not _head(names))


def _compressed_tensors(table: Fields) -> Quantization:
    groups = Fields(table.get("config_groups", {}), f"{table.where} config_groups").values
    kinds = {repr(group.get("weights")) for group in groups.values() if isinstance(group, Mapping)}
    if len(kinds) != 1:
        raise table.error(f"config_groups have {len(kinds)} kinds of weights, and only one is supported")
    first = next(iter(groups.values()))
    weights = Fields(first.get("weights") or {}, f"{table.where} weights")
    bits, kind = weights.integer("num_bits"), weights.get("type", "int")
    strategy, group = weights.get("strategy"), weights.optional_integer("group_size")
    how = first.get("format") or table.get("format")
    weights.refuse("actorder", False, "weight", "static", why="groups of reordered inputs are not supported")
    weights.refuse("symmetric", True, why="zero points of compressed-tensors are not supported")
    names = _names(table, "ignore")
    if kind == "float" and bits == 8 and strategy in ("tensor", "channel", "block"):
        block = weights.get("block_structure") or [1, None]
        if strategy == "block" and (not isinstance(block, list) or len(block) != 2 or not all(map(_size, block))):
            raise weights.error(f"block_structure is {block!r}, it must be two sizes such as [128, 128]")
        stored = Stored(Storage.SCALED, Format("fp8", group=block[1]), rows=block[0])
    elif kind == "int" and bits == 8 and how in ("int-quantized", "naive-quantized") and strategy in _WHOLE:
        stored = Stored(Storage.SCALED, Format("int8"))
    elif kind == "int" and bits in (4, 8) and how == "pack-quantized" and strategy in (*_WHOLE, "group"):
        width = group if strategy == "group" else None
        stored = Stored(Storage.PACKED, Format("int4" if bits == 4 else "int8", group=width))
    else:
        raise table.error(
            f"{bits}-bit {kind} weights by {strategy!r} in format {how!r} are not supported: fp8 by tensor, channel or "
            "block, int8 by tensor or channel, and packed 4 or 8 bits by channel or group are"
        )
    return Quantization(
        stored.format, ignored=_patterns(names), cache=_cache(table), stored=stored, head=not _head(names)
    )


_WHOLE = ("tensor", "channel")


def _awq(table: Fields) -> Quantization:
    bits = table.integer("bits", table.get("w_bit", 4))
    if bits != 4:
        raise table.error(f"bits is {bits}, AWQ checkpoints have 4")
    version = str(table.get("version", "gemm")).lower()
    if version != "gemm":
        raise table.error(f"version {version!r} of AWQ is not supported, only gemm is")
    format = Format("int4", group=_group(table, table.get("q_group_size", GROUP)), zeros=True)
    table.refuse("zero_point", True, why="AWQ checkpoints have zero points")
    names = _names(table, "modules_to_not_convert")
    return Quantization(format, ignored=_patterns(names), stored=Stored(Storage.AWQ, format))


def _gptq(table: Fields) -> Quantization:
    bits = table.integer("bits")
    if bits not in (4, 8):
        raise table.error(f"bits is {bits}, GPTQ checkpoints with 4 or 8 are supported")
    table.refuse("desc_act", False, why="groups of reordered inputs (act-order) are not supported")
    table.refuse("dynamic", {}, why="bits that differ between layers are not supported")
    version = table.get("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise table.error(f"checkpoint_format {version!r} is not supported, only gptq and gptq_v2 are")
    kind = Format("int4" if bits == 4 else "int8", group=_group(table, GROUP), zeros=not table.flag("sym", True))
    stored = Stored(Storage.GPTQ, kind, zero_offset=1 if version == "gptq" else 0)
    names = _names(table, "modules_to_not_convert")
    return Quantization(kind, ignored=_patterns(names), stored=stored, head=table.flag("lm_head", False))


METHODS = {
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "awq": _awq,
    "gptq": _gptq,
}


def _size(value: Any) -> bool:
    return type(value) is int and value > 0


def _group(table: Fields, default: Any) -> int | None:
    """Inputs that share a scale; -1 means all."""
    value = table.get("group_size", default)
    if value == -1:
        return None
    if not _size(value) or value % 8:
        raise table.error(f"group_size is {value!r}, it must be a multiple of 8, or -1 for whole rows")
    return int(value)


def _cache(table: Fields) -> bool:
    scheme = table.get("kv_cache_scheme")
    if not scheme:
        return False
    cache = Fields(scheme, f"{table.where} kv_cache_scheme")
    if cache.integer("num_bits", 8) != 8 or cache.get("type", "float") != "float":
        raise cache.error(f"{dict(cache.values)!r} is not supported, only 8-bit floats are")
    return True


def _names(table: Fields, key: str) -> list[str]:
    names = table.get(key, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise table.error(f"{key} must be a list of module names, not {names!r}")
    return names


def _head(names: Iterable[str]) -> bool:
    """Whether the output matrix is among these."""
    return any(re.fullmatch(pattern, "lm_head") for pattern in _patterns(names))


def _patterns(names: Iterable[str]) -> tuple[str, ...]:
    """Regular expressions of the modules that lists of ignored ones mean: names, parts of them, globs and `re:`."""
    out = []
    for name in names:
        if name.startswith("re:"):
            out.append(f"(?:{name[3:]}).*")
        else:
            text = re.escape(name).replace(r"\*", ".*")
            out.append(rf"(?:.*\.)?{text}(?:\..*)?")
    return tuple(out)
