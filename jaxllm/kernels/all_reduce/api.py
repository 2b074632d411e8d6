"""Sums over GPUs of one host that one process drives: small ones in one trip over NVLink.

`Group.open` gets memory on every GPU of a mesh that the others can write to. The programs take where it is as an
argument, sharded over the mesh: they can be kept on disk. Sums through it must depend on one another, as those of a
residual stream do: that puts them in the same order on every GPU.

GPUs of several processes would have to exchange handles of their memory first. They do not yet, and neither do GPUs
without access to each other's memory, nor CPUs: there `Group.open` is None, and XLA's collectives do the work.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.kernels.all_reduce import cuda, driver
from jaxllm.kernels.cuda import call
from jaxllm.kernels.linear.product import Product, QuantizedTokens
from jaxllm.kernels.linear.reference import rms_norm

logger = logging.getLogger(__name__)

Axes = tuple[str, ...]

all_reduce = cuda.run
"""The residual plus the sum of every rank's x, and what a norm makes of that sum; inside shard_map.

(x, residual or None, group, ranks, (weight, epsilon) or None) -> (like x, like x or None). x may be a `Product`; with
`quantised` what the norm makes is `QuantizedTokens`. group is this rank's part of `Group.array`. The parts are added in
float32 in the order of the ranks and rounded once, to the same bits on every rank. Raises NotImplementedError for a sum
that XLA does better, or at all.
"""
scatter_sum = cuda.scatter_sum
"""(x, residual or None, group, ranks) -> this rank's rows of such a sum; raises as `all_reduce`."""
quantises = cuda.quantises
"""(ranks) -> whether `all_reduce` had better have a `Product` as x, and be asked for `quantised` activations."""
gather = cuda.gather
"""(x, group, ranks) -> every rank's rows; raises as `all_reduce`."""


class PeerError(RuntimeError):
    """A GPU waited in vain for another one's part of a sum."""


class Group:
    """Memory for sums over `axes` of a mesh: one group of ranks for each place along the other axes.

    Attributes:
      axes: those with more than one rank.
      ranks: of each group.
      numbered: the packets of its sums.
      array: uint32 [devices, words], a row on each device; of a mesh that is only described, its shape.
    """

    def __init__(self, mesh: Mesh, axes: Axes, *, described: bool = False, numbered: bool = cuda.NUMBERED):
        self.mesh = mesh
        self.axes = axes
        self.ranks = math.prod(mesh.shape[axis] for axis in axes)
        self.spec = PartitionSpec(mesh.axis_names)
        self.numbered = numbered
        self._memory: driver.PeerMemory | None = None
        shape = (mesh.devices.size, cuda.group_words(self.ranks))
        sharding = NamedSharding(mesh, self.spec)
        self.array: jax.Array | jax.ShapeDtypeStruct = jax.ShapeDtypeStruct(shape, np.uint32, sharding=sharding)
        if described:
            return
        ordinals = np.vectorize(lambda device: device.local_hardware_id, otypes=[int])(mesh.devices)
        ones_from = None if numbered else cuda.counter_bytes(self.ranks)
        memory = driver.PeerMemory(ordinals.reshape(-1).tolist(), cuda.memory_bytes(self.ranks, numbered), ones_from)
        self._memory = memory
        words = np.empty((ordinals.size, self.ranks + 2), np.uint64)
        names = mesh.axis_names
        for number, place in enumerate(np.ndindex(ordinals.shape)):
            # The places of the group's ranks, numbered as `lax.axis_index` numbers them.
            own = tuple(slice(None) if name in axes else place[i] for i, name in enumerate(names))
            inside = [name for name in names if name in axes]
            members = np.transpose(ordinals[own], [inside.index(axis) for axis in axes]).reshape(-1)
            rank = int(np.flatnonzero(members == ordinals[place])[0])
            addresses = [memory.address(int(member)) for member in np.roll(members, -rank)]
            words[number] = [*addresses, rank, memory.word_address]
        self.array = jax.device_put(words.view(np.uint32), sharding)

    @classmethod
    def open(cls, mesh: Mesh, axes: Axes, *, numbered: bool = cuda.NUMBERED) -> Group | None:
        """The checked group for the axes that have more than one rank; None where there is none, or no use of it."""
        wide = tuple(axis for axis in axes if mesh.shape[axis] > 1)
        devices = list(mesh.devices.flat)
        if not wide or devices[0].platform == "cpu":
            return None
        described = devices[0] not in jax.devices()
        if not described and (jax.process_count() > 1 or devices[0].platform not in ("gpu", "cuda")):
            return None
        try:
            call.require(cuda.KERNEL)
            group = cls(mesh, wide, described=described, numbered=numbered)
        except NotImplementedError:
            return None
        except driver.DriverError as error:
            call.refuse(cuda.KERNEL, str(error))
            return None
        if described:
            return group
        try:
            group.check()
        except Exception as error:  # whatever a driver, a compiler or a wrong result makes of it
            call.refuse(cuda.KERNEL, f"its check failed: {str(error).strip() or type(error).__name__}")
            group.close()
            return None
        return group

    def check(self, repeats: int = 25) -> None:
        """Raises ArithmeticError if sums differ from XLA's: small and larger ones, in bfloat16 and float32."""

        def apart(group: jax.Array, number: jax.Array, rank: jax.Array | int) -> jax.Array:
            """Rows that are summed and scattered, and gathered again, where that is done here."""
            at = jnp.arange(16 * self.ranks * 4096, dtype=jnp.int32).reshape(16 * self.ranks, 4096)
            part = ((at * 5 + rank * 3 + number) % 15).astype(jnp.bfloat16)
            residual = ((at[:16] + rank + number) % 9).astype(jnp.bfloat16)
            wrong = jnp.int32(0)
            options: dict[str, Any] = {"numbered": self.numbered, "timeout_ms": 3000}
            try:
                found = scatter_sum(part, residual, group, self.ranks, **options)
                wanted = lax.psum_scatter(part.astype(jnp.float32), self.axes, tiled=True) + residual
                wrong = wrong + (found.astype(jnp.float32) != wanted).sum(dtype=jnp.int32)
                residual = found
            except NotImplementedError:
                pass
            try:
                rows = gather(residual + wrong.astype(jnp.bfloat16), group, self.ranks, **options)
                wrong = wrong + (rows != lax.all_gather(residual, self.axes, tiled=True)).sum(dtype=jnp.int32)
            except NotImplementedError:
                pass
            return wrong + in_e4m3(group, number + wrong, rank) if quantises(self.ranks) else wrong

        def in_e4m3(group: jax.Array, number: jax.Array, rank: jax.Array | int) -> jax.Array:
            """The sum of products that are not finished, and the norm of it in e4m3."""
            wrong = jnp.int32(0)
            for rows in (1, 64):
                at = jnp.arange(rows * 4096, dtype=jnp.int32).reshape(rows, 4096)
                product = Product(
                    ((at * 5 + rank * 3 + number + wrong) % 7).astype(jnp.bfloat16),
                    (1 + jnp.arange(rows) % 2).astype(jnp.float32)[:, None],
                    (1 + jnp.arange(4096) // 3 % 2).astype(jnp.float32),
                    jnp.dtype(jnp.bfloat16),
                )
                residual = ((at + number) % 9).astype(jnp.bfloat16)
                norm = (jnp.full(4096, 0.5, jnp.float32), 1e-5)
                options: dict[str, Any] = {"numbered": self.numbered, "timeout_ms": 3000}
                found, normed = all_reduce(product, residual, group, self.ranks, norm, quantised=True, **options)
                assert isinstance(normed, QuantizedTokens)
                wanted = lax.psum(product.finish().astype(jnp.float32), self.axes) + residual.astype(jnp.float32)
                wrong = wrong + (found.astype(jnp.float32) != wanted).sum(dtype=jnp.int32)
                normal = rms_norm(wanted, norm)
                error = jnp.abs(normed.values.astype(jnp.float32) * normed.scale - normal)
                wrong = wrong + (~(error < 0.07 * jnp.abs(normal) + 0.01)).sum(dtype=jnp.int32)
            return wrong

        def wrong(group: jax.Array) -> jax.Array:
            rank = lax.axis_index(self.mesh.axis_names)

            def repeat(number: jax.Array, wrong: jax.Array) -> jax.Array:
                for rows, dtype in ((1, jnp.float32), (64, jnp.bfloat16)):
                    # Integers that bfloat16 holds, and so do their sums: exact in whatever order. Each sum depends on
                    # the one before.
                    at = jnp.arange(rows * 4096, dtype=jnp.int32).reshape(rows, 4096)
                    part = ((at * 7 + rank * 5 + number + wrong) % 15).astype(dtype)
                    residual = ((at + number + wrong) % 9).astype(dtype)
                    norm = (jnp.full(4096, 0.5, jnp.float32), 1e-5) if dtype == jnp.bfloat16 else None
                    options: dict[str, Any] = {"numbered": self.numbered, "timeout_ms": 3000}
                    found, normed = all_reduce(part, residual, group, self.ranks, norm, **options)
                    wanted = lax.psum(part.astype(jnp.float32), self.axes) + residual.astype(jnp.float32)
                    wrong = wrong + (found.astype(jnp.float32) != wanted).sum(dtype=jnp.int32)
                    if norm is not None and isinstance(normed, jax.Array):
                        error = jnp.abs(normed.astype(jnp.float32) - rms_norm(wanted, norm))
                        wrong = wrong + (~(error < 0.02)).sum(dtype=jnp.int32)
                return wrong + apart(group, number + wrong, rank)

            return lax.fori_loop(0, repeats, repeat, jnp.int32(0))[None]

        spec = self.spec
        mapped = jax.shard_map(wrong, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False)
        found = np.asarray(jax.jit(mapped)(self.array))
        self.raise_if_failed()
        if found.any():
            raise ArithmeticError(f"{found.tolist()} wrong elements on the devices")

    def raise_if_failed(self) -> None:
        """Raises PeerError once a GPU has waited in vain; what was computed since is worthless."""
        word = 0 if self._memory is None else self._memory.word
        if word:
            raise PeerError(
                f"GPU {word - 1} of a group waited over {cuda.TIMEOUT_MS / 1000:.0f} s for another one's part of a sum;"
                " restart, and set JAXLLM_CUDA=-all_reduce to leave sums to NCCL"
            )

    def close(self) -> None:
        """Frees the memory; no program that uses it may be launched any more."""
        memory, self._memory = self._memory, None
        if memory is not None:
            try:
                memory.close()
            except driver.DriverError as error:  # whoever closes has no use for it: what failed before says more
                logger.warning("the memory that GPUs share was not freed: %s", error)
