"""Gated MLPs of many experts, each on its own tokens: on each platform the first implementation that can do the job."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import jax
from jax import lax

from jaxllm.kernels.grouped_matmul import cuda, reference, ring_cuda, tiles_cuda
from jaxllm.kernels.linear.quantized import Weight

PLATFORMS: dict[str, tuple[ModuleType, ...]] = {"cuda": (tiles_cuda, ring_cuda, cuda)}
"""Modules in the order in which their `choose(x, chosen, gate_up, down, *, activation, of)` is asked for a function of
(x, chosen, weights, gate_up, down), until one does not raise NotImplementedError. Where all do, and on platforms that
are not here, the reference does the work."""


def experts(
    x_TD: jax.Array,
    chosen_TX: jax.Array,
    weights_TX: jax.Array,
    gate_up_EFD: Weight,
    down_EDF: Weight,
    *,
    activation: str,
    of: int,
    biases: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """The weighted sum of each token's experts, as far as they are here: float32 [T, D].

    An expert is down(act(gate(x)) * up(x)). No token is left out, however uneven the choice: one expert may get all.

    Args:
      x_TD: tokens, any float dtype.
      chosen_TX: int32, a token's experts, each once; those outside of [0, E) are somebody else's, and add nothing.
      weights_TX: float32, what their results are multiplied with.
      gate_up_EFD: [E, 2 * F, D], the rows of gate, then those of up; may be quantised, as down_EDF.
      down_EDF: [E, D, F].
      activation: as `kernels.linear.reference.gated` knows them.
      of: experts that the X are chosen from, E or more: how many tokens an expert can expect.
      biases: [E, 2 * F] and [E, D], added to the two products.
    """
    branches: dict[str, Callable[..., jax.Array]] = {}
    # No kernel has biases.
    for platform, modules in PLATFORMS.items() if biases is None else ():
        for module in modules:
            try:
                branches[platform] = module.choose(x_TD, chosen_TX, gate_up_EFD, down_EDF, activation=activation, of=of)
                break
            except NotImplementedError:
                continue
    default = partial(reference.experts, activation=activation, of=of)
    arguments = (x_TD, chosen_TX, weights_TX, gate_up_EFD, down_EDF)
    if biases is not None:
        return default(*arguments, biases=biases)
    # The program may be lowered for a GPU in a process whose default backend is a CPU (ahead-of-time compilation): what
    # it is lowered for decides.
    return lax.platform_dependent(*arguments, **branches, default=default) if branches else default(*arguments)
