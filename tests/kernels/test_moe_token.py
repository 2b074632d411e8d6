"""The kernel that takes a token through a layer's experts, run on the emulator, against XLA's composition."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.kernels.cuda import call, rtc
from jaxllm.kernels.moe_token import cuda, layer_cuda
from jaxllm.kernels.router.cuda import Choice
from tests.kernels.emulator.emulator import Kernels


@pytest.fixture
def emulated(monkeypatch):
    """Launches of few blocks go to the emulator, with the seed that is set."""

    def compile_ptx(kernel, source, macros):
        return Kernels(rtc.SOURCES / f"{source}.cu", macros)

    def launch(name, kernels, operands, results, *, grid, threads, shared=0, aliases=None):
        wanted = [(result.shape, np.dtype(result.dtype)) for result in results]
        operands = [np.asarray(operand) for operand in operands]
        how = {"grid": grid, "threads": threads, "shared": shared, "aliases": aliases, "seed": seed[0]}
        return kernels.run(name, operands, wanted, **how)

    seed = [0]
    monkeypatch.setattr(call, "compile_or_refuse", compile_ptx)
    monkeypatch.setattr(call, "launch", launch)
    monkeypatch.setattr(call, "SMS", 3)
    monkeypatch.setattr(cuda, "WARPS", 2)
    return seed


CASES = [
    # A, D, E, F, choice, activation, slots
    (512, 256, 9, 256, Choice(3, 1e-6), "silu", 3),
    pytest.param(
        (0, 512, 40, 256, Choice(4, 1e-5, normalise=False, sigmoid=True, scale=2.5), "gelu_tanh", None),
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_xla(case, seed: int, emulated) -> None:
    """Warps of few blocks take many items; rings of three stages go round."""
    *sizes, choice, activation, slots = case
    operands = cuda.random_operands(*sizes, bias=choice.sigmoid, seed=seed)
    emulated[0] = seed
    found = cuda.implementation(operands, choice, activation=activation, slots=slots)(operands)
    wanted = np.asarray(cuda.plain(operands, choice, activation=activation), np.float32)
    start = np.asarray(operands.x, np.float32)
    error = np.linalg.norm(np.asarray(found, np.float32) - wanted) / np.linalg.norm(wanted - start)
    assert error < 5e-3


LAYERS = [
    # heads, KV heads, tokens, page, norms, units for each warp that one block has
    (8, 2, 70, 16, True, 1),
    pytest.param((4, 1, 21, 32, False, 4), marks=pytest.mark.slow),
    pytest.param((2, 2, 0, 16, True, 4), marks=pytest.mark.slow),
    pytest.param((8, 1, 300, 32, True, 1), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_a_layer_equals_xla(case, seed: int, emulated, monkeypatch) -> None:
    """Contexts of one block and of several, a token in a page's last places, and no token."""
    monkeypatch.setattr(call, "SMS", 5)
    N, K, tokens, page, norms, alone = case
    choice, E, how = Choice(2, 1e-6), 4, {"activation": "silu", "scale": 0.1}
    if not norms:
        choice, E = Choice(3, 1e-6, sigmoid=True, scale=2.5), 75  # more than there are threads
    if not tokens:
        choice = Choice(3, 1e-6, normalise=False)
    operands = layer_cuda.random_operands(256, (N, K), E, 256, tokens, page=page, norms=norms, seed=seed)
    if not norms:
        operands = operands._replace(bias=jax.random.uniform(jax.random.key(seed), (E,)))
    emulated[0] = seed
    operands = operands._replace(upcoming=operands.qkv if tokens > 50 else None)
    kv = operands.kv_PYKOH
    if tokens:  # what is where the last token goes, and what follows it, may be anything
        kv = kv.at[operands.page[0], :, :, (tokens - 1) % page :].set(jnp.nan)
    out, pool = layer_cuda.implementation(operands._replace(kv_PYKOH=kv), choice, slots=3, alone=alone, **how)(
        operands._replace(kv_PYKOH=kv)
    )
    wanted, wanted_pool = layer_cuda.plain(operands, choice, **how)
    out, wanted, start = (np.asarray(a, np.float32) for a in (out, wanted, operands.x))
    if tokens:
        assert np.linalg.norm(out - wanted) < 6e-3 * np.linalg.norm(wanted - start)
    assert np.isfinite(out).all()
    there = np.isfinite(np.asarray(kv, np.float32))
    there[int(operands.page[0]), :, :, int(operands.slot[0])] = True
    there[0] = False  # page 0 is nobody's
    a, b = (np.asarray(x, np.float32)[there] for x in (pool, wanted_pool))
    assert np.abs(a - b).max() <= 0.01 * np.abs(b).max()


@pytest.mark.slow
def test_rows_that_come_one_by_one(emulated) -> None:
    """512 pairs of rows for queries, keys and values, and 6 warps: the last rounds' rows are one for each warp."""
    choice, how = Choice(2, 1e-6), {"activation": "silu", "scale": 0.1}
    operands = layer_cuda.random_operands(2048, (6, 1), 4, 256, 21)
    assert 0 < operands.qkv.shape[0] % 12 <= 6
    found = layer_cuda.implementation(operands, choice, slots=3, **how)(operands)
    assert layer_cuda.difference(operands, found, choice, 0.1) < 1e-2


def test_the_timeline_of_a_layer(emulated) -> None:
    """Every warp's marks follow one another, and nothing else changes."""
    choice, how = Choice(2, 1e-6), {"activation": "silu", "scale": 0.1, "slots": 3}
    operands = layer_cuda.random_operands(256, (2, 1), 4, 256, 20, page=16)
    out, _, times = layer_cuda.launcher(operands, choice, timeline=True, **how)(operands)
    assert np.array_equal(out, layer_cuda.implementation(operands, choice, **how)(operands)[0])
    marks = np.asarray(times)[:, :, : len(layer_cuda.PHASES) + 1].astype(np.int64)
    assert (np.diff(marks) > 0).all()
    found = layer_cuda.phases(np.asarray(times)[None])
    assert list(found) == [*layer_cuda.PHASES, "begins late", "all"]
    assert all(0 <= low <= middle <= high for low, middle, high in found.values())
    assert found["all"][1] == 1e-3 * float(times[:, :, -1].max() - times[:, :, -2].min())


def test_what_the_kernel_cannot_do() -> None:
    def of(T=1, D=256, F=256, dtype=jnp.bfloat16, A=256):
        shapes = ((T, D), (T, A), (D, A), (D,), (8, D), (8, 2 * F, D), (8, D, F))
        x, attended, output, norm, router, gate_up, down = (jax.ShapeDtypeStruct(s, dtype) for s in shapes)
        return cuda.Operands(x, attended, output, norm, router, None, gate_up, down)

    for operands in (of(T=2), of(D=128), of(F=320), of(A=64), of(dtype=jnp.float32), of(F=256 * 200)):
        with pytest.raises(NotImplementedError):
            cuda.implementation(operands, Choice(2, 1e-5), activation="silu")
    with pytest.raises(NotImplementedError):
        cuda.implementation(of(), Choice(2, 1e-5), activation="gelu")


MODEL = Path(__file__).parents[1] / "golden" / "qwen3_moe"


def test_steps_of_one_token_ask_for_it(monkeypatch) -> None:
    """And what stands for it elsewhere gives the tokens that the layer's parts give."""
    asked, layers = [], []

    def choose(operands, choice, *, activation):
        asked.append(tuple(None if array is None else array.shape for array in operands))
        return lambda operands: operands.x * jnp.nan  # traced, and not run on a CPU

    def choose_layer(operands, choice, *, activation, scale):
        layers.append(operands.kv_PYKOH.shape)
        return lambda operands: (operands.x * jnp.nan, operands.kv_PYKOH)

    def tokens(prompt: list[int]) -> list[int]:
        jax.clear_caches()  # alike layers share a trace
        sizes = {"max_seq_len": 16, "max_batch_size": 1, "batch_buckets": [1], "token_buckets": [8]}
        pages = {"tokens_per_block": 4, "max_tokens": 64}
        with LLM(
            MODEL, dtype="float32", skip_tokenizer_init=True, progress=False, kv_cache_config=pages, **sizes
        ) as llm:
            params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
            return list(llm.generate(prompt, params, use_tqdm=False).outputs[0].token_ids)

    wanted = tokens([3, 1, 4])
    monkeypatch.setattr(cuda, "choose", choose)
    assert tokens([3, 1, 4]) == wanted
    assert asked and all(shapes[0][0] == 1 and None not in shapes[:5] for shapes in asked)
    half = len(asked)
    monkeypatch.setattr(layer_cuda, "choose", choose_layer)
    assert tokens([3, 1, 4]) == wanted
    assert len(asked) == half and len(layers) > 0
