"""Compiled programs take the arguments, and have the collectives, that the plan tells."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxllm.config import EngineConfig
from jaxllm.engine.buckets import Bucket
from jaxllm.engine.forward import StepFunctions
from jaxllm.plan.compile import HLO_NAMES, compile_step, count_collectives, described_devices
from jaxllm.plan.find import find_model
from jaxllm.plan.gpus import find_gpu
from jaxllm.plan.plan import Plan, make_plan
from jaxllm.settings import ConfigError
from tests.tiny_llm import MODEL

pytestmark = pytest.mark.timeout(300)


def plan_of(model: Path = MODEL, **settings: Any) -> Plan:
    config = EngineConfig(
        model=str(model),
        dtype="float32",
        max_batch_size=8,
        max_num_tokens=256,
        kv_cache_config={"max_tokens": 1024},
        **settings,
    )
    return make_plan(find_model(config.model), config, config.resolve_mapping(8), find_gpu("h200"))


@pytest.mark.parametrize(
    ("dtype", "decodes", "tiles", "lanes", "own"),
    [
        (jnp.float8_e4m3fn, 1, 0, 1, True),
        (jnp.float8_e4m3fn, 8, 0, 8, False),
        (jnp.float8_e4m3fn, 1, 4, 1, False),
        (jnp.bfloat16, 32, 0, 1, True),
        (jnp.bfloat16, 64, 0, 1, False),
        (jnp.bfloat16, 16, 0, 4, False),
        (jnp.bfloat16, 1, 4, 1, False),
    ],
)
def test_kernels_of_xla_for_products(dtype: Any, decodes: int, tiles: int, lanes: int, own: bool) -> None:
    """Without them a step of one token widens the bfloat16 output matrix; steps of many tokens are faster so."""
    functions = SimpleNamespace(specs={"a": SimpleNamespace(dtype=dtype)})
    shape = SimpleNamespace(bucket=Bucket(decodes, tiles), lanes=lanes)
    options = StepFunctions.compiler_options(functions, shape)  # type: ignore[arg-type]
    assert ("xla_gpu_enable_triton_gemm" not in options) == own


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"tensor_parallel_size": 2},
    {"tensor_parallel_size": 5},
    {"tensor_parallel_size": 2, "moe_expert_parallel_size": 2},
    {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    *(
        {"tensor_parallel_size": 2, "context_parallel_size": 2, "cp_config": {"cp_type": kind, **keys}}
        for kind, keys in (("RING", {}), ("ULYSSES", {}), ("HELIX", {}), ("STAR", {"block_size": 32}))
    ),
    {"context_parallel_size": 4, "cp_config": {"cp_type": "RING"}},
    {"tensor_parallel_size": 4, "enable_attention_dp": True},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", ["decode", "prompt"])
def test_arguments_and_collectives(kind: str, layout: dict[str, Any]) -> None:
    check(plan_of(**layout), kind)


EXPERT_LAYOUTS: list[dict[str, Any]] = [
    {"tensor_parallel_size": 2, "moe_expert_parallel_size": 2},
    {"tensor_parallel_size": 2, "moe_expert_parallel_size": 4, "enable_attention_dp": True},
    {"tensor_parallel_size": 2, "moe_expert_parallel_size": 4, "moe_config": {"dispatch": "all_to_all"}},
]


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", ["decode", "prompt"])
def test_arguments_and_collectives_of_experts(kind: str, layout: dict[str, Any]) -> None:
    check(plan_of(MODEL.parent / "mixtral", **layout), kind)


def test_arguments_and_collectives_of_experts_in_e4m3() -> None:
    layout = {"tensor_parallel_size": 4, "moe_expert_parallel_size": 4, "enable_attention_dp": True}
    check(plan_of(MODEL.parent / "mixtral", quantization="fp8", **layout), "decode")


@pytest.mark.parametrize(
    "more",
    [
        {"moe_config": {"dispatch": "replicate"}},
        {"moe_config": {"dispatch": "all_to_all"}},
        {"context_parallel_size": 2, "cp_config": {"cp_type": "HELIX"}},
    ],
    ids=str,
)
def test_arguments_and_collectives_of_latents_and_shared_experts(more: dict[str, Any]) -> None:
    layout = {"tensor_parallel_size": 2, "moe_expert_parallel_size": 2, **more}
    check(plan_of(MODEL.parent / "deepseek_v3", **layout), "decode")


def check(plan: Plan, kind: str) -> None:
    """Compiled for the CPU, whose programs have the same arguments and collectives."""
    bucket = plan.decode_bucket if kind == "decode" else Bucket(0, 2)
    stages = compile_step(plan, jax.devices(), bucket)
    assert len(stages) == len(plan.stages)
    found: Counter[str] = Counter()
    for stage in stages:
        assert stage.difference < 0.001, stage
        found.update(stage.collectives)
    planned: Counter[str] = Counter()
    for c in plan.decode_collectives if kind == "decode" else plan.prompt_collectives:
        if c.kind != "send":
            planned[HLO_NAMES[c.kind]] += c.count
    assert found == planned


def test_collectives_are_counted_in_all_their_forms() -> None:
    hlo = """
      %a = f32[8]{0} all-reduce(%x), channel_id=1
      %b = (f32[8]{0}, f32[8]{0}) all-reduce-start(%x), channel_id=2
      %c = f32[8]{0} all-reduce-done(%b)
      %d = f32[16]{0} all-gather(f32[8]{0} %all-reduce.7), dimensions={0}
      ROOT %e = f32[8]{0} custom-call(%x), custom_call_target="__gpu$xla.gpu.ptx", backend_config={name = "all_reduce"}
    """
    assert count_collectives(hlo) == {"all-gather": 1, "all-reduce": 3}


def test_what_cannot_be_compiled() -> None:
    with pytest.raises(ConfigError, match="gpu 'l4' cannot be compiled for; use h200"):
        described_devices("l4", 1)
    config = EngineConfig(model="Llama-3.1-8B")
    model = replace(find_model("Llama-3.1-8B"), config=None)
    plan = make_plan(model, config, config.resolve_mapping(1), find_gpu("h200"))
    with pytest.raises(ConfigError, match=r"cannot compile Llama-3\.1-8B: its sizes alone are known"):
        compile_step(plan, jax.devices())


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs the CUDA plugin, not a GPU")
def test_for_a_gpu_that_is_not_there() -> None:
    (first, second) = compiled_by_the_command(str(MODEL), "--tp", "2", "--pp", "2")
    for stage in (first, second):
        assert stage["collectives"]["all-reduce"] == 3 - stage["collectives"].get("all-gather", 0)


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs the CUDA plugin, not a GPU")
@pytest.mark.parametrize("tp", ["1", "2"])
def test_messages_of_any_length_for_a_gpu_that_is_not_there(tmp_path: Path, tp: str) -> None:
    """The collective that no CPU has: there and back, in each of two layers, on two and four devices."""
    (tmp_path / "ragged.yaml").write_text("moe_config: {dispatch: ragged}")
    config = ("--config", str(tmp_path / "ragged.yaml"), "--tp", tp, "--ep", "2", "--devices", str(2 * int(tp)))
    (stage,) = compiled_by_the_command(str(MODEL.parent / "mixtral"), *config)
    assert stage["collectives"]["ragged-all-to-all"] == 4


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs the CUDA plugin, not a GPU")
def test_experts_in_e4m3_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """Two layers of Qwen3-235B-A22B over four GPUs that have a fourth of the requests and of the experts each."""
    shipped = json.loads((files("jaxllm.plan") / "models" / "Qwen3-235B-A22B.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(shipped | {"num_hidden_layers": 2}))
    layout = ("--tp", "4", "--ep", "4", "--devices", "4", "--enable-attention-dp", "--quantization", "fp8")
    (stage,) = compiled_by_the_command(str(tmp_path), *layout)
    assert stage["scratch_bytes"] < 2**27  # the experts of a layer, widened, are nine times as much


def compiled_by_the_command(*arguments: str) -> list[dict[str, Any]]:
    """What `jaxllm plan --compile` says of each stage."""
    options = ["--dtype", "bfloat16", "--max-batch-size", "8", "--json", "--compile"]
    done = subprocess.run(
        [sys.executable, "-m", "jaxllm.cli", "plan", *arguments, *options],
        capture_output=True, text=True, timeout=250, env={**os.environ, "XLA_FLAGS": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stages: list[dict[str, Any]] = json.loads(done.stdout)["compiled"]
    for stage in stages:
        assert abs(stage["argument_bytes"] - stage["planned_bytes"]) < 0.001 * stage["planned_bytes"]
    return stages
