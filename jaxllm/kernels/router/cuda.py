"""Norm, router and choice of experts for few tokens on a Hopper GPU, by `cuda/moe_router.cu`.

XLA makes two kernels of the norm, one or two of the product and two for each of the chosen experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.kernels.cuda import call
from jaxllm.kernels.linear.reference import rms_norm

KERNEL, CHOOSE = "moe_router", "moe_choose"
MAX_TOKENS = 256
"""The weight is read once for every 8."""
MAX_CLUSTER = 8

Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array, jax.Array]]
"""(x [T, D], norm [D], weight [E, D], bias [E]) -> x normed, the experts int32 [T, X], their weights float32 [T, X]."""


ByLogits = Callable[[jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]]
"""(float32 products [T, E], bias [E]) -> the experts int32 [T, X], their weights float32 [T, X]."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How experts are chosen: as `layers.moe.Router` has it, without groups."""

    chosen: int
    eps: float = 0.0
    normalise: bool = True
    sigmoid: bool = False
    scale: float = 1.0

    def macros(self, experts: int, bias: bool) -> dict[str, object]:
        """Of `cuda/choice.cuh`. Raises NotImplementedError for what it cannot do."""
        if min(32, experts) < self.chosen or experts > 1024:
            raise NotImplementedError(f"{self.chosen} of {experts} experts")
        scale = f"{float(self.scale)!r}f"
        sizes = {"EXPERTS": experts, "CHOSEN": self.chosen, "BIAS": int(bias), "SCALE": scale}
        return {**sizes, "SIGMOID": int(self.sigmoid), "NORMALISE": int(self.normalise)}


def choose(x_TD: jax.Array, weight_ED: jax.Array, choice: Choice, *, bias: bool) -> Kernel:
    """The kernel, compiled. Raises NotImplementedError where XLA must do the work."""
    call.require(KERNEL)
    if x_TD.shape[0] > MAX_TOKENS:
        raise NotImplementedError("many tokens")
    return implementation(x_TD, weight_ED, choice, bias=bias)


def implementation(
    x_TD: jax.Array | jax.ShapeDtypeStruct,
    weight_ED: jax.Array | jax.ShapeDtypeStruct,
    choice: Choice,
    *,
    bias: bool,
) -> Kernel:
    """The kernel for these shapes in a program for an H100 or H200; bias: whether there is one, or None is given.

    Raises NotImplementedError where there is none.
    """
    (T, D), E, X = x_TD.shape, weight_ED.shape[0], choice.chosen
    if x_TD.dtype != jnp.bfloat16 or weight_ED.dtype != jnp.bfloat16:
        raise NotImplementedError(f"{weight_ED.dtype} weights and {x_TD.dtype} activations")
    if D % 32 or D > 4096:
        raise NotImplementedError(f"{D} inputs")
    tiles = -(-E // 16)
    cluster = max(c for c in (1, 2, 4, MAX_CLUSTER) if c <= tiles)
    ms, warps = -(-tiles // cluster), 8 if D <= 2048 else 16
    per_warp = -(-D // (32 * warps))
    # Registers: threads of 16 warps have 128, of which the tokens of all loads take 4 each.
    most = max(1, ((96 if warps == 8 else 72) - 4 * per_warp) // (8 * ms))
    depth = max(d for d in range(1, min(most, per_warp) + 1) if per_warp % d == 0)
    macros = choice.macros(E, bias) | {
        "TOKENS": T, "INPUTS": D, "EPS": f"{choice.eps!r}f",
        "CLUSTER": cluster, "MS": ms, "WARPS": warps, "DEPTH": depth,
    }  # fmt: skip
    ptx = call.compile_or_refuse(KERNEL, KERNEL, macros)
    shared = warps * 8 * (ms * 16 + 4) * 4 + warps * 8 * 4 + 8 * ms * 16 * 4
    results = [((T, D), jnp.bfloat16), ((T, X), jnp.int32), ((T, X), jnp.float32)]

    def run(
        x_TD: jax.Array, norm_D: jax.Array, weight_ED: jax.Array, bias_E: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        y, chosen, weights = call.launch(
            KERNEL,
            ptx,
            [x_TD, norm_D, weight_ED, norm_D if bias_E is None else bias_E],
            [jax.ShapeDtypeStruct(*result) for result in results],
            grid=(cluster * -(-T // 8),),
            threads=warps * 32,
            shared=shared,
        )
        return y, chosen, weights

    return run


def choose_by_logits(logits_TE: jax.Array | jax.ShapeDtypeStruct, choice: Choice, *, bias: bool) -> ByLogits:
    """The kernel that only chooses, compiled. Raises NotImplementedError where XLA must do the work."""
    call.require(KERNEL)
    T, E = logits_TE.shape
    if logits_TE.dtype != jnp.float32 or not T:
        raise NotImplementedError(f"{logits_TE.dtype} logits of {T} tokens")
    ptx = call.compile_or_refuse(KERNEL, CHOOSE, {"TOKENS": T, **choice.macros(E, bias)})
    results = [jax.ShapeDtypeStruct((T, choice.chosen), dtype) for dtype in (jnp.int32, jnp.float32)]

    def run(logits_TE: jax.Array, bias_E: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        arguments = [logits_TE, logits_TE if bias_E is None else bias_E]
        chosen, weights = call.launch(CHOOSE, ptx, arguments, results, grid=(-(-T // 8),), threads=256)
        return chosen, weights

    return run


def check() -> None:
    """Raises ArithmeticError if the kernel is wrong on a small input; to be run on a GPU."""
    rng = np.random.default_rng(0)
    for T, E, D, choice in (
        (1, 128, 2048, Choice(8, 1e-6)),
        (11, 40, 512, Choice(4, 1e-5, normalise=False, sigmoid=True, scale=2.5)),
    ):
        x, weight = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((T, D), (E, D)))
        norm, bias = (jnp.asarray(rng.uniform(0.5, 1.5, n) / D**0.5, jnp.float32) for n in (D, E))
        run = implementation(x, weight, choice, bias=choice.sigmoid)
        y, chosen, weights = jax.jit(run)(x, norm, weight, bias if choice.sigmoid else None)
        by_logits = choose_by_logits(jax.ShapeDtypeStruct((T, E), jnp.float32), choice, bias=choice.sigmoid)
        logits_TE = jnp.dot(y.astype(jnp.float32), weight.astype(jnp.float32).T, precision="highest")
        again = jax.jit(by_logits)(logits_TE, bias if choice.sigmoid else None)
        if not (again[0] == chosen).mean() > 0.9:  # but for ties that are rounded in another way
            raise ArithmeticError(f"{CHOOSE} and {KERNEL} choose different experts at T={T} E={E}")
        wanted = np.asarray(rms_norm(x, (norm, choice.eps)), np.float32)
        if not np.abs(np.asarray(y, np.float32) - wanted).max() < 0.01 * np.abs(wanted).max():
            raise ArithmeticError(f"the norm is wrong at T={T} D={D}")
        logits = np.asarray(y, np.float64) @ np.asarray(weight, np.float64).T
        score = 1 / (1 + np.exp(-logits)) if choice.sigmoid else np.exp(logits)
        score = score if choice.sigmoid else score / score.sum(1, keepdims=True)
        found = np.take_along_axis(score, np.asarray(chosen), 1)
        sums = found.sum(1, keepdims=True) if choice.normalise else 1
        error = np.abs(found / sums * choice.scale - np.asarray(weights)).max()
        ranked = score + np.asarray(bias) if choice.sigmoid else score
        # Of the experts that were not chosen none is better than the worst of those that were.
        worst = np.take_along_axis(ranked, np.asarray(chosen), 1).min(1)
        np.put_along_axis(ranked, np.asarray(chosen), -np.inf, 1)
        if not (error < 1e-4 and (ranked.max(1) < worst + 1e-5).all()):
            raise ArithmeticError(f"the choice is wrong by {error:.1e} at T={T} E={E} D={D}")
