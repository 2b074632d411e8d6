"""Orbax checkpoints: written tensor by tensor, read slice by slice, so that neither side holds the model.

A converted model is a directory with `config.json` and the tokenizer's files (or `gguf.json`, the metadata of the GGUF
file that it came from) beside `orbax/`, which `orbax.checkpoint` can restore too: a flat dict of unpadded tensors by
Hugging Face's names. Since arrays are chunked and unpadded, the checkpoint fits any mesh.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.weights.source import CheckpointError, Source, TensorInfo, Unquantised, bounds, unreadable

SUBDIR = "orbax"
METADATA_FILE = "gguf.json"
CHUNK_BYTES = 32 << 20


class OrbaxSource(Unquantised):
    """The `orbax/` directory of a converted model as a `Source`.

    Raises:
        CheckpointError: not an Orbax checkpoint, or a damaged one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import tensorstore as ts

        self.path = Path(path).resolve()
        if not (self.path / "_CHECKPOINT_METADATA").exists():
            raise CheckpointError(self.path, "no finished Orbax checkpoint (no _CHECKPOINT_METADATA): convert it again")
        # One handle cache for all tensors; values are used once, so nothing else is worth keeping.
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        base: dict[str, Any] = {"driver": "file", "path": f"{self.path}/"}
        if (self.path / "manifest.ocdbt").exists():
            base = {"driver": "ocdbt", "base": base}
        try:
            keys = ts.KvStore.open(base, context=self._context).result().list().result()
            names = [k.decode().removesuffix("/.zarray") for k in keys if k.endswith(b"/.zarray")]
            opening = {
                name: ts.open(
                    {"driver": "zarr", "kvstore": {**base, "path": f"{base.get('path', '')}{name}/"}},
                    context=self._context,
                    open=True,
                    read=True,
                )
                for name in names
            }
            self._arrays = {name: future.result() for name, future in opening.items()}
        except (ValueError, OSError, KeyError) as error:
            raise CheckpointError(self.path, f"damaged Orbax checkpoint ({_line(error)}): convert it again") from error
        self.tensors = {
            name: TensorInfo(tuple(a.shape), a.dtype.numpy_dtype, int(a.size) * a.dtype.numpy_dtype.itemsize)
            for name, a in self._arrays.items()
        }

    @property
    def name(self) -> str:
        return str(self.path)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        array = self._arrays[name]
        part = tuple(slice(a, b) for a, b in bounds(index, array.shape))
        try:
            return np.asarray(array[part].read().result())
        except (ValueError, OSError) as error:
            raise CheckpointError(self.path, f"{name} cannot be read ({_line(error)}): convert it again") from error

    def close(self) -> None:
        self._arrays = {}


class _Pending:
    """A tensor to be written: looks enough like an array for Orbax to plan, and is read only when its turn comes."""

    def __init__(self, source: Source, name: str) -> None:
        info = source.tensors[name]
        self.shape, self.dtype, self.ndim = info.shape, info.dtype, len(info.shape)
        self.size = int(np.prod(info.shape))
        self.itemsize = info.dtype.itemsize
        self.nbytes = self.size * self.itemsize
        self._source, self._name = source, name

    def load(self) -> np.ndarray:
        return self._source.read(self._name, ())


def convert(
    source: Source,
    config_files: Iterable[Path],
    dst: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Path:
    """Writes `source` as an Orbax model directory and returns it.

    Args:
        source: the checkpoint; quantised tensors are written expanded.
        config_files: copied beside the weights (config.json, tokenizer files).
        dst: a directory that does not exist or is empty.
        metadata: GGUF metadata, for a source that has no config files.
        progress: show a progress bar on a terminal.

    Raises:
        CheckpointError: `dst` has content or cannot be made, or a tensor cannot be read (nothing is written then).
    """
    import orbax.checkpoint as ocp
    from tqdm import tqdm

    dst = Path(dst).resolve()
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise CheckpointError(dst, "exists and is not an empty directory: name a new one, or delete it first")
    broken = unreadable(source.tensors, source.tensors)
    if broken:
        raise CheckpointError(source.name, broken)

    bar = tqdm(
        total=sum(t.nbytes for t in source.tensors.values()),
        unit="B",
        unit_scale=True,
        desc="Converting",
        disable=None if progress else True,
    )

    class OneByOne(ocp.type_handlers.NumpyHandler):
        """Reads, writes and drops each tensor before the next; Orbax's own handler takes all of them at once."""

        async def serialize(self, values, infos, args=None):  # type: ignore[no-untyped-def]
            for value, info, arg in zip(values, infos, args, strict=True):
                for future in await super().serialize([value.load()], [info], [arg]):
                    future.result()
                bar.update(source.tensors[info.name].nbytes)
            return []

    handlers = ocp.type_handlers.create_type_handler_registry((_Pending, OneByOne(deepcopy_host_arrays=False)))
    tree = {name: _Pending(source, name) for name in source.tensors}
    save_args = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in tree}
    try:
        dst.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(dst, f"cannot be made ({error.strerror}): name another directory") from None
    with bar, _quiet():
        # weights hardly compress, and decompressing costs more than reading
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=handlers, use_compression=False)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(dst / SUBDIR, args=ocp.args.PyTreeSave(tree, save_args=save_args))
    for file in config_files:
        shutil.copyfile(file, dst / Path(file).name)
    if metadata is not None:
        (dst / METADATA_FILE).write_text(json.dumps(dict(metadata), ensure_ascii=False), encoding="utf-8")
    return dst


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's warning that it keeps nothing of the sharding of jax.Arrays: here are none."""
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)
    try:
        yield
    finally:
        absl.setLevel(level)


def _line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]
