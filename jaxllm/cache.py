"""Where jaxllm keeps what it can make again: compiled programs and kernels."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def cache_dir(name: str) -> Path:
    """A folder of `$JAXLLM_CACHE`, or of `~/.cache/jaxllm`."""
    root = os.environ.get("JAXLLM_CACHE")
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "jaxllm") / name


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that other processes may read meanwhile: they see all of it or what was there before.

    The bytes are written beside `path`, whose folder is made, and renamed. Raises OSError, and leaves nothing then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
