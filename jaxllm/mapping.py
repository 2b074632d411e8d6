"""Parallel sizes as the user writes them, and the order of ranks they stand for."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import product

logger = logging.getLogger(__name__)

AXES = ("pp", "cp", "ep", "tp")


class CpType(Enum):
    """The kinds of context parallelism, by the names and numbers of TensorRT-LLM's `tensorrt_llm.mapping.CpType`.

    What each does is told by `CpConfig`. ULYSSES follows DeepSpeed-Ulysses, RING ring attention, STAR star attention
    (arXiv 2411.17116, approximate by design) and HELIX Helix parallelism.
    """

    ULYSSES = 0
    STAR = 1
    RING = 2
    HELIX = 3


@dataclass(frozen=True, slots=True)
class StarConfig:
    """Star attention: tokens of a context block, and those of the anchor that every block sees (at most a block)."""

    block_size: int
    anchor_size: int

    def query_start(self, num_prompt: int) -> int:
        """First position of a prompt's last block, whose tokens see everything."""
        return (num_prompt - 1) // self.block_size * self.block_size


@dataclass(frozen=True, slots=True)
class Mapping:
    """The parallel layout. Ranks are numbered row-major over `("pp", "cp", "ep", "tp")`, tp fastest.

    So with pp 2, cp 1, ep 2, tp 2 the ranks 0..3 are the first stage, 0 and 1 its first expert group: neighbours in
    tp, whose collectives are the most frequent, are neighbours among the devices, and a stage is a run of devices.

    cp_type: how the context is parallel; None when cp is 1 (STAR also on one rank: it is another attention).
    attention_dp: requests, not heads, are split over the ep * tp ranks of a stage.
    pp_partition: layers of each stage; None for as even as possible, the first stages taking one more.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    cp_type: CpType | None = None
    star: StarConfig | None = None
    attention_dp: bool = False
    pp_partition: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.cp > 1 and self.cp_type is None:
            raise ValueError(
                f"cp = {self.cp} without a cp_type: each kind places keys and values differently; give one of "
                + ", ".join(kind.name for kind in CpType)
            )

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.ep

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Axis sizes in mesh order."""
        return (self.pp, self.cp, self.ep, self.tp)

    def __str__(self) -> str:
        """The axes that are larger than one, such as `pp=2 tp=4`, and what else distinguishes the layout."""
        sizes = [f"{name}={size}" for name, size in zip(AXES, self.shape, strict=True) if size > 1] or ["tp=1"]
        if self.cp_type is not None:
            sizes.append(self.cp_type.name)
        if self.attention_dp:
            sizes.append("attention DP")
        return " ".join(sizes)

    def coordinates(self, rank: int) -> tuple[int, int, int, int]:
        """Where a rank stands on the axes pp, cp, ep, tp."""
        rank, tp = divmod(rank, self.tp)
        rank, ep = divmod(rank, self.ep)
        pp, cp = divmod(rank, self.cp)
        return pp, cp, ep, tp

    # ---- how the tokens of a sequence are spread over cp -------------------------------------------------------------

    @property
    def prompt_parts(self) -> int:
        """Ranks that the prompt tokens of a step are split over. With HELIX every rank of cp computes all of them."""
        return 1 if self.cp_type is CpType.HELIX else self.cp

    @property
    def stripes(self) -> int:
        """Ranks that keys and values of a sequence are spread over in stripes, by position: position p is on rank
        `p // stripe % stripes`. With ULYSSES every rank has all positions, of its own heads."""
        return 1 if self.cp_type is CpType.ULYSSES else self.cp

    def stripe(self, page_size: int) -> int:
        """Consecutive positions that one rank keeps, in tokens: a page, or with STAR a context block."""
        return self.star.block_size if self.star is not None and self.stripes > 1 else page_size

    def page_span(self, page_size: int) -> int:
        """Tokens of one page of the scheduler: a stripe on each rank that the context is spread over."""
        return self.stripes * self.stripe(page_size)

    def stage_layers(self, num_layers: int) -> list[range]:
        """The layers of each pipeline stage: `pp_partition`, or as even as possible, the first stages taking one more.

        Raises ValueError when the stages do not fit that many layers.
        """
        if self.pp > num_layers:
            raise ValueError(
                f"pipeline_parallel_size = {self.pp} is more than the model's {num_layers} layers, and every stage "
                f"needs one; use at most {num_layers}"
            )
        counts = self.pp_partition
        if counts is None:
            each, more = divmod(num_layers, self.pp)
            counts = tuple(each + (stage < more) for stage in range(self.pp))
        elif sum(counts) != num_layers:
            raise ValueError(
                f"pp_partition = {list(counts)} has {sum(counts)} layers, but the model has {num_layers}; "
                "make the sum equal"
            )
        ends = [sum(counts[: stage + 1]) for stage in range(self.pp)]
        return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]

    @classmethod
    def resolve(
        cls,
        devices: int | None,
        *,
        tp: int = 1,
        pp: int = 1,
        cp: int = 1,
        ep: int | None = None,
        moe_tp: int | None = None,
        cp_type: CpType | None = None,
        star: StarConfig | None = None,
        attention_dp: bool = False,
        pp_partition: Sequence[int] | None = None,
        platform: str = "",
    ) -> Mapping:
        """The layout that the sizes of the user stand for on this many devices.

        `tp` x `ep` is written in two ways. With tp 2, ep 4 some mean 8 devices: the experts multiply the tensor
        parallel ranks. With tp 16, ep 4 others mean 16: the expert groups subdivide them, as TensorRT-LLM has it. The
        first reading is taken when its devices are there, otherwise the second; the log says which.

        Args:
            devices: how many there are (a layout may use fewer); None when nobody has counted them: any number.
            tp, pp, cp: sizes of tensor, pipeline and context parallelism.
            ep, moe_tp: groups that the experts are split over, and ranks that each expert is split over; None or -1
                to derive one from the other. `moe_tp` decides between the readings: it is tp in the first one and
                tp / ep in the second.
            cp_type: kind of context parallelism; None is ULYSSES, as in TensorRT-LLM.
            star: sizes of Star attention, for cp_type STAR only.
            attention_dp, pp_partition: see the class.
            platform: of the devices, for error messages.

        Raises:
            ValueError: a size is no positive integer, the sizes contradict each other, or neither reading fits the
                devices. The message names both totals, the devices found and layouts that fit.
        """
        moe_tp = None if moe_tp == -1 else moe_tp
        ep = None if ep == -1 else ep
        named = {
            "tensor_parallel_size": tp,
            "pipeline_parallel_size": pp,
            "context_parallel_size": cp,
            "moe_expert_parallel_size": ep,
            "moe_tensor_parallel_size": moe_tp,
        }
        for name, size in named.items():
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ValueError(f"{name} = {size!r} must be an integer of at least 1")
        if ep is None:
            if moe_tp is not None and tp % moe_tp:
                raise ValueError(
                    f"moe_tensor_parallel_size = {moe_tp} does not divide tensor_parallel_size = {tp}; use one of "
                    f"{_divisors(tp)}"
                )
            ep = 1 if moe_tp is None else tp // moe_tp
        _check_partition(pp, pp_partition)
        if star is not None and cp_type is not CpType.STAR:
            raise ValueError(f"block sizes of Star attention are set, but cp_type is {cp_type and cp_type.name}")
        cp_type = (cp_type or CpType.ULYSSES) if cp > 1 or cp_type is CpType.STAR else None
        if cp_type is CpType.STAR and star is None:
            raise ValueError("cp_type STAR needs the sizes of its blocks and anchor; give a StarConfig")

        beside = tp * ep * pp * cp  # the experts' ranks multiply tp
        inside = tp * pp * cp if tp % ep == 0 else None  # they subdivide it
        if moe_tp is not None and ep > 1:
            beside_allowed, inside_allowed = moe_tp == tp, inside is not None and moe_tp == tp // ep
            if not (beside_allowed or inside_allowed):
                raise ValueError(
                    f"moe_tensor_parallel_size = {moe_tp} x moe_expert_parallel_size = {ep} contradicts "
                    f"tensor_parallel_size = {tp}; leave moe_tensor_parallel_size out, or use {tp} (for {beside} "
                    "devices)" + (f" or {tp // ep} (for {inside} devices)" if inside else "")
                )
        else:
            beside_allowed, inside_allowed = True, inside is not None
        common = {
            "pp": pp,
            "cp": cp,
            "cp_type": cp_type,
            "star": star,
            "attention_dp": attention_dp,
            "pp_partition": None if pp_partition is None else tuple(pp_partition),
        }
        room = math.inf if devices is None else devices
        if beside_allowed and beside <= room:
            found = cls(tp=tp, ep=ep, **common)  # type: ignore[arg-type]
            how = f"tp x ep x pp x cp = {beside} devices"
        elif inside_allowed and inside is not None and inside <= room:
            found = cls(tp=tp // ep, ep=ep, **common)  # type: ignore[arg-type]
            how = f"tp x pp x cp = {inside} devices, expert groups being a part of tp"
        else:
            raise ValueError(_does_not_fit(tp, ep, pp, cp, cp_type, beside, inside, int(room), platform))
        if ep > 1:
            logger.info("tensor_parallel_size %d and moe_expert_parallel_size %d are read as %s", tp, ep, how)
        return found


def _check_partition(pp: int, partition: Sequence[int] | None) -> None:
    if partition is None:
        return
    if len(partition) != pp:
        raise ValueError(
            f"pp_partition = {list(partition)} has {len(partition)} stages, but pipeline_parallel_size = {pp}; "
            "give one number of layers for each stage"
        )
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in partition):
        raise ValueError(f"pp_partition = {list(partition)}: every stage needs at least one layer")


def _does_not_fit(
    tp: int,
    ep: int,
    pp: int,
    cp: int,
    cp_type: CpType | None,
    beside: int,
    inside: int | None,
    found: int,
    platform: str,
) -> str:
    asked = {"pp": pp, "cp": cp, "ep": ep, "tp": tp}
    sizes = " x ".join(f"{axis}={size}" for axis, size in asked.items() if size > 1)
    totals = f"needs {beside} devices"
    if ep > 1:
        totals += f" (tp x ep x pp x cp), or {tp * pp * cp} with the expert groups a part of tp"
        if inside is None:
            totals += f", which ep={ep} does not allow because it does not divide tp={tp}"
    fits = "; ".join(map(str, nearest_layouts(found, asked, cp_type)))
    cpu = f"; on a CPU, JAX_NUM_CPU_DEVICES={inside or beside}" if platform in ("", "cpu") else ""
    return (
        f"the layout {sizes} {totals}, but only {found} {platform + ' ' if platform else ''}device(s) are visible: "
        f"lower tensor_parallel_size or another size (what fits: {fits}), or make more devices visible "
        f"(CUDA_VISIBLE_DEVICES{cpu})"
    )


def nearest_layouts(
    devices: int, asked: dict[str, int], cp_type: CpType | None = None, count: int = 4
) -> list[Mapping]:
    """Layouts that use all devices, over the axes that were asked for, those nearest to the request first."""
    axes = [axis for axis, size in asked.items() if size > 1] or ["tp"]
    every = [sizes for sizes in product(_divisors(devices), repeat=len(axes)) if math.prod(sizes) == devices]

    def distance(sizes: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        far = sum(abs(math.log(size / asked[axis])) for axis, size in zip(axes, sizes, strict=True))
        return round(far, 6), tuple(-size for size in sizes)

    nearest = [dict(zip(axes, sizes, strict=True)) for sizes in sorted(every, key=distance)[:count]]
    kinds = [cp_type if sizes.get("cp", 1) > 1 else None for sizes in nearest]
    return [Mapping(cp_type=kind, **sizes) for kind, sizes in zip(kinds, nearest, strict=True)]  # type: ignore[arg-type]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
