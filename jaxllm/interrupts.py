"""Ctrl-C while modules are imported, which is most of the first seconds of a command.

Not every import lets a KeyboardInterrupt through: numpy's makes an ImportError of it, and who can do without a module
goes on without it, and without the interrupt.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

_seen = False


@contextlib.contextmanager
def noticed() -> Iterator[None]:
    """Within, an interrupt is remembered as well as raised: in the main thread, where nobody handles them already."""
    global _seen
    _seen = False
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    try:
        signal.signal(signal.SIGINT, _interrupt)
    except ValueError:  # only the main thread may say what signals do
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    global _seen
    _seen = True
    raise KeyboardInterrupt


def seen() -> bool:
    """Whether there was an interrupt since `noticed` was entered, whatever became of it."""
    return _seen


def raise_if_seen() -> None:
    """Raises the KeyboardInterrupt that an import may have swallowed."""
    if _seen:
        raise KeyboardInterrupt
