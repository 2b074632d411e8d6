"""Quantised blocks that stay as they are: what is kept equals what is expanded, on every layout."""

from __future__ import annotations

from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_files import random_blocks, write

from jaxllm.kernels.linear import packed
from jaxllm.kernels.linear.blocks import ROWS
from jaxllm.mapping import Mapping
from jaxllm.parallel.mesh import make_mesh
from jaxllm.parallel.params import ParamSpec, Segment
from jaxllm.weights.gguf import GGUFSource
from jaxllm.weights.load import load_params
from jaxllm.weights.source import CheckpointError

F32 = np.dtype(np.float32)
TP = ("ep", "tp")
NAMES = {"q": "blk.0.attn_q", "k": "blk.0.attn_k", "o": "blk.0.attn_output", "gate": "blk.0.ffn_gate"}
LAYER = "model.layers.0."
HF = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj"}
FULL = {short: f"{LAYER}{name}.weight" for short, name in HF.items()}


def source(path: Path, kinds: dict[str, str]) -> GGUFSource:
    sizes = {"q": (96, 64), "k": (32, 64), "o": (64, 96), "gate": (160, 64)}

    def fill(w: gguf.GGUFWriter) -> None:
        w.add_head_count(3)
        w.add_head_count_kv(1)
        for short, kind in kinds.items():
            raw = random_blocks(Type[kind], *sizes[short])
            if kind == "Q4_0":
                raw.reshape(len(raw), -1, 18)[..., 1] &= 0x8F  # scales below 1
            w.add_tensor(f"{NAMES[short]}.weight", raw, raw_dtype=Type[kind])

    return GGUFSource(write(path / "m.gguf", "llama", fill))


def specs(tp: int) -> dict[str, ParamSpec]:
    """Fused rows with padding, and columns with padding, each rank's share a whole number of blocks."""
    rank_qk = [
        [Segment("q", 32 * r, 32 * r + 32) if r < 3 else Segment(None, 0, 32), Segment("k", 0, 32)] for r in range(tp)
    ]
    qk = [Segment(s.name and FULL[s.name], s.start, s.stop) for rank in rank_qk for s in rank]
    o = [Segment(FULL["o"], 32 * r, 32 * r + 32) if r < 3 else Segment(None, 0, 32) for r in range(max(tp, 3))]
    return {
        "qk": ParamSpec((64 * tp, 64), F32, (TP, None), tuple(qk)),
        "o": ParamSpec((64, 32 * len(o)), F32, (None, TP), tuple(o), axis=1),
        "gate": ParamSpec((160, 64), F32, (TP, None), (Segment(FULL["gate"], 0, 160),)),
    }


def expanded(array: jax.Array) -> np.ndarray:
    if not packed.is_packed(array):
        return np.asarray(array)
    host = jnp.asarray(np.asarray(array))
    return np.asarray(packed.take_rows(host, jnp.arange(host.shape[0] * ROWS)))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_kept_blocks_equal_expanded_ones(tmp_path: Path, kind: str, tp: int) -> None:
    checkpoint = source(tmp_path, dict.fromkeys(NAMES, kind))
    wanted = {k: s for k, s in specs(tp).items() if k != "o" or s.shape[1] // 32 % tp == 0}
    shapes = {name: checkpoint.tensors[name].shape for name in FULL.values()}
    mesh = make_mesh(Mapping(tp=tp))
    kept = load_params(wanted, shapes, checkpoint, mesh, keep_quantized=True)
    plain = load_params(wanted, shapes, checkpoint, mesh)
    # 160 rows on 4 ranks would cut a group of 16
    assert {path for path, array in kept.items() if packed.is_packed(array)} == set(wanted) - (
        {"gate"} if tp == 4 else set()
    )
    for path, array in kept.items():
        np.testing.assert_array_equal(expanded(array), plain[path], err_msg=path)
        if packed.is_packed(array):
            assert array.sharding.shard_shape(array.shape)[0] * ROWS * tp == (
                wanted[path].shape[0] * (1 if path != "o" else tp)
            )
    checkpoint.close()


def test_mixed_and_other_kinds_are_expanded(tmp_path: Path) -> None:
    checkpoint = source(tmp_path, {"q": "Q4_1", "k": "Q8_0", "o": "Q5_0", "gate": "Q8_0"})
    wanted = specs(1)
    shapes = {name: checkpoint.tensors[name].shape for name in FULL.values()}
    kept = load_params(wanted, shapes, checkpoint, make_mesh(Mapping()), keep_quantized=True)
    assert {path: packed.is_packed(array) for path, array in kept.items()} == {"qk": False, "o": False, "gate": True}
    checkpoint.close()


def test_a_scale_too_large_to_keep_is_a_clear_error(tmp_path: Path) -> None:
    raw = np.zeros((16, 18), np.uint8)
    raw[:, :2] = np.array([60000.0], np.float16).view(np.uint8)
    path = write(tmp_path / "m.gguf", "qwen2", lambda w: w.add_tensor("output.weight", raw, raw_dtype=Type.Q4_0))
    wanted = {"head": ParamSpec((16, 32), F32, (TP, None), (Segment("lm_head.weight", 0, 16),))}
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: a scale is beyond 8188; set dequantize_weights"):
        load_params(wanted, {"lm_head.weight": (16, 32)}, GGUFSource(path), make_mesh(Mapping()), keep_quantized=True)
