"""Compiled programs on disk, in JAX's persistent cache, which several processes may share while all of them write."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import jax

from jaxllm.cache import cache_dir, write_whole
from jaxllm.settings import ConfigError

logger = logging.getLogger(__name__)


def enable_compilation_cache(directory: str | None) -> None:
    """Keeps compiled programs on disk: in `directory`, "" for none, None for our own cache unless JAX has one.

    Raises ConfigError when `directory` cannot be made; without our own it goes on, and says so.
    """
    if directory == "":
        return
    _write_whole_entries()
    if directory is None and getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    path = Path(directory).expanduser() if directory else cache_dir("xla")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{str(path)!r} cannot be made ({error.strerror})"
        if directory:
            raise ConfigError(f"compilation_cache_dir: {reason}; name another directory, or '' for none") from None
        logger.warning("no compiled program is kept, so every start compiles: %s; set JAXLLM_CACHE", reason)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _write_whole_entries() -> None:
    """Makes JAX rename its entries into place.

    JAX writes an entry where others already look for it, and never writes one again that is there. So a process that
    reads at that moment finds the first half, and after a process that ended while it wrote (or a disk that was full)
    every later one does: it warns and compiles, at each start. JAX takes a lock only together with a bound on the
    cache's size, which then reads the times of all entries for each that is written. There is no public way to give it
    another writer; where a version of JAX has no such class, its own stays.
    """
    try:
        from jax._src import compilation_cache
        from jax._src.lru_cache import LRUCache
    except ImportError:
        logger.info("this JAX writes its compilation cache in its own way")
        return
    if getattr(compilation_cache, "LRUCache", None) is not LRUCache:  # done before, or not where it was
        return

    class WholeEntries(LRUCache):
        def put(self, key: str, value: bytes) -> None:
            if self.eviction_enabled or "://" in str(self.path):  # under a lock; not a file
                super().put(key, value)
            else:
                _keep(Path(str(self.path)) / f"{key}-cache", value)

    compilation_cache.LRUCache = WholeEntries  # type: ignore[misc]
    compilation_cache.reset_cache()  # one that is open already is opened again, by the new class


def _keep(path: Path, value: bytes) -> None:
    """Writes an entry. Where that fails it is said once, not for each of the programs of an engine."""
    try:
        write_whole(path, value)
    except OSError as error:
        _say_once(f"compiled programs are not kept: {str(path.parent)!r} cannot be written ({error.strerror})")


@functools.cache
def _say_once(message: str) -> None:
    logger.warning("%s", message)
