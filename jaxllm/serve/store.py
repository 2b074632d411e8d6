"""Answers of /v1/responses that are kept for a while: files that all frontends see, bounded in bytes and in age."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any

_ID = re.compile(r"resp_[0-9a-f]{32}")


class ResponseStore:
    """Kept answers, by id. The oldest go when `max_bytes` are full, and each after `max_seconds`.

    directory: private to this user; made when the first answer is kept.
    """

    def __init__(self, directory: str | Path, max_bytes: int, max_seconds: float) -> None:
        self._directory = Path(directory)
        self.max_bytes, self.max_seconds = max_bytes, max_seconds

    def put(self, response_id: str, entry: dict[str, Any]) -> bool:
        """Keeps an entry, or replaces it; False when it alone is larger than all that may be kept."""
        data = json.dumps(entry).encode()
        if len(data) > self.max_bytes:
            return False
        self._directory.mkdir(mode=0o700, exist_ok=True)
        self._make_room(len(data))
        part = self._directory / f".{response_id}.{os.getpid()}"
        part.write_bytes(data)
        part.replace(self._directory / response_id)
        return True

    def get(self, response_id: str) -> dict[str, Any] | None:
        """The entry of that id; None when there is none, or no more."""
        if not _ID.fullmatch(response_id):
            return None
        path = self._directory / response_id
        try:
            if time.time() - path.stat().st_mtime > self.max_seconds:
                return None
            found: dict[str, Any] = json.loads(path.read_bytes())
        except OSError:
            return None
        return found

    def ask_to_cancel(self, response_id: str) -> None:
        """Leaves word for the frontend that works on it."""
        (self._directory / f"{response_id}.cancel").touch()

    def is_cancelled(self, response_id: str) -> bool:
        return (self._directory / f"{response_id}.cancel").exists()

    def _make_room(self, size: int) -> None:
        found = []
        for path in self._directory.iterdir():
            with contextlib.suppress(OSError):  # another frontend may have taken it away
                stat = path.stat()
                found.append((stat.st_mtime, stat.st_size, path))
        found.sort()
        total, oldest = sum(size for _, size, _ in found), time.time() - self.max_seconds
        for changed, bytes_, path in found:
            if changed >= oldest and total + size <= self.max_bytes:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            total -= bytes_
