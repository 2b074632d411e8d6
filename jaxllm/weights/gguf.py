"""GGUF checkpoints as Hugging Face would have stored them: names translated, layouts undone, blocks dequantised.

What llama.cpp changes when it converts a model, and this module undoes:
- names (`blk.0.attn_q.weight` for `model.layers.0.self_attn.q_proj.weight`);
- rows of Q and K in the llama architecture, which it reorders so that the two halves that rope rotates lie interleaved;
- norm weights of Gemma, to which it has added the 1 that Gemma adds at run time;
- quantisation: blocks of 32 or 256 values along the last dimension. Only the blocks that a slice touches are expanded.
"""

from __future__ import annotations

import math
import mmap
import os
import re
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from jaxllm.kernels.linear.blocks import Blocks, Packing
from jaxllm.weights.gguf_header import GGUFHeader, GGUFTensor, read_gguf_header
from jaxllm.weights.source import CheckpointError, NoScales, TensorInfo, bounds, prefetch, release

ROPE_FACTORS = "rope_freqs.weight"

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_LAYER = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")

_PLAIN: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
}
_PACKINGS = {"Q4_0": Packing.Q4, "Q4_1": Packing.Q4, "Q8_0": Packing.Q8}
QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")


def hf_name(name: str, architecture: str) -> str:
    """Hugging Face's name of a llama.cpp tensor; the name itself where there is none."""
    stem, _, leaf = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{leaf}"
    match = _BLOCK.fullmatch(name)
    table = {**_LAYER, **_GEMMA_LAYER} if architecture.startswith("gemma") else _LAYER
    if match is None or match[2] not in table:
        return name
    return f"model.layers.{match[1]}.{table[match[2]]}.{match[3]}"


class GGUFSource(NoScales):
    """A GGUF file as a `Source`; quantised tensors read as float32.

    `header.metadata` has the metadata. `rope_factors` is llama.cpp's divisor per rope frequency ([head_dim / 2],
    float32), or None: it is how a Llama 3.1 file says its rope scaling, and not a tensor of the model.

    Raises:
        CheckpointError: not a GGUF file, or its header is damaged. Cut-off tensors are reported by `tensors`.
    """

    def __init__(self, file: str | os.PathLike[str] | GGUFHeader) -> None:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        self.header = file if isinstance(file, GGUFHeader) else read_gguf_header(file)
        self._types = {int(t): t for t in GGMLQuantizationType}
        self._blocks = GGML_QUANT_SIZES
        self._heads = self._head_counts()
        self._shift = -1.0 if self.header.architecture.startswith("gemma") else 0.0
        with self.header.path.open("rb") as opened:
            self._pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        self._raw = {hf_name(n, self.header.architecture): t for n, t in self.header.tensors.items()}
        self.rope_factors: np.ndarray | None = None
        if ROPE_FACTORS in self._raw:
            factors = self._raw.pop(ROPE_FACTORS)
            if not self._info(factors).problem:
                self.rope_factors = self._stored(factors, bounds((), factors.shape))
        self.tensors = {name: self._info(raw) for name, raw in self._raw.items()}

    @property
    def name(self) -> str:
        return str(self.header.path)

    def _head_counts(self) -> dict[str, int]:
        """How many heads the rows of these tensors were reordered by."""
        if self.header.architecture != "llama":
            return {}
        heads = self.header.metadata.get("llama.attention.head_count")
        kv_heads = self.header.metadata.get("llama.attention.head_count_kv", heads)
        if not isinstance(heads, int) or not isinstance(kv_heads, int) or heads < 1 or kv_heads < 1:
            raise CheckpointError(self.header.path, f"llama.attention.head_count must be a number, not {heads!r}")
        return {"q_proj": heads, "k_proj": kv_heads}

    def _info(self, raw: GGUFTensor) -> TensorInfo:
        kind = self._types.get(raw.type)
        label = kind.name if kind is not None else f"number {raw.type}"
        dtype, problem = _PLAIN.get(label, np.dtype(np.float32)), ""
        if kind is None or (label not in _PLAIN and label not in QUANTISED):
            problem = f"GGML type {label} is not supported, only {', '.join((*_PLAIN, *QUANTISED))} are"
        elif not raw.shape or raw.shape[-1] % self._blocks[kind][0]:
            problem = f"rows of {raw.shape[-1:]} values are not whole {label} blocks"
        elif raw.start + raw.nbytes > self.header.size:
            problem = f"cut off: ends at byte {raw.start + raw.nbytes} of a file of {self.header.size}"
        return TensorInfo(raw.shape, dtype, raw.nbytes, problem)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        info = self.tensors[name]
        if info.problem:
            raise CheckpointError(self.header.path, f"{name}: {info.problem}")
        raw = self._raw[name]
        ranges = bounds(index, raw.shape)
        rows = self._rows(name, ranges)
        if rows is not None and len(raw.shape) == 1:
            values = self._stored(raw, bounds((), raw.shape))[rows]
        else:
            values = self._stored(raw, ranges, rows)
        if self._shift and name.endswith("norm.weight"):
            values = values + values.dtype.type(self._shift)
        return values

    def packing(self, name: str) -> Packing | None:
        """GGUF's simplest blocks, of 32 values with float16 scales, can stay as they are."""
        kind = self._types.get(self._raw[name].type)
        return None if kind is None or self.tensors[name].problem else _PACKINGS.get(kind.name)

    def read_blocks(self, name: str, index: tuple[slice, slice]) -> Blocks:
        raw, packing = self._raw[name], self.packing(name)
        assert packing is not None
        ranges = bounds(index, raw.shape)
        label = self._types[raw.type].name
        picked = self._picked(raw, ranges, self._rows(name, ranges))
        blocks = picked.reshape(len(picked), -1, self._blocks[self._types[raw.type]][1])
        heads = np.ascontiguousarray(blocks[..., : 4 if label == "Q4_1" else 2]).view(np.float16)
        scale, q = heads[..., 0], blocks[..., heads.shape[-1] * 2 :]
        if packing is Packing.Q8:
            return Blocks((q ^ 0x80).reshape(len(q), -1), scale)  # two's complement to plus 128
        if label == "Q4_1":
            low = heads[..., 1]
        else:
            with np.errstate(over="ignore"):
                low = scale * np.float16(-8)
            if not np.isfinite(low).all():
                raise CheckpointError(self.header.path, f"{name}: a scale is beyond 8188; set dequantize_weights")
        return Blocks(np.concatenate([q & 15, q >> 4], axis=-1).reshape(len(q), -1), scale, low)

    def _rows(self, name: str, ranges: Sequence[tuple[int, int]]) -> np.ndarray | None:
        """Where the file keeps these rows; None where it is where they belong."""
        heads = self._heads.get(name.split(".")[-2] if "." in name else "")
        return None if heads is None else _interleaved(np.arange(*ranges[0]), self._raw[name].shape[0] // heads)

    def _stored(self, raw: GGUFTensor, ranges: Sequence[tuple[int, int]], rows: np.ndarray | None = None) -> np.ndarray:
        """Values of the tensor as stored, within `ranges`; `rows` picks other rows than those of `ranges[0]`."""
        kind = self._types[raw.type]
        block, _ = self._blocks[kind]
        start, stop = ranges[-1]
        begin = start // block * block
        return self._expand(self._picked(raw, ranges, rows), kind.name)[..., start - begin : stop - begin]

    def _picked(self, raw: GGUFTensor, ranges: Sequence[tuple[int, int]], rows: np.ndarray | None) -> np.ndarray:
        """Bytes of the blocks that `ranges` touches."""
        block, width = self._blocks[self._types[raw.type]]
        row_bytes = raw.shape[-1] // block * width
        start, stop = ranges[-1]
        where: list[Any] = [
            *(slice(a, b) for a, b in ranges[:-1]),
            slice(start // block * width, -(-stop // block) * width),
        ]
        if rows is not None:
            where[0] = rows
        prefetch(self._pages, raw.start, raw.start + raw.nbytes)
        stored = np.frombuffer(self._pages, np.uint8, raw.nbytes, raw.start).reshape(*raw.shape[:-1], row_bytes)
        picked = np.array(stored[tuple(where)], order="C")
        del stored  # a view of the map would keep it from closing
        release(self._pages, raw.start, raw.start + raw.nbytes)
        return picked

    def _expand(self, picked: np.ndarray, label: str) -> np.ndarray:
        """Bytes `[..., n]` to values."""
        if label in _PLAIN:
            return picked.view(_PLAIN[label])
        from gguf import GGMLQuantizationType, quants

        kind = GGMLQuantizationType[label]
        block, width = self._blocks[kind]
        shape = (*picked.shape[:-1], picked.shape[-1] // width * block)
        if not picked.size:
            return np.zeros(shape, np.float32)
        # dequantize() works on 16 rows at a time; long rows keep its Python overhead small
        blocks = picked.size // width
        per_row = math.gcd(blocks, 1 << 9)
        return quants.dequantize(picked.reshape(blocks // per_row, per_row * width), kind).reshape(shape)

    def close(self) -> None:
        self._pages.close()


def _interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Where llama.cpp keeps these rows: within a head, row `half * d/2 + i` lies at `2 i + half`."""
    within = rows % head_dim
    return rows - within + within % (head_dim // 2) * 2 + within // (head_dim // 2)
