"""MXFP4, and gpt-oss's stacks of experts, against numbers worked out by hand and against single experts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxllm import LLM
from jaxllm.mapping import Mapping
from jaxllm.models.checkpoint import checkpoint_shapes
from jaxllm.models.decoder import param_specs
from jaxllm.models.registry import config_from_hf
from jaxllm.parallel.layout import Layout
from jaxllm.parallel.mesh import make_mesh
from jaxllm.weights.experts import split_experts
from jaxllm.weights.load import load_params
from jaxllm.weights.mxfp4 import dequantise
from jaxllm.weights.source import CheckpointError

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("mlp", "gate_proj", "up_proj", "down_proj")
LAYER = "model.layers.0.mlp.experts"


def test_the_values_of_blocks() -> None:
    blocks = np.zeros((2, 16), np.uint8)
    blocks[0, :3] = [0x21, 0xF7, 0x0A]  # low half first: 0.5 1, 6 -6, -1 0
    blocks[1, 15] = 0x40
    values = dequantise(blocks, np.array([127, 124], np.uint8))
    assert values.shape == (64,)
    np.testing.assert_array_equal(values[:6], [0.5, 1, 6, -6, -1, 0])
    assert values[63] == 2 / 8 and not values[6:63].any()


@pytest.mark.parametrize("name", ["gpt_oss", "gpt_oss_mxfp4"])
def test_each_rank_reads_its_own_experts(memory_source: Any, name: str) -> None:
    """The parameters of a split model, and no more than a share of the experts' bytes for one expert's slice."""
    cfg = config_from_hf(json.loads((GOLDEN / name / "config.json").read_text()))
    assert cfg.experts is not None
    source = memory_source(load_file(GOLDEN / name / "model.safetensors"))
    split = split_experts(source, *NAMES, interleaved=True)
    mapping = Mapping(ep=2, tp=2)
    specs = param_specs(cfg, Layout(mapping, np.dtype(np.float32)))
    found = load_params(specs, checkpoint_shapes(cfg), split, make_mesh(mapping))
    E, F, D = cfg.experts.count, cfg.experts.width, cfg.hidden_size
    whole = {part: split.read(f"{LAYER}.{E - 1}.{part}.weight", (slice(None), slice(None))) for part in NAMES[1:]}
    assert whole["gate_proj"].shape == (F, D) and whole["down_proj"].shape == (D, F)
    if name == "gpt_oss":
        stack = source.arrays[f"{LAYER}.gate_up_proj"][E - 1]
        np.testing.assert_array_equal(whole["up_proj"], stack[:, 1::2].T)
    last = np.asarray(found["layers.0.mlp.gate_up"])[E - 1]
    half = -(-F // 2)
    np.testing.assert_array_equal(last[half : 2 * half], whole["up_proj"][:half])
    np.testing.assert_array_equal(last[2 * half :][: F - half], whole["gate_proj"][half:])
    bias = np.asarray(found["layers.0.mlp.down_bias"])
    np.testing.assert_array_equal(bias[:, :D], source.arrays[f"{LAYER}.down_proj_bias"].astype(np.float32))
    assert not bias[:, D:].any(), "one of the ranks adds it"
    source.bytes_read = 0
    split.read(f"{LAYER}.1.down_proj.weight", (slice(0, 8), slice(0, 32)))
    assert source.bytes_read <= 8 * 32 * ml_dtypes.bfloat16(0).itemsize


def directory(tmp_path: Path, arrays: dict[str, np.ndarray]) -> Path:
    shutil.copy(GOLDEN / "gpt_oss_mxfp4" / "config.json", tmp_path)
    save_file(arrays, tmp_path / "model.safetensors")
    return tmp_path


def no_scales(arrays: dict[str, np.ndarray]) -> None:
    del arrays[f"{LAYER}.down_proj_scales"]


def scales_of_another(arrays: dict[str, np.ndarray]) -> None:
    arrays[f"{LAYER}.down_proj_scales"] = arrays[f"{LAYER}.down_proj_scales"][:, :-1].copy()


def fewer_experts(arrays: dict[str, np.ndarray]) -> None:
    for name in ("blocks", "scales", "bias"):
        arrays[f"{LAYER}.down_proj_{name}"] = arrays[f"{LAYER}.down_proj_{name}"][:5].copy()


def bytes_elsewhere(arrays: dict[str, np.ndarray]) -> None:
    arrays["lm_head.weight"] = arrays["lm_head.weight"].astype(np.uint8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_scales, r"down_proj\.weight: model\.layers\.0\.mlp\.experts\.down_proj_blocks has no scales beside it"),
        (scales_of_another, r"down_proj_blocks: uint8 \[6, 64, 1, 16\] with scales uint8 \[6, 63, 1\] is not MXFP4"),
        (fewer_experts, r"model\.layers\.0\.mlp\.experts\.5\.down_proj\.weight: missing"),
        (bytes_elsewhere, r"lm_head\.weight: values in uint8 without scales"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_experts(tmp_path: Path, damage: Any, message: str) -> None:
    arrays = load_file(GOLDEN / "gpt_oss_mxfp4" / "model.safetensors")
    damage(arrays)
    with pytest.raises(CheckpointError, match=message):
        LLM(directory(tmp_path, arrays), skip_tokenizer_init=True, progress=False)
