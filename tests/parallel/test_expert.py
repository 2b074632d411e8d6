"""Expert parallelism: every method on every mesh is the experts of one device."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxllm.kernels.grouped_matmul.reference import experts as on_one_device
from jaxllm.mapping import Mapping
from jaxllm.parallel.expert import METHODS, Dispatch, capacity, experts
from jaxllm.parallel.mesh import make_mesh

E, X, D, F = 8, 3, 16, 12
MESHES = [(8, 1), (2, 4)]
KINDS = ("even", "one", "last")


def weights(tp: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gate, up and down; with F cut in tp parts, each with its rows of gate and then of up."""
    rng = np.random.default_rng(0)
    gate, up = rng.standard_normal((2, E, F, D), np.float32) / 4
    parts = [np.concatenate(pair, 1) for pair in zip(np.split(gate, tp, 1), np.split(up, tp, 1), strict=True)]
    return rng.standard_normal((E, D, F), np.float32) / 4, np.concatenate(parts, 1), np.concatenate([gate, up], 1)


def routes(kind: str, T: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    if kind == "even":
        chosen = np.stack([rng.permutation(E)[:X] for _ in range(T)])
    else:  # every token wants the last experts; one of each rank, or all of one rank
        chosen = np.tile([E - 1, 0, 3] if kind == "one" else [E - 1, E - 2, E - 3], (T, 1))
    return chosen.astype(np.int32), rng.random((T, X), np.float32)


@pytest.mark.parametrize("split", [False, True], ids=["same tokens", "split tokens"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, mesh: tuple[int, int], split: bool) -> None:
    ep, tp = mesh
    axes = ("ep", "tp")
    T = 24 * ep * tp if split else 37
    x = np.random.default_rng(2).standard_normal((T, D), np.float32)
    down, gate_up, unsplit = weights(tp)

    def route(rows):  # a token says where it wants to go
        return rows[:, D : D + X].astype(jnp.int32), rows[:, D + X :], None

    def step(rows, gate_up, down):
        def compute(rows, chosen, weight):
            out = on_one_device(rows[:, :D], chosen, weight, gate_up, down, activation="silu", of=E)
            return jnp.pad(out, ((0, 0), (0, 2 * X)))

        # on one of the meshes in turns: 64 tokens of all ranks, which does not divide them
        turns = {"max_tokens": 64 if split else 15} if ep == 2 else {}
        tokens = axes if split else ()
        return experts(rows, route, compute, num_experts=E, axes=axes, tokens=tokens, method=method, **turns)[0][:, :D]

    rows = P(axes) if split else P()
    run = jax.shard_map(
        step,
        mesh=make_mesh(Mapping(ep=ep, tp=tp)),
        in_specs=(rows, P("ep", "tp"), P("ep", None, "tp")),
        out_specs=rows,
        check_vma=False,
    )
    run = jax.jit(run)
    for kind in KINDS:
        chosen, weight = routes(kind, T)
        found = run(np.concatenate([x, chosen, weight], axis=1), gate_up, down)
        wanted = on_one_device(*map(jnp.asarray, (x, chosen, weight, unsplit, down)), activation="silu", of=E)
        np.testing.assert_allclose(found, wanted, atol=1e-5, err_msg=kind)


def test_messages_overflow_in_the_test_above() -> None:
    """All tokens of a rank want one other, whose message has room for fewer."""
    assert capacity(24, X, 8) < 24 and capacity(24 * 2, X, 4) < 24 * 2
    assert capacity(5, X, 8) == 5  # no more than there are


@pytest.mark.parametrize(
    ("ep", "chosen", "tokens", "split", "wanted"),
    [
        (8, 2, 1024, True, "all_to_all"),
        (8, 2, 1024, False, "replicate"),  # nothing to bring anywhere
        (8, 2, 8, True, "replicate"),  # 1.4 us of bytes saved, 28 us of messages more
        (8, 8, 256, True, "replicate"),  # two thirds of the ranks get every token
        (8, 8, 2048, True, "all_to_all"),
        (8, 16, 4096, True, "replicate"),  # messages with room to spare are larger than what they save
        (32, 8, 1024, True, "all_to_all"),
        (1, 8, 1024, True, "replicate"),
    ],
)
def test_choice(ep: int, chosen: int, tokens: int, split: bool, wanted: str) -> None:
    assert Dispatch().choose(ep, chosen, tokens, 2 * 4096, split) == wanted


def test_a_choice_that_is_made_already() -> None:
    assert Dispatch("ragged").choose(8, 2, 1, 8192, False) == "ragged"
    at = Dispatch(exchange_from=9)
    assert [at.choose(8, 2, n, 8192, True) for n in (8, 9)] == ["replicate", "all_to_all"]
    assert at.choose(8, 2, 9, 8192, False) == "replicate"


def test_experts_and_weights_travel_bit_by_bit() -> None:
    """In bfloat16, where a message carries integers and float32 as pairs of numbers."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2 * 8, D)).astype(jnp.bfloat16)
    chosen, weight = routes("even", len(x))
    index = {row.tobytes(): i for i, row in enumerate(np.asarray(x))}
    table = jnp.asarray(np.stack([row for row in x]))

    def route(rows):
        token = (rows[:, None, :] == table[None]).all(axis=2).argmax(axis=1)
        return jnp.asarray(chosen)[token], jnp.asarray(weight)[token], None

    def compute(rows, chosen, weight):  # a token that comes to a rank gets the sum of its weights there
        return jnp.where(chosen >= 0, weight, 0).sum(axis=1, keepdims=True) * rows.astype(jnp.float32)

    assert len(index) == len(x)
    step = partial(experts, route=route, compute=compute, num_experts=E, axes=("ep",), tokens=("ep",), method="ragged")
    rows = P("ep")
    run = jax.shard_map(step, mesh=make_mesh(Mapping(ep=8)), in_specs=rows, out_specs=(rows, None), check_vma=False)
    wanted = weight.sum(axis=1, keepdims=True) * x.astype(np.float32)
    found, _ = jax.jit(run)(x)
    np.testing.assert_allclose(found.astype(np.float32), wanted, rtol=0.02, atol=0.02)


def test_one_rank_has_no_collectives() -> None:
    mesh = make_mesh(Mapping())
    step = partial(
        experts,
        route=lambda x: (jnp.zeros((len(x), 1), jnp.int32), jnp.ones((len(x), 1)), None),
        compute=lambda x, chosen, weight: x,
        num_experts=1,
        axes=("ep", "tp"),
        tokens=(),
        method="all_to_all",
    )
    run = jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    text = jax.jit(run).lower(jnp.ones((4, 4))).as_text()
    assert "all_to_all" not in text and "all_reduce" not in text
