"""Keeps Python's collector of cycles away from what an engine holds for life.

Traces, programs and modules are some hundred thousand objects, and a full collection that looks at all of them holds
every thread up for tenths of a second: no step is launched meanwhile, and the device stands idle. What is there when an
engine starts is therefore set aside (`gc.freeze`), until the last engine of the process has ended.
"""

from __future__ import annotations

import gc
import threading

_lock = threading.Lock()
_engines = 0


def freeze() -> None:
    """An engine is ready to run: nothing that is there now is looked at until `unfreeze`."""
    global _engines
    with _lock:
        _engines += 1
        gc.freeze()


def unfreeze() -> None:
    """An engine has ended; with the last one everything is looked at again. To be called once for each `freeze`."""
    global _engines
    with _lock:
        _engines -= 1
        if not _engines:
            gc.unfreeze()


def engines() -> int:
    """Engines that run."""
    return _engines
