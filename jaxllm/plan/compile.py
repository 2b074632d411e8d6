"""Compiles an engine's decode step for GPUs that are not there, and compares it with the plan.

XLA compiles for a described device: nothing is allocated and no driver is needed, only the CUDA plugin of the installed
jax (`pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt`, and ptxas from `nvidia-cuda-nvcc`). Sizes,
collectives, fusions and copies of the program are those of the real device; the choice of matrix kernels is not, for
nothing is timed.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jaxllm.settings import ConfigError

if TYPE_CHECKING:
    from jaxllm.engine.buckets import Bucket
    from jaxllm.plan.plan import Plan

TOLERANCE = 0.03
"""Share by which the arguments of a program may differ from the plan."""

CAPABILITIES = {"h200": "9.0"}
"""Compute capability of the GPUs of `targets`."""

# HLO's names of the collectives of a Collective's kind.
HLO_NAMES = {
    "all_reduce": "all-reduce",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ragged_all_to_all": "ragged-all-to-all",
    "permute": "collective-permute",
}


@dataclass(frozen=True, slots=True)
class CompiledStage:
    """One pipeline stage's program. Bytes are on each device.

    arguments: of the program; planned: what the plan says they are. scratch: beside arguments and results.
    collectives: by their HLO name.
    """

    seconds: float
    arguments: int
    planned: int
    scratch: int
    collectives: dict[str, int]

    @property
    def difference(self) -> float:
        """Of the plan, as a share."""
        return abs(self.arguments - self.planned) / self.arguments


def prepare() -> None:
    """Environment for compiling without a GPU; to be called before jax is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


def described_devices(gpu: str, count: int) -> Sequence[Any]:
    """`count` devices of a kind, as far as a compiler needs them.

    Raises:
        ConfigError: there is no description of this GPU, or no CUDA plugin.
    """
    from jax.experimental import topologies

    from jaxllm.kernels.cuda import call

    target = files("jaxllm.plan") / "targets" / f"{gpu}.txtpb"
    if not target.is_file():
        raise ConfigError(f"gpu {gpu!r} cannot be compiled for; use h200")
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name=f"{gpu}x{count}",
            topology=f"1x1x{count}",
            target_config=target.read_text(encoding="utf-8"),
        )
    except Exception as error:  # jax raises what the missing plugin happens to cause
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"cannot compile for {gpu} ({reason}); install the CUDA plugin of this jax: "
            "pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc"
        ) from None
    call.describe_target(CAPABILITIES.get(gpu))
    return topology.devices


def compile_step(plan: Plan, devices: Sequence[Any], bucket: Bucket | None = None) -> list[CompiledStage]:
    """Compiles a step of each pipeline stage; None: the largest of decodes alone.

    Raises:
        ConfigError: the engine does not run the model.
    """
    import jax
    import numpy as np
    from jax.sharding import NamedSharding

    from jaxllm.engine.batch import Packer
    from jaxllm.engine.forward import KV_AXES, StepFunctions
    from jaxllm.models.fit import place_experts
    from jaxllm.parallel.expert import Dispatch
    from jaxllm.parallel.layout import Layout
    from jaxllm.parallel.mesh import make_mesh, stage_mesh
    from jaxllm.plan.plan import DTYPES

    cfg = plan.model.config
    if cfg is None:
        raise ConfigError(f"cannot compile {plan.model.name}: its sizes alone are known")
    placed = place_experts(plan.config.moe_config.load_balancer, cfg, plan.mapping.ep)
    layout = Layout(plan.mapping, DTYPES[plan.dtype], Dispatch.of(plan.config.moe_config), placed)
    mesh = make_mesh(plan.mapping, devices)
    page_size = plan.config.kv_cache_config.tokens_per_block
    num_slots = layout.size("requests") * plan.max_batch_size + 1
    packer = Packer(
        tile=plan.tile,
        width=-(-plan.max_seq_len // plan.page_tokens),
        max_batch_size=num_slots - 1,
        layout=layout,
        page_size=page_size,
    )
    bucket = plan.decode_bucket if bucket is None else bucket
    shape = packer.shape(bucket)
    out = []
    for index, stage in enumerate(plan.stages):
        part = stage_mesh(mesh, index)
        functions = StepFunctions(cfg, layout, part, stage.layers)

        def spec(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        pages = plan.pages * (plan.page_tokens // layout.mapping.stripes // page_size) * layout.size("pages")
        pool = spec((pages, *functions.kv_shape(page_size)), np.dtype(plan.kv_dtype), layout.sharding(part, *KV_AXES))
        last = spec((num_slots,), np.int32, layout.sharding(part))
        loads = [] if functions.loads is None else [functions.loads]
        args: list[Any] = [
            functions.abstract_weights(),
            [pool] * len(stage.layers) + [spec(size, np.int32, NamedSharding(part, at)) for size, at in loads],
            last if functions.first or functions.last else None,
        ]
        args.append(spec(shape.shape, np.int32, layout.sharding(part, "requests")))
        rows = bucket.tokens(plan.tile)
        if not functions.first:
            tokens = rows * layout.size("tokens")
            stream = NamedSharding(part, layout.stream(rows, cfg.hidden_size))
            args.append(spec((tokens, cfg.hidden_size), layout.dtype, stream))
        began = time.perf_counter()
        lowered = jax.jit(functions.forward(shape), donate_argnums=(1, 2)).lower(*args)
        program = lowered.compile(functions.compiler_options(shape))
        memory, hlo = program.memory_analysis(), program.as_text()
        assert memory is not None and hlo is not None
        inputs = 4 * num_slots * (functions.first or functions.last)
        inputs += sum(4 * int(np.prod(size[1:])) for size, _ in loads)
        inputs += 4 * int(np.prod(shape.shape)) // layout.size("requests")
        if not functions.first:
            shard = args[-1].sharding.shard_shape(args[-1].shape)
            inputs += int(np.prod(shard)) * layout.dtype.itemsize
        out.append(
            CompiledStage(
                seconds=time.perf_counter() - began,
                arguments=memory.argument_size_in_bytes,
                planned=stage.weights + stage.kv + inputs,
                scratch=memory.temp_size_in_bytes + max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
                collectives=count_collectives(hlo),
            )
        )
    return out


def count_collectives(hlo: str) -> dict[str, int]:
    """Collectives of a compiled program by their HLO name; those with several operands count once.

    Our own kernels for small ones count as what they are.
    """
    found = Counter(re.findall(rf" ({'|'.join(HLO_NAMES.values())})(?:-start)?\(", hlo))
    for kernel, kind in (
        ("all_reduce", "all_reduce"),
        ("reduce_scatter", "reduce_scatter"),
        ("gather_rows", "all_gather"),
    ):
        found[HLO_NAMES[kind]] += len(re.findall(rf'name = "{kernel}"', hlo))
    return dict(sorted((+found).items()))
