"""Experts in one tensor, and experts that are not there."""

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
from jaxllm.config import EngineConfig
from jaxllm.mapping import Mapping
from jaxllm.models.checkpoint import checkpoint_shapes
from jaxllm.models.config import ModelConfig
from jaxllm.models.decoder import param_specs
from jaxllm.models.registry import config_from_hf
from jaxllm.parallel.layout import Layout
from jaxllm.parallel.mesh import make_mesh
from jaxllm.weights.experts import split_experts
from jaxllm.weights.load import load_params
from jaxllm.weights.source import CheckpointError

GOLDEN = Path(__file__).parents[1] / "golden"


def model(name: str) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    config = config_from_hf(json.loads((GOLDEN / name / "config.json").read_text()))
    return config, load_file(GOLDEN / name / "model.safetensors")


def stacked(cfg: ModelConfig, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A checkpoint as transformers 5 keeps it in memory."""
    assert cfg.experts is not None
    names, out = cfg.experts.names, dict(arrays)
    for layer in filter(cfg.sparse, range(cfg.num_layers)):
        old, new = f"model.layers.{layer}.{names.module}", f"model.layers.{layer}.mlp"
        out[f"{new}.gate.weight"] = out.pop(f"{old}.gate.weight")
        each = [
            [out.pop(f"{old}.experts.{e}.{part}.weight") for part in (names.gate, names.up, names.down)]
            for e in range(cfg.experts.count)
        ]
        out[f"{new}.experts.gate_up_proj"] = np.stack([np.concatenate([gate, up]) for gate, up, _ in each])
        out[f"{new}.experts.down_proj"] = np.stack([down for *_, down in each])
    return out


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_stack_is_read_like_single_experts(memory_source: Any, name: str) -> None:
    cfg, arrays = model(name)
    mesh, layout = make_mesh(Mapping(ep=2, tp=2)), Layout(Mapping(ep=2, tp=2), np.dtype(np.float32))
    specs, shapes = param_specs(cfg, layout), checkpoint_shapes(cfg)
    names = cfg.experts.names
    source = memory_source(stacked(cfg, arrays))
    split = split_experts(source, names.module, names.gate, names.up, names.down)
    found = load_params(specs, shapes, split, mesh)
    single = memory_source(arrays)
    wanted = load_params(specs, shapes, single, mesh)
    for path in wanted:
        np.testing.assert_array_equal(found[path], wanted[path], err_msg=path)
    assert source.bytes_read == single.bytes_read


def test_nothing_to_split(memory_source: Any) -> None:
    source = memory_source({"a": np.zeros((2, 2), ml_dtypes.bfloat16)})
    assert split_experts(source, "mlp", "gate_proj", "up_proj", "down_proj") is source


@pytest.mark.parametrize("form", ["single", "stacked"])
def test_missing_experts(tmp_path: Path, form: str) -> None:
    cfg, arrays = model("mixtral")
    if form == "stacked":
        arrays = stacked(cfg, arrays)
        arrays["model.layers.1.mlp.experts.down_proj"] = arrays["model.layers.1.mlp.experts.down_proj"][:7]
    else:
        del arrays["model.layers.1.block_sparse_moe.experts.7.w2.weight"]
    shutil.copy(GOLDEN / "mixtral" / "config.json", tmp_path)
    save_file(arrays, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.block_sparse_moe\.experts\.7\.w2\.weight: missing"):
        LLM(tmp_path, skip_tokenizer_init=True, dtype="float32", progress=False)


def test_experts_that_do_not_divide() -> None:
    with pytest.raises(
        ValueError, match=r"moe_expert_parallel_size = 3 does not divide the model's 8 experts; use one"
    ):
        LLM(GOLDEN / "mixtral", skip_tokenizer_init=True, moe_expert_parallel_size=3, progress=False)


def test_a_backend_of_another_engine(caplog: pytest.LogCaptureFixture) -> None:
    config = EngineConfig(model="x", moe_config={"backend": "Cutlass"})
    assert config.moe_config.backend == "CUTLASS" and config.moe_config.alias == "CUTLASS"
    assert EngineConfig(model="x", moe_config={"backend": "xla"}).moe_config.alias is None
    assert EngineConfig(model="x", moe_config=None).moe_config.method is None
    with caplog.at_level("INFO", "jaxllm"), pytest.raises(ValueError):
        LLM(GOLDEN / "mixtral", skip_tokenizer_init=True, moe_expert_parallel_size=3, moe_config={"backend": "TRTLLM"})
    assert len([r for r in caplog.records if "moe_config.backend TRTLLM" in r.message]) == 1
