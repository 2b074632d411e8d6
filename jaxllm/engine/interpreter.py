"""What an engine asks of Python's interpreter while it runs.

Its collector of cycles is kept away from what an engine holds for life. Traces, programs and modules are some hundred
thousand objects, and a full collection that looks at all of them holds every thread up for tenths of a second: no step
is launched meanwhile, and the device stands idle. What is there when an engine starts is therefore set aside
(`gc.freeze`), until the last engine of the process has ended.

Threads take turns more often. Whoever has the interpreter's lock keeps it for 5 ms where nobody says otherwise, which
is as long as a step of a small batch: a thread that renders text or reads sockets would keep the next step waiting.
"""

from __future__ import annotations

import gc
import sys
import threading

SWITCH_SECONDS = 0.5e-3
"""Longest time that another thread keeps the interpreter's lock from the engine's."""

_lock = threading.Lock()
_engines = 0
_interval = 0.0  # what it was before the first engine


def hold() -> None:
    """An engine is ready to run: nothing that is there now is looked at, and turns are short, until `release`."""
    global _engines, _interval
    with _lock:
        if not _engines:
            _interval = sys.getswitchinterval()
            sys.setswitchinterval(min(_interval, SWITCH_SECONDS))
        _engines += 1
        gc.freeze()


def release() -> None:
    """An engine has ended; with the last one everything is as it was. To be called once for each `hold`."""
    global _engines
    with _lock:
        _engines -= 1
        if not _engines:
            gc.unfreeze()
            sys.setswitchinterval(_interval)


def engines() -> int:
    """Engines that run."""
    return _engines
