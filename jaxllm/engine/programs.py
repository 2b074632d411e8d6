"""Compiled programs on disk: a start that finds them there traces nothing.

XLA's own cache saves the compiling, but is asked for a program only when it has been traced, and Python traces one
after the other: tens of programs take ten seconds. Here a program is found by all that it was made from: settings,
model, sizes, devices, the driver, JAX's versions and settings, and the sources of this package. They lie under
`~/.cache/jaxllm/programs` (or `$JAXLLM_CACHE/programs`), in a folder for each of the last few such combinations.

The files are pickled and say what the process runs, as XLA's cache and `.pyc` files do: who may write to that folder is
trusted.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
from jax.experimental import serialize_executable

import jaxllm
from jaxllm.cache import cache_dir
from jaxllm.kernels.cuda import rtc

logger = logging.getLogger(__name__)

KEPT = 8
"""Combinations that are kept, those used last."""
DRIVER = Path("/proc/driver/nvidia/version")
PREFIXES = ("XLA_", "JAX_", "JAXLLM_", "NVIDIA_", "CUDA_", "NCCL_")
"""Of environment variables that may change a program."""


class Programs:
    """The programs of one combination."""

    def __init__(self, folder: Path, devices: list[jax.Device]):
        self._folder = folder
        self._devices = devices
        self._found: set[str] = set()

    @classmethod
    def made_from(cls, parts: Iterable[object], devices: Iterable[jax.Device]) -> Programs:
        """Those of what `parts` say, for `devices`, on this machine."""
        devices = list(devices)
        parts = [*parts, *_machine(), *((d.id, d.device_kind, d.client.platform_version) for d in devices)]
        texts = (re.sub(r" at 0x[0-9a-f]+", "", repr(part)) for part in parts)  # where functions are in memory
        return cls(cache_dir("programs") / _digest(texts)[:32], devices)

    def load(self, name: str) -> Any | None:
        """A program as `jax.stages.Compiled`; None where there is none, or it cannot be used."""
        try:
            content = self._file(name).read_bytes()
            if content[:32] != hashlib.sha256(content[32:]).digest():
                return None
            executable, arguments, results = pickle.loads(content[32:])
            program = serialize_executable.deserialize_and_load(
                executable, arguments, results, backend=self._devices[0].client, execution_devices=self._devices
            )
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever a file of another time makes of pickle, JAX or a driver
            logger.info("a kept program is made anew: %s", error)
            return None
        self._found.add(name)
        return program

    def save(self, programs: Mapping[str, Any]) -> None:
        """Keeps those that `load` did not find; where that fails they are made anew the next time."""
        new = {name: program for name, program in programs.items() if name not in self._found}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            os.utime(self._folder)
            with ThreadPoolExecutor(8, "keep") as pool:
                list(pool.map(self._save, new, new.values()))
            _clear(self._folder.parent)
        except Exception as error:  # a full disk, or a program that cannot be kept
            logger.info("programs are not kept: %s", error)

    def _save(self, name: str, program: Any) -> None:
        content = pickle.dumps(serialize_executable.serialize(program))
        with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(file.name, self._file(name))

    def _file(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.program"


def _machine() -> list[object]:
    """What decides about programs beside an engine's own settings."""
    try:
        driver = DRIVER.read_text()
    except OSError:
        driver = ""
    environment = sorted(item for item in os.environ.items() if item[0].startswith(PREFIXES) and "CACHE" not in item[0])
    settings = sorted((name, value) for name, value in jax.config.values.items() if "cache" not in name)
    try:
        nvrtc: object = rtc.version()
    except rtc.CompileError:
        nvrtc = None
    versions = (jax.__version__, jaxlib.__version__, flax.__version__, nvrtc)
    return [driver, environment, settings, versions, _sources()]


def _sources() -> str:
    root = Path(jaxllm.__file__).parent
    found = sorted(path for path in root.rglob("*") if path.suffix in (".py", ".cu", ".cuh", ".cc", ".cpp", ".h"))
    return _digest(part for path in found for part in (str(path.relative_to(root)), path.read_text()))


def _clear(root: Path) -> None:
    """Takes away the combinations that were not used for longest."""
    folders = sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for folder in folders[:-KEPT]:
        shutil.rmtree(folder, ignore_errors=True)


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256(chr(0).join(parts).encode()).hexdigest()
