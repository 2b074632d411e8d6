"""Where the devices' time goes: a trace of one load, and its kernels by time.

While a trace is recorded XLA launches kernel by kernel instead of whole graphs, so that steps take longer than they do
otherwise; the kernels' own times are real.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.bench.report import aligned


@dataclass(frozen=True, slots=True)
class Kernel:
    """All calls of one kernel on all devices. milliseconds: together."""

    name: str
    calls: int
    milliseconds: float


def record(directory: str | Path, run: Callable[[], object]) -> list[Kernel]:
    """Traces `run` into `directory`, which the profile viewers of JAX read, and returns its kernels, longest first."""
    import jax

    with jax.profiler.trace(str(directory)):
        run()
    return kernels(directory)


def kernels(directory: str | Path) -> list[Kernel]:
    """The kernels of the newest trace in `directory`, longest first. Raises FileNotFoundError where there is none."""
    import jax

    traces = sorted(Path(directory).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not traces:
        raise FileNotFoundError(f"{directory} holds no trace (*.xplane.pb)")
    found: dict[str, tuple[int, float]] = {}
    for name, nanoseconds in _events(jax.profiler.ProfileData.from_file(str(traces[-1])).planes):
        calls, total = found.get(name, (0, 0.0))
        found[name] = calls + 1, total + nanoseconds / 1e6
    return sorted((Kernel(name, *sums) for name, sums in found.items()), key=lambda k: -k.milliseconds)


def _events(planes: Iterable[Any]) -> Iterable[tuple[str, float]]:
    """Name and nanoseconds of everything that a device executed: of streams on a GPU, of XLA's threads on a CPU."""
    planes = list(planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    for plane in devices or planes:
        for line in plane.lines:
            if not line.name.startswith("Stream" if devices else "tf_XLAPjRt"):
                continue
            for event in line.events:
                if devices or (event.duration_ns > 0 and ": " not in event.name and "::" not in event.name):
                    yield event.name, event.duration_ns


def table(found: list[Kernel], count: int = 20) -> str:
    """The kernels that take longest, as text."""
    total = sum(kernel.milliseconds for kernel in found) or 1.0
    cells = [["kernel", "calls", "ms", "us a call", "share"]]
    for k in found[:count]:
        each = f"{1e3 * k.milliseconds / k.calls:.1f}"
        cells.append(
            [k.name[:80], str(k.calls), f"{k.milliseconds:.2f}", each, f"{100 * k.milliseconds / total:.1f} %"]
        )
    rest = sum(kernel.milliseconds for kernel in found[count:])
    cells.append(["the others", "", f"{rest:.2f}", "", f"{100 * rest / total:.1f} %"])
    return "\n".join(aligned(cells))
