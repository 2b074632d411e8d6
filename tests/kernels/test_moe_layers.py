"""The kernel that takes a token through layers with experts, run on the emulator, against XLA's composition."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.kernels.cuda import call, timeline
from jaxllm.kernels.moe_token import cuda, reference
from jaxllm.kernels.router.cuda import Choice


@pytest.fixture
def emulated(emulated, monkeypatch):
    """Launches of few blocks."""
    monkeypatch.setattr(call, "SMS", 5)
    monkeypatch.setattr(cuda, "WARPS", 2)
    return emulated


CASES = [
    # heads, KV heads, tokens, page, norms, units for each warp that one block has, layers, of a launch
    (8, 2, 70, 16, True, 4, 2, 2),
    pytest.param((4, 1, 21, 32, False, 4, 2, 2), marks=pytest.mark.slow),
    pytest.param((2, 2, 0, 16, True, 4, 1, 1), marks=pytest.mark.slow),
    pytest.param((8, 2, 130, 16, True, 1, 2, 2), marks=pytest.mark.slow),
    pytest.param((8, 2, 150, 16, True, 1, 2, 2), marks=pytest.mark.slow),
    pytest.param((8, 1, 300, 32, True, 1, 5, 3), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layers_equal_xla(case, seed: int, emulated, monkeypatch) -> None:
    """Contexts of one block and of several, a token in a page's last places, and no token."""
    N, K, tokens, page, norms, alone, layers, most = case
    choice, E, how = Choice(2, 1e-6), 4, {"activation": "silu", "scale": 0.1}
    how |= {"slots": 4, "macros": {"IDLE": K if norms else 0}}  # room for two units of a warp
    if alone == 4 and norms:  # rings that have room for more than a warp's share of the way down
        monkeypatch.setattr(call, "SMS", 11)
        monkeypatch.setattr(cuda, "WARPS", 4)
        how |= {"slots": 6}
    if not norms:
        choice, E = Choice(3, 1e-6, sigmoid=True, scale=2.5), 75  # more than there are threads
    if not tokens:
        choice = Choice(3, 1e-6, normalise=False)
    operands = reference.random_operands(
        256, (N, K), E, 256, tokens, layers=layers, page=page, norms=norms, bias=not norms, seed=seed
    )
    emulated.seed = seed
    token, before = operands
    if tokens:  # what is where the last token goes, and what follows it, may be anything
        at = np.s_[token.page[0], :, :, (tokens - 1) % page :]
        before = tuple(layer._replace(kv_PYKOH=layer.kv_PYKOH.at[at].set(jnp.nan)) for layer in before)
    given = reference.Operands(token, before)
    out, pools = cuda.implementation(given, choice, alone=alone, most=most, **how)(given)
    assert np.isfinite(np.asarray(out, np.float32)).all()
    assert len(pools) == layers
    # The same layer by layer; and the first of them, whose stream has not grown, against what is exact.
    for layer, empty, pool in zip(operands.layers, before, pools, strict=True):
        given = reference.Operands(token, (empty,))
        x, (alone_pool,) = cuda.implementation(given, choice, alone=alone, **how)(given)
        wanted, (wanted_pool,) = reference.exact(
            reference.Operands(token, (layer,)), choice, activation="silu", scale=0.1
        )
        assert np.array_equal(np.asarray(pool), np.asarray(alone_pool), equal_nan=True)
        a, b, start = (np.asarray(array, np.float32) for array in (x, wanted, token.x))
        if tokens and layer is operands.layers[0]:
            assert np.linalg.norm(a - b) < 6e-3 * np.linalg.norm(b - start)
        there = np.isfinite(np.asarray(empty.kv_PYKOH, np.float32))
        there[int(token.page[0]), :, :, int(token.slot[0])] = True
        there[0] = False  # page 0 is nobody's
        a, b = (np.asarray(array, np.float32)[there] for array in (pool, wanted_pool))
        assert np.abs(a - b).max() <= 0.01 * np.abs(b).max()
        token = token._replace(x=jnp.asarray(x))
    assert np.array_equal(np.asarray(out), np.asarray(token.x))


@pytest.mark.parametrize("attended", [1, 8])
@pytest.mark.parametrize(
    "macros",
    [
        {"PACE": 2, "GUESS": 3},
        {"GUESS": 2, "LITTLE": 1},
    ],
    ids=lambda macros: ",".join(macros),
)
def test_what_changes_no_result(macros: dict[str, int], attended: int, emulated, monkeypatch) -> None:
    """How weights come, who multiplies, and which experts are predicted, but for the order of sums.

    attended: how much attention has to say; with much, other experts than those that were predicted.
    """
    monkeypatch.setattr(call, "SMS", 11)
    monkeypatch.setattr(cuda, "WARPS", 4)
    choice = Choice(3, 1e-6)
    how: dict = {"activation": "silu", "scale": 0.1, "slots": 4}
    token, layers = reference.random_operands(256, (8, 2), 8, 256, 70, layers=2)
    operands = reference.Operands(token, tuple(layer._replace(output=attended * layer.output) for layer in layers))
    plain, other = (
        cuda.implementation(operands, choice, macros={"IDLE": 2, **more}, **how)(operands)
        for more in ({"GUESS": 0}, macros)
    )
    for a, b in zip(*map(jax.tree.leaves, (plain, other)), strict=True):
        a, b = (np.asarray(array, np.float32) for array in (a, b))
        assert np.abs(a - b).max() <= 0.01 * np.abs(b).max()


@pytest.mark.slow
def test_rows_that_come_one_by_one(emulated, monkeypatch) -> None:
    """512 pairs of rows for queries, keys and values, and 6 warps: the last rounds' rows are one for each warp."""
    monkeypatch.setattr(call, "SMS", 3)
    choice, how = Choice(2, 1e-6), {"activation": "silu", "scale": 0.1}
    operands = reference.random_operands(2048, (6, 1), 4, 256, 21, layers=2)
    assert 0 < operands.layers[0].qkv.shape[0] % 12 <= 6
    found = cuda.implementation(operands, choice, slots=3, **how)(operands)
    assert reference.difference(operands, found, choice, 0.1) < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(("idle", "tokens"), [(2, 20), (0, 129)])
def test_more_warps_than_items(idle: int, tokens: int, emulated, monkeypatch) -> None:
    """Some have nothing of a product, and rings have room for all that a warp has of another."""
    monkeypatch.setattr(call, "SMS", 19)
    monkeypatch.setattr(cuda, "WARPS", 8)
    choice, how = Choice(2, 1e-6), {"activation": "silu", "scale": 0.1}
    operands = reference.random_operands(256, (8, 2), 16, 256, tokens, layers=2)
    found = cuda.implementation(operands, choice, **how, macros={"IDLE": idle})(operands)
    assert reference.difference(operands, found, choice, 0.1) < 1.2e-2  # of two layers


def test_the_timeline_of_layers(emulated, monkeypatch) -> None:
    """Every warp's marks follow one another, and nothing else changes."""
    monkeypatch.setattr(call, "SMS", 3)
    choice, how = Choice(5, 1e-6), {"activation": "silu", "scale": 0.1, "slots": 3}
    operands = reference.random_operands(256, (2, 1), 6, 256, 20, layers=2, page=16)
    out, pools, times = cuda.launcher(operands, choice, timeline=True, **how)(operands)
    assert reference.difference(operands, (out, pools), choice, 0.1) < 1.2e-2  # of two layers
    assert np.array_equal(out, cuda.implementation(operands, choice, **how)(operands)[0])
    marks = np.asarray(times)[:, :, :, : len(cuda.PHASES) + 1].astype(np.int64)
    assert (np.diff(marks) > 0).all()
    found = timeline.phases(np.asarray(times), cuda.PHASES)
    assert list(found) == [*cuda.PHASES, "begins late", "all"]
    assert all(0 <= low <= middle <= high for low, middle, high in found.values())
    whole = times[:, :, :, -1].max((1, 2)) - times[:, :, :, -2].min((1, 2))
    assert found["all"][1] == pytest.approx(1e-3 * float(np.median(whole)))
    of_groups = timeline.ends(np.asarray(times), cuda.PHASES, 1)
    assert all(low <= middle <= high for groups in of_groups.values() for low, middle, high in groups)
    latest = [[group[2] for group in groups] for groups in of_groups.values()]
    assert (np.diff(latest, axis=0) > 0).all(), latest


def test_what_the_kernel_cannot_do() -> None:
    def of(T=1, D=256, F=256, dtype=jnp.bfloat16, heads=(2, 1), page=16):
        found = jax.eval_shape(lambda: reference.random_operands(D, heads, 8, F, 20, page=page, layers=2))
        token, layers = jax.tree.map(lambda a: a.update(dtype=dtype) if a.dtype == jnp.bfloat16 else a, found)
        return reference.Operands(token._replace(x=jax.ShapeDtypeStruct((T, D), dtype)), layers)

    for operands in (of(T=2), of(D=128), of(F=320), of(page=8), of(dtype=jnp.float32), of(F=256 * 200)):
        with pytest.raises(NotImplementedError):
            cuda.implementation(operands, Choice(2, 1e-5), activation="silu", scale=1.0)
    with pytest.raises(NotImplementedError):
        cuda.implementation(of(), Choice(2, 1e-5), activation="gelu", scale=1.0)
    token, layers = of()
    mixed = reference.Operands(token, (layers[0], of(F=512).layers[0]))
    with pytest.raises(NotImplementedError):
        cuda.implementation(mixed, Choice(2, 1e-5), activation="silu", scale=1.0)


MODEL = Path(__file__).parents[1] / "golden" / "mixtral"


def test_steps_of_one_token_ask_for_it(monkeypatch) -> None:
    """And what stands for it elsewhere gives the tokens that the layers' parts give."""
    asked = []

    def choose(operands, choice, *, activation, scale):
        asked.append(len(operands.layers))
        pools = [layer.kv_PYKOH for layer in operands.layers]
        return lambda operands: (operands.token.x * jnp.nan, pools)  # traced, and not run on a CPU

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
    assert asked and min(asked) > 1
