"""Experts in slots: other placements give the same tokens, also while experts move between steps; bad placements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jax import monitoring

from jaxllm import LLM, SamplingParams, placement
from jaxllm.config import EngineConfig

GOLDEN = Path(__file__).parents[1] / "golden"
EP = {"tensor_parallel_size": 1, "moe_expert_parallel_size": 4}


def expected(model: str) -> tuple[list[list[int]], list[list[int]]]:
    with np.load(GOLDEN / model / "expected.npz") as file:
        count = len(file.files) // 3
        return [[file[f"{kind}_{i}"].tolist() for i in range(count)] for kind in ("prompt", "greedy")]


def make(model: str, balancer: Any, **settings: Any) -> LLM:
    moe = {"load_balancer": balancer, **settings.pop("moe_config", {})}
    return LLM(
        GOLDEN / model,
        **{
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "max_batch_size": 4,
            "max_num_tokens": 48,
            "max_seq_len": 64,
            "kv_cache_config": {"tokens_per_block": 4, "max_tokens": 640},
            "batch_buckets": [4],
            "token_buckets": [48],
            "progress": False,
            "moe_config": moe,
            **EP,
            **settings,
        },
    )


def tokens(llm: LLM, prompts: list[list[int]], count: int) -> list[list[int]]:
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    return [out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)]


def test_a_placement_from_a_file(tmp_path: Path) -> None:
    """Copies of some experts, all in another order, other ones in each layer; a part of the layers is not named."""
    prompts, wanted = expected("qwen3_moe")
    rng = np.random.default_rng(0)
    slots = {2: rng.permutation([*range(8), 7, 7, 3, 0]).tolist()}
    file = tmp_path / "placement.json"
    file.write_text(json.dumps({"num_slots": 12, "initial_global_assignments": slots}))
    with make("qwen3_moe", str(file)) as llm:
        assert tokens(llm, prompts, len(wanted[0])) == wanted
        stage = llm._engine._runner.stages[0]
        assert stage.functions.loads is None, "nothing is counted"
        weight = stage.weights[stage.functions.weight_index("layers.2.mlp.down")]
        assert weight.shape[0] == 12 and weight.addressable_shards[0].data.shape[0] == 3


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"moe_config": {"dispatch": "all_to_all"}, "enable_attention_dp": True, "tensor_parallel_size": 2},
    ],
    ids=["replicate", "wide"],
)
def test_experts_move_between_steps(settings: dict[str, Any]) -> None:
    """No program is compiled on the way, and the tokens are those of transformers before, meanwhile and after."""
    prompts, wanted = expected("mixtral")
    compiled: list[str] = []
    online = {"num_slots": 12, "layer_updates_per_iter": 1, "iters_per_reading": 2}
    with make("mixtral", online, **settings) as llm:
        (balancer,) = llm._engine._runner.balancers
        before = [layer.slots for layer in balancer._layers]
        assert before == [placement.in_turn(8, 12)] * 2
        assert tokens(llm, prompts, 2) == [row[:2] for row in wanted]  # whatever runs once has run
        monitoring.register_event_duration_secs_listener(
            lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
        )
        for _ in range(3):
            assert tokens(llm, prompts, len(wanted[0])) == wanted
        assert balancer.moved > 0 and [layer.slots for layer in balancer._layers] != before
        assert not compiled, compiled
        stats = llm.get_stats()
        assert stats["expert_layers_moved"] == balancer.moved and stats["expert_imbalance"] >= 1
        stage = llm._engine._runner.stages[0]
        for number, layer in enumerate(balancer._layers):
            down = np.asarray(stage.weights[stage.functions.weight_index(f"layers.{number}.mlp.down")])
            of = {expert: down[slot] for slot, expert in enumerate(layer.slots)}
            for slot, expert in enumerate(layer.slots):
                np.testing.assert_array_equal(down[slot], of[expert])
            assert len({values.tobytes() for values in of.values()}) == 8


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"tensor_parallel_size": 2, "moe_expert_parallel_size": 2}, marks=pytest.mark.slow),
        {"moe_config": {"dispatch": "all_to_all", "max_num_tokens": 16}, "moe_expert_parallel_size": 2},
    ],
    ids=["replicate", "all_to_all in turns"],
)
def test_every_token_is_counted_once(settings: dict[str, Any]) -> None:
    prompts, _ = expected("mixtral")
    online = {"layer_updates_per_iter": 1, "iters_per_reading": 10**6}
    with make("mixtral", online, **settings) as llm:
        tokens(llm, prompts[-2:], 5)
        load = np.asarray(llm._engine._runner.stages[0].take_loads()).sum(axis=0)
        # Two experts a token; the last token goes nowhere, and steps run ahead of what is read.
        least = 2 * sum(len(prompt) + 4 for prompt in prompts[-2:])
        assert (load.sum(axis=1) >= least).all() and (load.sum(axis=1) <= least + 2 * 4).all()
        assert load.shape == (2, 8)


BAD = [
    ({"num_slots": 7}, r"num_slots = 7 is less than the model's 8 experts; use at least 8"),
    ({"num_slots": 10}, r"num_slots = 10 does not divide evenly over moe_expert_parallel_size = 4; use 8 or 12"),
    (
        {"initial_global_assignments": {5: list(range(8))}},
        r"of layer 5: the layers with experts of this model are 0 to 1",
    ),
    (
        {"num_slots": 12, "initial_global_assignments": {1: list(range(8))}},
        r"of layer 1 are 8, but there are num_slots = 12",
    ),
    (
        {"initial_global_assignments": {1: list(range(1, 9))}},
        r"of layer 1 name expert 8, but the model has 8, from 0 on",
    ),
    ({"initial_global_assignments": {1: [0] * 8}}, r"of layer 1 leave expert 1 without a slot; every expert needs one"),
]


@pytest.mark.parametrize(("balancer", "message"), BAD, ids=lambda value: str(value)[:30])
def test_a_placement_for_another_model(balancer: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make("mixtral", balancer, load_format="dummy")
    assert "\n" not in str(caught.value)


def test_a_model_without_experts() -> None:
    with pytest.raises(ValueError, match="load_balancer is set, but a llama model has no experts; leave it out"):
        make("llama_mha", {"num_slots": 8}, moe_expert_parallel_size=1)


def test_a_broken_file(tmp_path: Path) -> None:
    file = tmp_path / "slots.yaml"
    file.write_text("num_slots: [")
    with pytest.raises(ValueError, match=r"slots\.yaml' is not valid YAML"):
        EngineConfig(model="x", moe_config={"load_balancer": file})
