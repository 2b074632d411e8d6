"""What implementations of paged attention have in common."""

from __future__ import annotations

from collections.abc import Callable

import jax

Implementation = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, "jax.Array | None"], tuple[jax.Array, jax.Array]]
"""(q_RQNH, kv_PYKOH, pages_RW, positions_RQ, first_RQ or None) -> (out_RQNH, lse_RQN), as `api.paged_attention`."""
