"""`jaxllm plan`: what it prints, the JSON, and what it says of bad arguments."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import Any

import pytest

from jaxllm.cli import main
from jaxllm.plan.report import as_json
from tests.plan.test_plan import plan


def schema(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: schema(item) for key, item in value.items()}
    return [schema(value[0])] if isinstance(value, list) and value else type(value).__name__


def test_the_json_keeps_its_keys():
    """A change here is a change for whoever reads the JSON: raise `report.SCHEMA` unless keys were only added."""
    collective = {
        "kind": "str", "where": "str", "axes": ["str"], "ranks": "int", "count": "int", "bytes": "int",
        "conditional": "bool",
    }  # fmt: skip
    mapping = {
        "tp": "int", "pp": "int", "cp": "int", "ep": "int", "cp_type": "NoneType", "attention_dp": "bool",
        "devices": "int",
    }  # fmt: skip
    found = as_json(plan("Llama-3.1-70B", tensor_parallel_size=4))
    assert json.loads(json.dumps(found)) == found
    assert schema(found) == {
        "schema": "int",
        "ok": "bool",
        "problems": "list",
        "notes": "list",
        "nearest": "list",
        "model": {
            "name": "str", "kind": "str", "layers": "int", "parameters": "int", "active_parameters": "int",
            "engine_runs_it": "bool",
        },
        "mapping": mapping,
        "ranks": [{"pp": "int", "cp": "int", "ep": "int", "tp": "int"}],
        "gpu": {
            "name": "str", "memory_bytes": "int", "usable_bytes": "int", "bandwidth": "float", "flops": "float",
            "link": "float", "latency": "float", "source": "str",
        },
        "settings": {
            "dtype": "str", "kv_dtype": "str", "max_batch_size": "int", "max_num_tokens": "int", "max_seq_len": "int",
        },
        "stages": [
            {
                "layers": ["int"], "weight_bytes": "int", "kv_bytes": "int", "activation_bytes": "int",
                "buffer_bytes": "int", "total_bytes": "int", "free_bytes": "int",
            }
        ],
        "kv_cache": {"pages": "int", "page_tokens": "int", "tokens": "int"},
        "roofline": {
            "input_tokens": "int",
            "output_tokens": "int",
            "speeds": [{"batch": "int", "tpot_s": "float", "ttft_s": "float", "output_tokens_per_s": "float"}],
        },
        "collectives": {"decode": [collective], "prompt": [collective]},
        "compiled": "list",
    }  # fmt: skip
    assert found["schema"] == 1
    bad = as_json(plan("Llama-3.1-405B", tensor_parallel_size=4))
    assert not bad["ok"] and schema(bad["nearest"]) == [mapping] and set(bad) == set(found)


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (("Llama-3.1-70B", "--tp_size", "4"), 0, ("0 1 2 3", "KV cache: ", "TPOT", "80 x all_reduce", "OK")),
        (("Llama-3.1-70B", "--tp", "2", "--pp", "2"), 0, ("stage 1, layers 40-79      2 3",)),
        (("Mixtral-8x7B", "--tp", "2", "--ep", "4"), 0, ("0 1 | 2 3 | 4 5 | 6 7", "12.9 B of them for a token", "OK")),
        (("Llama-3.1-8B", "--tp", "2", "--cp", "2", "--cp-type", "ring"), 0, ("cp 1   2 3", "pages of 64 tokens")),
        (("Llama-3.1-8B", "--memory", "16"), 1, ("does not fit: the weights take 15.0 GiB", "tp=2 (2 devices)")),
    ],
    ids=str,
)
def test_the_command(capsys, arguments, code, parts):
    assert main(["plan", *arguments]) == code
    out = capsys.readouterr().out
    for part in parts:
        assert part in out, out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("Llama-3.1-7B",), "did you mean Llama-3.1-"),
        (("nonsense",), "shipped are DeepSeek-V3"),
        (("nowhere/config.json",), "cannot read 'nowhere/config.json'"),
        (("Llama-3.1-8B", "--gpu", "h300"), "gpu 'h300' is not in the table; use one of h200"),
        (("Llama-3.1-8B", "--memory", "-1"), "must be above 0"),
        (("Llama-3.1-8B", "--cp", "2", "--cp-type", "rings"), "use ULYSSES, STAR, RING or HELIX"),
        (("Llama-3.1-8B", "--pp", "2", "--pp-partition", "1,2,3"), "has 3 stages"),
        (("Llama-3.1-8B", "--tp", "8", "--devices", "4"), "what fits: tp=4"),
        # These no layout mends: what is wrong is all that is said.
        (
            ("Llama-3.1-8B", "--max-seq-len", "500000"),
            "max_seq_len = 500000 is more than the model's context of 131072",
        ),
        (("Llama-3.1-8B", "--max-num-tokens", "16"), "max_num_tokens = 16 is less than max_batch_size = 256"),
        (("DeepSeek-V3", "--quantization", "int8"), "quantization = 'int8', but the checkpoint's weights are fp8"),
    ],
    ids=str,
)
def test_bad_arguments(capsys, arguments, part):
    assert main(["plan", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and part in lines[0], lines


@pytest.mark.parametrize(
    ("model", "slots", "problem"),
    [("Llama-3.1-8B", 288, "model has no experts; leave it out"), ("DeepSeek-V3", 200, "use at least 256")],
)
def test_experts_that_no_layout_places(model, slots, problem):
    with pytest.raises(ValueError, match=problem):
        plan(model, tensor_parallel_size=16, moe_config={"load_balancer": {"num_slots": slots}})


def test_slots_that_another_layout_places():
    settings = {"tensor_parallel_size": 1, "moe_expert_parallel_size": 32, "devices": 32}
    found = plan("DeepSeek-V3", **settings, moe_config={"load_balancer": {"num_slots": 272}})
    assert "272 does not divide evenly" in found.problems[0] and found.nearest


def test_bad_json(capsys, tmp_path):
    file = tmp_path / "config.json"
    for content, part in (("{", "not valid JSON"), ("[]", "must hold a JSON object"), ("{}", "neither architectures")):
        file.write_text(content)
        assert main(["plan", str(file)]) == 2
        assert part in capsys.readouterr().err


def test_seconds_without_devices():
    """405 B parameters in seconds, and no device was looked for."""
    code = (
        "import sys; from jaxllm.cli import main; code = main(['plan', 'Llama-3.1-405B', '--tp', '4', '--pp', '2']); "
        "import jax; sys.exit(code or len(jax._src.xla_bridge._backends))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=100)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 15
