"""Whether a kernel made a NaN that was not in its input: the processor takes note, as numpy, too, asks after each loop.

IEEE 754 has a flag that an invalid operation raises (∞ · 0, ∞ - ∞, ∞ / ∞), and that stays until it is cleared; each
thread has its own. To read it takes 0.1 µs, where to look at a million elements takes 60.
"""

import ctypes
import math
import platform
from collections.abc import Callable

import torch
from torch import Tensor, get_num_threads

__all__ = ["FEW", "INVALID", "at_hand", "quiet", "raised", "sound"]

FEW = 1024  # elements; up to these torch.equal is faster than a sum and its item
INVALID = 1  # FE_INVALID in the <fenv.h> of both families of processors


def _flag() -> tuple[Callable[[int], int], Callable[[int], int]] | None:
    """Return what tests and what clears the flag; ``None`` where it isn't found, or the processor is another's copy."""
    if platform.machine() not in ("x86_64", "AMD64", "aarch64", "arm64"):
        return None
    try:
        library = ctypes.PyDLL(None)  # keeps the interpreter's lock: it is the thread's own flag
        test, clear = library.fetestexcept, library.feclearexcept
    except (AttributeError, OSError, TypeError):  # Windows
        return None
    clear(INVALID)
    torch.full((256,), torch.inf, device="cpu").mul_(0.0)
    raised = test(INVALID)
    clear(INVALID)
    return (test, clear) if raised and not test(INVALID) else None


def _always(_: int) -> int:
    return INVALID


_FLAG = _flag()
# What tells whether the flag is up, or may be: raised(INVALID). It tells of the thread that asks.
raised = _always if _FLAG is None else _FLAG[0]


def at_hand() -> bool:
    """Whether the flag tells of all that a kernel does on the CPU: it is there, and no other thread has a part."""
    return _FLAG is not None and get_num_threads() == 1


def quiet() -> bool:
    """Whether it is known at once that no kernel of this thread has made a NaN; not what fake tensors would make."""
    return not raised(INVALID) and get_num_threads() == 1


def sound(y: Tensor) -> bool:
    """Whether ``y``, which a kernel has just made on the CPU, has no NaN; of many elements it may say so in vain.

    What ``y`` was made of may have NaN: these raise no flag, and stay.
    """
    if _FLAG is not None and get_num_threads() == 1:
        if not raised(INVALID):
            return True
        _FLAG[1](INVALID)  # and it may be somebody else's
    if y.numel() <= FEW:
        return torch.equal(y, y)
    total = y.sum(dtype=torch.float32) if y.dtype == torch.float16 else y.sum()
    return not math.isnan(total.item())
