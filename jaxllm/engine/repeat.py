"""Several decode steps in one dispatch: the step of a bucket inside a loop on the device, each fed by the one before.

The host hears of all of them at once. What it costs on a host to launch a step is then paid once in so many, and the
device has no gap between them; vLLM called it multi-step scheduling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.engine.batch import BatchShape

Sample = Callable[..., tuple[Any, jax.Array, Any]]


def repeated(
    forward: Callable[..., tuple], shape: BatchShape, steps: int, sampler: Sample | None = None
) -> Callable[..., tuple]:
    """`steps` steps of a bucket of decodes alone, as a function of (weights, kv, last_token, packed).

    Where one step has the tokens of decodes, which nobody reads, the packed batch has the number of steps that each
    decode takes part in; afterwards its row is padding. Returns token_LR with L the steps, last_token, and the pages.

    Args:
      forward: see `StepFunctions.forward`.
      sampler: function of (logits_RV, last_token, None, batch) that chooses other tokens than the likeliest; then the
        result takes one more argument, the SamplingBatch, whose positions and slots are those of the packed batch.
    """
    T = shape.bucket.decodes

    def run(
        weights: list[jax.Array], kv: list[jax.Array], last_token: jax.Array, packed: jax.Array, *sampling: Any
    ) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
        counts, positions, slots = (packed[..., part * T : (part + 1) * T] for part in range(3))
        spare = last_token.shape[0] - 1

        def step(carry: tuple[list[jax.Array], jax.Array], number: jax.Array) -> tuple[Any, jax.Array]:
            kv, last_token = carry
            runs = (positions >= 0) & (number < counts)
            position = jnp.where(runs, positions + number, -1)
            slot = jnp.where(runs, slots, spare)
            here = jnp.concatenate([counts, position, slot, packed[..., 3 * T :]], axis=-1)
            token_R, logits_RV, _, last_token, kv = forward(weights, kv, last_token, here)
            if sampler is not None:
                (batch,) = sampling
                batch = batch.replace(position=position[:, 0].reshape(-1) + 1, slot=slot[:, 0].reshape(-1))
                output, last_token, _ = sampler(logits_RV, last_token, None, batch)
                token_R = output.token_R
            return (kv, last_token), token_R

        (kv, last_token), token_LR = jax.lax.scan(step, (kv, last_token), jnp.arange(steps))
        return token_LR, last_token, kv

    return run
