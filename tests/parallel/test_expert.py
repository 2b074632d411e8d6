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
from jaxllm.parallel.expert import METHODS, capacity, choose_method, experts
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
        return rows[:, D : D + X].astype(jnp.int32), rows[:, D + X :]

    def step(rows, gate_up, down):
        def compute(rows, chosen, weight):
            out = on_one_device(rows[:, :D], chosen, weight, gate_up, down, activation="silu", of=E)
            return jnp.pad(out, ((0, 0), (0, 2 * X)))

        tokens = axes if split else ()
        return experts(rows, route, compute, num_experts=E, axes=axes, tokens=tokens, method=method)[:, :D]

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
        (8, 2, 8, True, "replicate"),
        (8, 8, 1024, True, "replicate"),  # two thirds of the ranks get every token
        (32, 8, 1024, True, "all_to_all"),
    ],
)
def test_choice(ep: int, chosen: int, tokens: int, split: bool, wanted: str) -> None:
    assert choose_method(ep, chosen, tokens, split) == wanted


def test_one_rank_has_no_collectives() -> None:
    mesh = make_mesh(Mapping())
    step = partial(
        experts,
        route=lambda x: (jnp.zeros((len(x), 1), jnp.int32), jnp.ones((len(x), 1))),
        compute=lambda x, chosen, weight: x,
        num_experts=1,
        axes=("ep", "tp"),
        tokens=(),
        method="all_to_all",
    )
    run = jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    text = jax.jit(run).lower(jnp.ones((4, 4))).as_text()
    assert "all_to_all" not in text and "all_reduce" not in text
