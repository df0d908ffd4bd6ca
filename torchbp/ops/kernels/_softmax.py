"""Softmax and log-softmax along contiguous rows as compiled loops (``softmax.h``)."""

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor, get_num_threads

from torchbp.ops.kernels import _library
from torchbp.ops.kernels._by_hand import Loop, Run, taken
from torchbp.ops.kernels._loop import many

__all__ = [
    "call",
    "over_log_softmax",
    "over_log_softmax_backward",
    "over_softmax",
    "over_softmax_backward",
    "row_loop",
]

_WIDE = 64  # elements of a row, from which the loop gains in float32
_MANY_WIDE = 1 << 18  # elements of all rows, as well


def row_loop(header: str, name: str, *parameters: str) -> Loop:
    """Return the loop that calls the template ``name`` with n and c, threads and ``parameters``, in C++."""
    arguments = ", ".join(p.split()[-1] for p in parameters)
    types = (c_void_p if "*" in p else c_int64 for p in parameters)
    return Loop(
        header,
        f"int64_t n, int64_t c, int threads, {', '.join(parameters)}",
        f"{name}(n, c, threads, {arguments})",
        (c_int64, c_int64, c_int, *types),
    )


_LOG_SOFTMAX = row_loop("softmax.h", "log_softmax", "const T* x", "T* y")
_LOG_SOFTMAX_BACKWARD = row_loop(
    "softmax.h", "log_softmax_backward", "const T* g", "const T* x", "T* grad_x"
)
_SOFTMAX = row_loop("softmax.h", "softmax", "const T* x", "T* y")
_SOFTMAX_BACKWARD = row_loop(
    "softmax.h", "softmax_backward", "const T* g", "const T* y", "T* grad_x"
)


def over_log_softmax(x: Tensor, dim: int) -> Tensor | None:
    """Return log softmax(x) along ``dim``; ``None`` where this was not compiled, or isn't taken."""
    return _made(_LOG_SOFTMAX, x, dim) if _gain_values(x) or _library.listed() else None


def over_log_softmax_backward(grad_y: Tensor, x: Tensor, dim: int) -> Tensor | None:
    """Return the gradient of x in half precision, where it is what is kept; ``None`` as :func:`over_log_softmax` does.

    In float32 torch's own kernel, from y, is at what memory takes.
    """
    return None if x.dtype == torch.float32 else _made(_LOG_SOFTMAX_BACKWARD, x, dim, grad_y)


def over_softmax(x: Tensor, dim: int) -> Tensor | None:
    """Return softmax(x) along ``dim`` in half precision; ``None`` as :func:`over_log_softmax` does."""
    return None if x.dtype == torch.float32 else _made(_SOFTMAX, x, dim)


def over_softmax_backward(grad_y: Tensor, y: Tensor, dim: int) -> Tensor | None:
    """Return the gradient of x from that of y, in half precision; ``None`` as :func:`over_log_softmax` does."""
    return None if y.dtype == torch.float32 else _made(_SOFTMAX_BACKWARD, y, dim, grad_y)


def _made(loop: Loop, x: Tensor, dim: int, grad: Tensor | None = None) -> Tensor | None:
    """Return what ``loop`` makes of the rows of ``grad`` and ``x``."""
    if not many(x) or not _library.at_hand():
        return None
    if dim not in (-1, x.dim() - 1) or not x.is_contiguous():
        return None
    if grad is not None and grad.dtype != x.dtype:
        return None
    run = taken(loop, x, grad)
    if run is None:
        return None
    made = torch.empty_like(x)
    call(run, x, *(() if grad is None else (grad.contiguous(),)), x, made)
    return made


def _gain_values(x: Tensor) -> bool:
    return x.dtype != torch.float32 or (many(x, _MANY_WIDE) and x.shape[-1] >= _WIDE)


def call(run: Run, x: Tensor, *arguments: object) -> None:
    """Run the loop for the rows of ``x``."""
    width = x.shape[-1]
    given = [t.data_ptr() if isinstance(t, Tensor) else t for t in arguments]
    run(x.numel() // width, width, get_num_threads(), *given)
