"""Where jaxllm keeps what it can make again: compiled programs and kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir(name: str) -> Path:
    """A folder of `$JAXLLM_CACHE`, or of `~/.cache/jaxllm`."""
    root = os.environ.get("JAXLLM_CACHE")
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "jaxllm") / name
