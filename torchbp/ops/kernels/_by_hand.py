"""Loops that are written by hand, as templates over what memory holds: which tensors they take, and how one is found.

The source of one is a call of a template of a header, and its name the digest of that: found as a formula's loop is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchbp.ops._function import fused
from torchbp.ops.kernels import _library
from torchbp.ops.kernels._layout import in_memory

__all__ = ["NAMES", "Loop", "Run", "taken", "wide"]

NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16"}
Run = Callable[..., None]


class Loop(NamedTuple):
    """A loop by hand.

    Attributes:
        header: Where its template stands.
        parameters: Of the function, in C++, where ``T`` is the dtype in memory.
        call: Of the template.
        types: Of the parameters, for ``ctypes``.
    """

    header: str
    parameters: str
    call: str
    types: tuple[Any, ...]


def taken(loop: Loop, x: Tensor, *others: Tensor | None) -> Run | None:
    """Return ``loop`` for ``x`` and what goes with it; ``None`` where it was not compiled, or has to see no values.

    Args:
        loop: Which.
        x: Float32 or half precision: its dtype is the loop's.
        others: Of that dtype, float32 or int64; ``None`` for none.
    """
    if x.dtype not in NAMES:
        return None
    given = [t for t in (x, *others) if t is not None]
    if not fused(*given, half=True):
        return None
    dtypes = (x.dtype, torch.float32, torch.int64)
    if not all(t.dtype in dtypes and in_memory(t) for t in given):
        return None
    key = (loop.call, x.dtype)
    run = _library.remembered.get(key, ())
    if run == ():
        run = _library.remembered[key] = _compiled(loop, NAMES[x.dtype])
    return run


def wide(t: Tensor | None, times: int = 1) -> Tensor | None:
    """Return ``t`` in float32, dense, each number of it ``times`` side by side."""
    if t is None:
        return None
    if t.dtype != torch.float32 or not t.is_contiguous():
        t = t.to(torch.float32).contiguous()
    return t if times == 1 else t.repeat_interleave(times)


def _compiled(loop: Loop, dtype: str) -> Run | None:
    parameters = loop.parameters.replace("T*", f"{dtype}*")
    name, text = _library.named(f"({parameters}) {{\n    {loop.call};\n}}\n")
    function: Any = _library.find(name, f'#include "{loop.header}"\n\n{text}')
    if function is None:
        return None
    function.restype = None
    function.argtypes = loop.types
    return function
