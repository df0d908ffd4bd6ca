"""The processor's flags of all threads that have a part in a kernel, by a function of the library (``flags.h``).

Torch's kernels and these functions are run by the same threads where both are built on one OpenMP; whether they are is
tried. On two threads a look at a million elements takes 140 µs, this 6.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import get_num_threads
from torch._C import _len_torch_dispatch_stack as modes_active

from torchbp.ops.kernels import _library

__all__ = ["of_all_threads"]

_SHARED = 1 << 18  # elements; any number of threads has a part in them


def of_all_threads(flag: int) -> Callable[[], int] | None:
    """Return what says how many threads have raised ``flag``, and takes it down; ``None`` where nothing does.

    Args:
        flag: That of an invalid operation.
    """
    threads = get_num_threads()
    key = (of_all_threads, threads, flag)
    found = _library.remembered.get(key, ())
    if found == ():
        if modes_active():  # which would see the trial
            return None
        found = _library.remembered[key] = _tried(_compiled(), threads, flag)
    return found


def _compiled() -> Callable[..., None] | None:
    name, text = _library.named(
        "(int threads, int flags, int* count) {\n    *count = raised(threads, flags);\n}\n"
    )
    function = _library.find(name, f'#include "flags.h"\n\n{text}')
    if function is not None:
        function.restype = None
        function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
    return function


def _tried(
    function: Callable[..., None] | None, threads: int, flag: int
) -> Callable[[], int] | None:
    """Return ``function`` for so many threads, where it sees each of them take part in two of torch's kernels."""
    if function is None:
        return None

    def count() -> int:
        count = ctypes.c_int()
        function(threads, flag, ctypes.addressof(count))
        return count.value

    infinite = torch.full((_SHARED,), -torch.inf, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for kernel in (torch.nn.functional.gelu, torch.nn.functional.silu):  # oneDNN's, and torch's
            count()
            kernel(infinite)
            if count() != threads or count():
                return None
    return count
