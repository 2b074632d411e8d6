"""What the supervisor's children have in common: how they are told what to do, and how they end.

The first line of a child's standard input is JSON: its settings, and the key of the Unix socket, which so stands in no
argument list and no environment. The supervisor keeps that pipe open; when it closes, the supervisor is gone and the
child goes too. What a child has to report, it writes as lines of JSON to the file descriptor that it was given.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from jaxllm.options import EXIT_USAGE

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_EXIT_ORPHANED = 71


@dataclass
class Boot:
    """What a child was told when it was started."""

    settings: dict[str, Any]
    key: bytes
    report_fd: int

    @classmethod
    def read(cls) -> Boot:
        """Reads standard input, and ends this process when it is closed."""
        line = sys.stdin.buffer.readline()
        told = json.loads(line)
        threading.Thread(target=_end_with_the_supervisor, name="orphan", daemon=True).start()
        return cls(told["settings"], bytes.fromhex(told["key"]), told["report_fd"])

    def report(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            os.write(self.report_fd, json.dumps(message).encode() + b"\n")


def _end_with_the_supervisor() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(_EXIT_ORPHANED)


def without_torch() -> None:
    """Lets no library of this process find PyTorch.

    transformers imports it wherever it is installed, and nothing here needs it: that costs a process three seconds at
    its start and 180 MiB.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # what None stands for cannot be imported


@contextlib.contextmanager
def exit_code_of(boot: Boot) -> Iterator[Any]:
    """Turns an exception into a report to the supervisor and an exit code, as `jaxllm.cli.main` does it."""
    ended = SimpleNamespace(code=0)
    try:
        yield ended
    except Exception as error:
        known = isinstance(error, ValueError | OSError | ImportError | NotImplementedError)
        text = " ".join(str(error).split()) or type(error).__name__
        if not known or boot.settings.get("debug"):
            logging.getLogger(__name__).exception("this process failed")
        boot.report({"error": text if known else f"{type(error).__name__}: {text}"})
        ended.code = EXIT_USAGE if known else 1


def start_logging(boot: Boot) -> None:
    """Logs to standard error as the settings say: as text, or one JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if boot.settings["log_format"] == "json" else logging.Formatter(LOG_FORMAT))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(boot.settings["log_level"].upper())
    for chatty in ("jax", "absl", "httpx", "asyncio", "uvicorn"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON; its `fields` attribute is merged in."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)
