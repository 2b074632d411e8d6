"""Pipeline parallelism: stages give the answer of the whole model, whatever is in flight, and load their own layers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.engine.forward import StepFunctions
from jaxllm.engine.pipeline import ReturnedTokens
from jaxllm.mapping import Mapping
from jaxllm.models.checkpoint import checkpoint_shapes
from jaxllm.models.registry import config_from_hf
from jaxllm.parallel.layout import Layout
from jaxllm.parallel.mesh import make_mesh, stage_mesh
from jaxllm.weights.dummy import dummy_params
from jaxllm.weights.load import load_params
from jaxllm.weights.orbax import convert
from jaxllm.weights.resolve import resolve_model
from tests.tiny_llm import make_llm, prompts, tokens_of, until

pytestmark = pytest.mark.timeout(300)

PROMPTS = prompts(12, seed=1)
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)
RICH = SamplingParams(
    max_tokens=8, ignore_eos=True, temperature=1.0, seed=11, repetition_penalty=1.3, logprobs=2, prompt_logprobs=1,
    logit_bias={7: 2.0},
)  # fmt: skip


def answers(llm: LLM) -> list[Any]:
    return [tokens_of(llm.generate(PROMPTS, params, use_tqdm=False)) for params in (GREEDY, RICH)]


@pytest.fixture(scope="module")
def wanted(llm: LLM) -> list[Any]:
    return answers(llm)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with make_llm() as engine:
        yield engine


@pytest.fixture(scope="module")
def staged() -> Iterator[LLM]:
    with make_llm(pipeline_parallel_size=2) as engine:
        yield engine


def test_two_stages(staged: LLM, wanted: list[Any]) -> None:
    assert answers(staged) == wanted
    stats = staged.get_stats()
    assert stats["pages_free"] == stats["pages"]
    assert answers(staged) == wanted, "with the prompts in the prefix cache"
    assert staged.get_stats()["cache_hits"] > stats["cache_hits"]


def test_logprobs_come_from_the_last_stage(llm: LLM, staged: LLM) -> None:
    for one, two in zip(
        llm.generate(PROMPTS[:5], RICH, use_tqdm=False), staged.generate(PROMPTS[:5], RICH, use_tqdm=False), strict=True
    ):
        for field in ("logprobs", "prompt_logprobs"):
            rows = list(zip(getattr(one.outputs[0], field), getattr(two.outputs[0], field), strict=True))
            for a, b in rows[field == "prompt_logprobs" :]:
                assert a.keys() == b.keys()
                np.testing.assert_allclose(
                    [p.logprob for p in a.values()], [b[token].logprob for token in a], rtol=0, atol=1e-4
                )


@pytest.mark.parametrize(
    "settings",
    [
        {"disable_overlap_scheduler": True},
        {"kv_tokens": 80, "pp_micro_batches": 2},
        {"enable_chunked_prefill": True, "max_num_tokens": 8, "token_buckets": [8]},
    ],
    ids=["plain loop", "preemption", "short chunks"],
)
def test_every_loop_gives_the_same_tokens(wanted: list[Any], settings: dict[str, Any]) -> None:
    with make_llm(pipeline_parallel_size=2, **settings) as llm:
        assert tokens_of(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == wanted[0]
        if "kv_tokens" in settings:
            assert llm.get_stats()["preemptions"] > 0
        llm._engine._scheduler.check()


def test_steps_are_in_flight_together(staged: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many sequences as micro-batches, each step decodes half of them while the other half is on its way."""
    sizes: list[tuple[int, int]] = []
    all_are_there = threading.Event()  # or the first sequences would decode without the others
    launch = staged._engine._runner.launch

    def counted(step: Any) -> Any:
        all_are_there.wait(30)
        sizes.append((len(step.decodes), len(step.prefills)))
        return launch(step)

    monkeypatch.setattr(staged._engine._runner, "launch", counted)
    results = [staged.generate_async(prompt, GREEDY) for prompt in PROMPTS[:6]]
    all_are_there.set()
    for result in results:
        result.result()
    decodes = [n for n, prompts_ in sizes if not prompts_]
    assert len(decodes) > 20
    assert sum(n == 3 for n in decodes) > len(decodes) * 0.6, decodes


def test_cancelling_in_flight(staged: LLM, wanted: list[Any]) -> None:
    results = [
        staged.generate_async(p, SamplingParams(max_tokens=None, ignore_eos=True), streaming=True) for p in PROMPTS
    ]
    for result in results[::2]:
        next(iter(result))
        result.abort()
    for result in results:
        result.abort()
        result.result(timeout=60)
    assert until(lambda: staged.get_stats()["pages_free"] == staged.get_stats()["pages"])
    assert answers(staged) == wanted


# ---- weights ------------------------------------------------------------------------------------------------------


def same_as_the_whole(load: Any, cfg: Any, partition: tuple[int, ...]) -> None:
    """Every parameter of every stage is that of the whole model, and together they have all of them."""
    layout = Layout(Mapping(tp=2, pp=len(partition), pp_partition=partition), np.dtype(np.float32))
    whole_mesh = make_mesh(Mapping(tp=2))
    whole = load(StepFunctions(cfg, layout, whole_mesh).specs, whole_mesh)
    mesh = make_mesh(layout.mapping)
    seen: set[str] = set()
    for index, layers in enumerate(layout.mapping.stage_layers(cfg.num_layers)):
        functions = StepFunctions(cfg, layout, stage_mesh(mesh, index), layers)
        for path, array in load(functions.specs, functions.mesh).items():
            kind, _, rest = path.partition(".")
            name = path
            if kind == "layers":
                number, _, rest = rest.partition(".")
                name = f"layers.{int(number) + layers.start}.{rest}"
            seen.add(name)
            np.testing.assert_array_equal(np.asarray(array), np.asarray(whole[name]))
            assert array.sharding.device_set == set(mesh.devices[index].flat)
    assert seen == set(whole)


def test_stages_load_their_layers(tmp_path: Path) -> None:
    files = resolve_model(Path(__file__).parents[1] / "golden" / "qwen3")
    assert files.config is not None
    cfg = config_from_hf(files.config)
    shapes = checkpoint_shapes(cfg)
    source = files.open()
    same_as_the_whole(lambda specs, mesh: load_params(specs, shapes, source, mesh), cfg, (1, 1))
    orbax = resolve_model(convert(source, [], tmp_path / "orbax", metadata={})).open()
    same_as_the_whole(lambda specs, mesh: load_params(specs, shapes, orbax, mesh), cfg, (1, 1))
    same_as_the_whole(lambda specs, mesh: dummy_params(specs, mesh, 3), cfg, (1, 1))


def test_tied_embeddings_are_in_both_end_stages() -> None:
    files = resolve_model(Path(__file__).parents[1] / "golden" / "gemma3")
    assert files.config is not None
    cfg = config_from_hf(files.config)
    assert cfg.tie_embeddings
    layers = Mapping(pp=2).stage_layers(cfg.num_layers)
    mesh = make_mesh(Mapping(pp=2))
    layout = Layout(Mapping(pp=2), np.dtype(np.float32))
    specs = [StepFunctions(cfg, layout, stage_mesh(mesh, i), part).specs for i, part in enumerate(layers)]
    assert all("embed.weight" in s for s in specs)
    assert "norm.weight" in specs[1] and "norm.weight" not in specs[0]


# ---- tokens on their way back -------------------------------------------------------------------------------------


def test_the_first_stage_never_waits_for_more_than_it_needs() -> None:
    device = jax.devices()[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    returned = ReturnedTokens(5, sharding, keep=3)
    spare = 4

    def after(step: int, slots: list[int]) -> None:
        returned.after(np.array([*slots, spare]), jax.device_put(np.full(5, step, np.int32), sharding), spare)

    def step_of(slots: list[int]) -> int:
        return int(returned.before(np.array([*slots, spare]))[0])

    assert step_of([]) == 0
    after(1, [0, 1])
    after(2, [2])
    assert step_of([0]) == 1, "the array of step 2 would not be ready yet"
    assert step_of([1]) == 1
    after(3, [0])
    assert step_of([2, 1]) == 2
    assert step_of([3]) == 2
    assert step_of([0]) == 3
    after(4, [1])
    for step in range(5, 9):
        after(step, [2])
    assert step_of([1]) == 6, "the array of step 4 is gone, and any later one has its tokens, too"
