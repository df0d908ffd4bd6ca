"""SIGTERM, as schedulers send it: what was measured is written before the process ends.

A handler is set only in the main thread and only over the default one, and taken back with the last
monitor. It closes in a thread of its own, because the signal may have come while this thread holds
the very lock that closing needs.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

__all__ = ["attend", "leave"]

_PATIENCE = 5.0
_closers: dict[int, Callable[[], None]] = {}


def attend(key: int, close: Callable[[], None]) -> None:
    """Call ``close`` when the process is told to end."""
    _closers[key] = close
    if _is_main() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _end)


def leave(key: int) -> None:
    """Take back :func:`attend`."""
    _closers.pop(key, None)
    if not _closers and _is_main() and signal.getsignal(signal.SIGTERM) is _end:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def _end(number: int, _: FrameType | None) -> None:
    threads = [threading.Thread(target=close, daemon=True) for close in list(_closers.values())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_PATIENCE)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
