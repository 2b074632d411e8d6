"""What a plan knows of devices: memory and speeds, measured where there is a measurement, else from the data sheet."""

from __future__ import annotations

from dataclasses import dataclass, replace

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device.

    memory: bytes, as nvidia-smi shows them. bandwidth: of memory, bytes/s. flops: of dense bfloat16 matrix products,
    1/s. fp8: how many times as many of e4m3. link: to the other devices of the host, bytes/s in one direction.
    latency: seconds that a collective takes however small it is. source: where the speeds come from.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    link: float
    latency: float = 7e-6
    fp8: float = 2.0
    source: str = "data sheet; the latency of a collective as measured on the h200"


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "h200", 143_771 * MIB, 4.3e12, 787e12, 450e9, fp8=1440 / 787,
            source="measured: 4.3 TB/s and 787 TF/s sustained, 1,440 in fp8 (data sheet 4.8, 989 and 1,979), 7 us for "
            "a small all-reduce of 2 devices; NVLink from the data sheet",
        ),
        Gpu("h100", 81_559 * MIB, 3.35e12, 989e12, 450e9),
        Gpu("h20", 97_871 * MIB, 4.0e12, 148e12, 450e9),
        Gpu("b200", 183_359 * MIB, 8.0e12, 2250e12, 900e9),
        Gpu("a100", 81_920 * MIB, 2.039e12, 312e12, 300e9, fp8=1.0),
        Gpu("a100-40gb", 40_960 * MIB, 1.555e12, 312e12, 300e9, fp8=1.0),
        Gpu("l40s", 46_068 * MIB, 0.864e12, 362e12, 32e9),
        Gpu("l4", 23_034 * MIB, 0.3e12, 121e12, 32e9),
    )
}  # fmt: skip


def find_gpu(name: str, memory_gib: float | None = None) -> Gpu:
    """A GPU of the table, with another amount of memory if given. Raises ValueError for an unknown name."""
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise ValueError(f"gpu {name!r} is not in the table; use one of {', '.join(GPUS)}, or --memory GIB")
    if memory_gib is None:
        return gpu
    if not 0 < memory_gib < 2**20:
        raise ValueError(f"memory = {memory_gib} GiB must be above 0; for example --memory 80")
    return replace(gpu, memory=int(memory_gib * 2**30))
