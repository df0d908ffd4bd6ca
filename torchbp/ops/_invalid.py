"""Whether a kernel made a NaN that was not in its input: the processor takes note, as numpy, too, asks after each loop.

IEEE 754 has a flag that an invalid operation raises (∞ · 0, ∞ - ∞, ∞ / ∞), and one that an overflow raises. They stay
until they are cleared; each thread has its own. To read them takes 0.1 µs, to look at a million elements 60. Of
several threads the compiled library reads them (``kernels/_flags.py``), where it is there.
"""

import ctypes
import math
import platform
from collections.abc import Callable

import torch
from torch import Tensor, get_num_threads

from torchbp.ops.kernels import MANY, of_all_threads
from torchbp.ops.kernels import at_hand as compiled

__all__ = [
    "FEW",
    "INVALID",
    "OVERFLOW",
    "at_hand",
    "at_hand_of_all",
    "clear",
    "quiet",
    "raised",
    "sound",
]

FEW = 1024  # elements; up to these torch.equal is faster than a sum and its item
# FE_INVALID and FE_OVERFLOW in the <fenv.h> of both families of processors
INVALID, OVERFLOW = 1, 4 if platform.machine() in ("aarch64", "arm64") else 8


def _flags() -> tuple[Callable[[int], int], Callable[[int], int]] | None:
    """Return what tests and what clears flags; ``None`` where they aren't found, or the processor is another's copy."""
    if platform.machine() not in ("x86_64", "AMD64", "aarch64", "arm64"):
        return None
    try:
        library = ctypes.PyDLL(None)  # keeps the interpreter's lock: it is the thread's own flag
        test, clear = library.fetestexcept, library.feclearexcept
    except (AttributeError, OSError, TypeError):  # Windows
        return None
    both = INVALID | OVERFLOW
    clear(both)
    torch.full((256,), torch.inf, dtype=torch.float32, device="cpu").mul_(0.0)
    torch.full((256,), 1e30, dtype=torch.float32, device="cpu").mul_(1e30)
    raised = test(both)
    clear(both)
    return (test, clear) if raised == both and not test(both) else None


def _unknown(flags: int) -> int:
    return flags


_FLAGS = _flags()
# What tells whether a flag is up, or may be, as raised(INVALID), and what takes it down: the asking thread's own.
raised, clear = (_unknown, _unknown) if _FLAGS is None else _FLAGS


def at_hand() -> bool:
    """Whether the flags tell of all that a kernel does on the CPU: they are there, and no other thread has a part."""
    return _FLAGS is not None and get_num_threads() == 1


def at_hand_of_all(n: int) -> bool:
    """Whether the flags tell of all that a kernel does with ``n`` elements, which several threads share."""
    return _of_all(n) is not None


def _of_all(n: int) -> Callable[[], int] | None:
    return of_all_threads(INVALID) if n >= MANY and compiled() and _FLAGS is not None else None


def quiet() -> bool:
    """Whether it is known at once that no kernel of this thread has made a NaN; not what fake tensors would make."""
    return not raised(INVALID) and get_num_threads() == 1


def sound(y: Tensor) -> bool:
    """Whether ``y``, which a kernel has just made on the CPU, has no NaN; of many elements it may say so in vain.

    What ``y`` was made of may have NaN: these raise no flag, and stay.
    """
    if at_hand():
        if not raised(INVALID):
            return True
        clear(INVALID)  # and it may be somebody else's
    elif (count := _of_all(y.numel())) is not None and not count():
        return True
    if y.numel() <= FEW:
        return torch.equal(y, y)
    total = y.sum(dtype=torch.float32) if y.dtype == torch.float16 else y.sum()
    return not math.isnan(total.item())
