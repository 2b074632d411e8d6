"""Checkpoints in fp8, AWQ, GPTQ and packed integers against the numbers that they stand for, on several layouts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm.models.checkpoint import checkpoint_shapes
from jaxllm.models.fields import ModelConfigError
from jaxllm.models.registry import config_from_hf
from jaxllm.weights.resolve import convert_model, resolve_model
from jaxllm.weights.scaled import scaled
from jaxllm.weights.source import CheckpointError

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))

import quantized_files as files  # noqa: E402
from full_logits import FullLogits  # noqa: E402

PROMPTS = [[5, 17, 99, 120, 33, 8, 64], [7], [150, 3, 3, 77, 201, 12, 9, 40, 41, 42, 100, 18]]


def written(name: str, directory: Path) -> tuple[Path, Path]:
    shapes = checkpoint_shapes(config_from_hf(files.CASES[name].config))
    return files.write(name, shapes, directory)


def model(directory: Path, tp: int) -> FullLogits:
    found = resolve_model(directory)
    assert found.config is not None
    cfg = config_from_hf(found.config)
    source = scaled(found.open(), None if cfg.quantization is None else cfg.quantization.stored)
    try:
        return FullLogits(cfg, source, tp)
    finally:
        source.close()


FAST = {("fp8_tensor_static", 2), ("fp8_channel", 3), ("fp8_block", 2), ("awq", 2), ("gptq", 3), ("fp8_modelopt", 1)}


@pytest.mark.parametrize(
    ("name", "tp"),
    [
        pytest.param(name, tp, marks=[] if (name, tp) in FAST else pytest.mark.slow)
        for name in files.CASES
        for tp in (1, 2, 3)
    ],
)
def test_logits(name: str, tp: int, tmp_path: Path) -> None:
    """Of the numbers that the checkpoint stands for, and every matrix that says so is kept quantised."""
    small, wide = written(name, tmp_path)
    quantised = model(small, tp)
    values = [path for path, spec in quantised.functions.specs.items() if path.endswith(".values")]
    layers = quantised.cfg.num_layers
    kept = {path.split(".", 2)[2] for path in values}
    if tp == 1:
        assert {"attention.out.weight.values"} < kept and len(values) >= 4 * layers
    for ours, theirs in zip(quantised(PROMPTS, 8), model(wide, tp)(PROMPTS, 8), strict=True):
        assert np.abs(theirs).max() > 1
        np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "quant_method 'bitsandbytes' is not supported, the supported ones are fp8, ",
        ),
        ({"quant_method": "gptq", "bits": 4, "desc_act": True}, "desc_act is True: groups of reordered inputs"),
        ({"quant_method": "gptq", "bits": 3}, "bits is 3, GPTQ checkpoints with 4 or 8"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv' of AWQ"),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            "quant_algo 'NVFP4' of ModelOpt is not supported, only FP8",
        ),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size is .128., it must be two sizes"),
        (
            files.compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="group"),
            "4-bit float weights by",
        ),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message) as error:
        config_from_hf({**files.LLAMA, "quantization_config": change})
    assert "\n" not in str(error.value)


def test_missing_scales(tmp_path: Path) -> None:
    small, _ = written("fp8_channel", tmp_path)
    found = resolve_model(small)
    assert found.config is not None
    config = json.loads((small / "config.json").read_text())
    stored = config_from_hf(config).quantization
    assert stored is not None
    tensors = dict(found.open().tensors)
    name = "model.layers.0.mlp.up_proj.weight_scale"
    assert name in tensors
    source = found.open()
    del source.tensors[name]  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"up_proj: quantised values, but no weight_scale"):
        scaled(source, stored.stored)


@pytest.mark.parametrize("name", ["fp8_block", "awq"])
def test_converted(name: str, tmp_path: Path) -> None:
    """An Orbax copy has the values and scales of the checkpoint, not the numbers that they stand for."""
    small, _ = written(name, tmp_path)
    copy = convert_model(resolve_model(small), tmp_path / "copy")
    kept = config_from_hf(json.loads((copy / "config.json").read_text())).quantization
    assert kept is not None and kept.stored is not None
    sources = [scaled(resolve_model(path).open(), kept.stored) for path in (small, copy)]
    assert set(sources[0].tensors) == set(sources[1].tensors)
    for tensor, info in sources[0].tensors.items():
        if sources[0].quantization(tensor) is not None:
            rows, columns = slice(3, 40), slice(32, 64)
            first, second = (source.read_quantized(tensor, rows, columns) for source in sources)
            assert first.values.dtype.itemsize == 1
            np.testing.assert_array_equal(first.values.view(np.uint8), second.values.view(np.uint8))
            np.testing.assert_array_equal(first.scale, second.scale)
        whole = [source.read(tensor, tuple(slice(None) for _ in info.shape)) for source in sources]
        np.testing.assert_array_equal(*whole)
    for source in sources:
        source.close()


def test_orders_are_those_of_the_formats() -> None:
    """The packing of a known word, byte by byte."""
    values = np.arange(8)[None]
    assert files.words(values, 4, 1, files.AWQ_PLACES).view(np.uint32)[0, 0] == 0x75316420
    assert files.words(values, 4, 1).view(np.uint32)[0, 0] == 0x76543210
    assert files.nearest_e4m3(np.asarray([448.0, -0.015625, 2.0**-9, 0.0])).tolist() == [0x7E, 0x88, 0x01, 0x00]
