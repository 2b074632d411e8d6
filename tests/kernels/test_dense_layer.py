"""The kernel that takes a token through whole layers, run on the emulator, against XLA's composition."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.kernels.cuda import call, timeline
from jaxllm.kernels.dense_layer import cuda, reference

HOW = {"scale": 0.1, "eps": 1e-6}


@pytest.fixture
def emulated(emulated, monkeypatch):
    """Launches of few blocks."""
    monkeypatch.setattr(call, "SMS", 5)
    monkeypatch.setattr(cuda, "WARPS", 2)
    return emulated


CASES = [
    # D, heads, KV heads, H, F, tokens, page, layers, norms and biases, what is told of the ring
    (256, 4, 2, 128, 256, 40, 16, 2, True, {"slots": 3, "depth": 2, "alone": 1}),
    pytest.param((1280, 4, 1, 128, 256, 21, 32, 1, False, {"slots": 5, "depth": 2}), marks=pytest.mark.slow),
    pytest.param((256, 2, 2, 128, 2304, 0, 16, 1, True, {"slots": 6, "depth": 3}), marks=pytest.mark.slow),
    pytest.param(
        (512, 8, 2, 128, 1024, 300, 32, 3, False, {"slots": 4, "depth": 1, "alone": 1}),
        marks=pytest.mark.slow,
    ),
    pytest.param((512, 8, 2, 64, 256, 55, 16, 1, True, {"slots": 4, "alone": 1}), marks=pytest.mark.slow),
    pytest.param((1024, 8, 2, 128, 1024, 9, 16, 2, False, {"slots": 4}), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layers_equal_xla(case, seed: int, emulated) -> None:
    """Contexts of one block and of several, widths of no whole stages, a page's last places, and no token."""
    D, N, K, H, F, tokens, page, layers, more, ring = case
    operands = reference.random_operands(
        D, (N, K), F, tokens, layers=layers, H=H, page=page, norms=more, bias=more, seed=seed
    )
    emulated.seed = seed
    pools = [layer.kv_PYKOH for layer in operands.layers]
    if tokens:  # what is where the last token goes, and what follows it, may be anything
        pools = [kv.at[operands.page[0], :, :, (tokens - 1) % page :].set(jnp.nan) for kv in pools]
    given = [layer._replace(kv_PYKOH=kv) for layer, kv in zip(operands.layers, pools, strict=True)]
    given = operands._replace(layers=tuple(given))
    out, found = cuda.implementation(given, activation="silu", **HOW, **ring)(given)
    wanted, wanted_pools = reference.plain(operands, activation="silu", **HOW)
    out, wanted, start = (np.asarray(a, np.float32) for a in (out, wanted, operands.x))
    if tokens:
        assert np.linalg.norm(out - wanted) < 8e-3 * np.linalg.norm(wanted - start)
    assert np.isfinite(out).all()
    for before, pool, wanted_pool in zip(pools, found, wanted_pools, strict=True):
        there = np.isfinite(np.asarray(before, np.float32))
        there[int(operands.page[0]), :, :, int(operands.slot[0])] = True
        there[0] = False  # page 0 is nobody's
        a, b = (np.asarray(x, np.float32)[there] for x in (pool, wanted_pool))
        assert np.abs(a - b).max() <= 0.02 * np.abs(b).max()


@pytest.mark.slow
def test_the_timeline_of_a_layer(emulated) -> None:
    """Every warp's marks follow one another, and nothing else changes."""
    operands = reference.random_operands(256, (2, 1), 256, 20, page=16)
    how = {"activation": "silu", "slots": 3, **HOW}
    out, _, times = cuda.launcher(operands, timeline=True, **how)(operands)
    assert np.array_equal(out, cuda.implementation(operands, **how)(operands)[0])
    marks = np.asarray(times)[:, :, : len(cuda.PHASES) + 1].astype(np.int64)
    assert (np.diff(marks) > 0).all()
    found = timeline.phases(np.asarray(times)[None], cuda.PHASES)
    assert list(found) == [*cuda.PHASES, "begins late", "all"]
    assert all(0 <= low <= middle <= high for low, middle, high in found.values())


def test_what_the_kernel_cannot_do() -> None:
    operands = jax.eval_shape(lambda: reference.random_operands(256, (4, 2), 256, 20))
    layer = operands.layers[0]

    def like(*shape: int, dtype: jnp.dtype = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    others = [
        layer._replace(gate_up=like(512, 256, dtype=jnp.float32)),
        layer._replace(down=like(256, 320)),
        layer._replace(kv_PYKOH=like(3, 2, 2, 8, 128)),
        layer._replace(kv_PYKOH=like(3, 2, 2, 16, 128, dtype=jnp.float8_e4m3fn)),
        layer._replace(q_norm=like(128, dtype=jnp.float32)),
    ]
    refused = [operands._replace(layers=(other,)) for other in others]
    refused.append(operands._replace(x=like(2, 256)))
    refused.append(operands._replace(layers=(layer, layer._replace(bias=like(1024)))))
    for other in refused:
        with pytest.raises(NotImplementedError):
            cuda.implementation(other, activation="silu", **HOW)
    with pytest.raises(NotImplementedError, match="gelu"):
        cuda.implementation(operands, activation="gelu", **HOW)


def test_where_it_is_used_unasked(monkeypatch) -> None:
    """For large layers and short contexts; and wherever it can be when it is asked for."""
    monkeypatch.setattr(cuda, "require", lambda: None)
    monkeypatch.setattr(cuda, "implementation", lambda operands, **how: "kernel")

    def choose(D: int, F: int, tokens: int) -> str:
        operands = jax.eval_shape(lambda: reference.random_operands(D, (32, 8), F, tokens))
        return str(cuda.choose(operands, activation="silu", scale=0.1, eps=1e-5))

    assert choose(4096, 14336, 2304) == "kernel"
    for sizes in ((4096, 14336, 9000), (2048, 8192, 2304)):
        monkeypatch.delenv("JAXLLM_CUDA", raising=False)
        with pytest.raises(NotImplementedError):
            choose(*sizes)
        monkeypatch.setenv("JAXLLM_CUDA", "+dense_layer")
        assert choose(*sizes) == "kernel"


MODEL = Path(__file__).parents[1] / "golden" / "llama_gqa_tied"


def test_steps_of_one_token_ask_for_it(monkeypatch) -> None:
    """With all layers; and what stands for it elsewhere gives the tokens that the layers give one by one."""
    asked = []

    def choose(operands, *, activation, scale, eps):
        asked.append((operands.x.shape, len(operands.layers)))
        # Traced, and not run on a CPU.
        return lambda operands: (operands.x * jnp.nan, tuple(layer.kv_PYKOH for layer in operands.layers))

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
    assert asked and all(shape[0] == 1 and layers > 1 for shape, layers in asked)
