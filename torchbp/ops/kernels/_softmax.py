"""Softmax along contiguous rows as compiled loops (``softmax.h``), and what log-softmax makes of it."""

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor, get_num_threads

from torchbp.ops.kernels import _library
from torchbp.ops.kernels._by_hand import Loop, Run, taken
from torchbp.ops.kernels._loop import MANY

__all__ = ["over_log_softmax", "over_log_softmax_backward"]

_WIDE = 64  # elements of a row, from which the loop gains in float32
_MANY_WIDE = 1 << 18  # elements of all rows, as well


def _loop(name: str, *pointers: str) -> Loop:
    """Return the loop that calls the template ``name`` with n, c, threads and ``pointers``."""
    arguments = ", ".join(p.split()[-1] for p in pointers)
    parameters = f"int64_t n, int64_t c, int threads, {', '.join(pointers)}"
    types = (c_int64, c_int64, c_int, *(c_void_p,) * len(pointers))
    return Loop("softmax.h", parameters, f"{name}(n, c, threads, {arguments})", types)


_LOG_SOFTMAX = _loop("log_softmax", "const T* x", "T* y")
_LOG_SOFTMAX_BACKWARD = _loop("log_softmax_backward", "const T* g", "const T* x", "T* grad_x")


def over_log_softmax(x: Tensor, dim: int) -> Tensor | None:
    """Return log softmax(x) along ``dim``; ``None`` where this was not compiled, or isn't taken."""
    if x.numel() < MANY or not _library.at_hand() or not _in_rows(x, dim):
        return None
    run = taken(_LOG_SOFTMAX, x)
    if run is None or not _gain_values(x):
        return None
    y = torch.empty_like(x)
    _call(run, x, x, y)
    return y


def over_log_softmax_backward(grad_y: Tensor, x: Tensor, dim: int) -> Tensor | None:
    """Return the gradient of x in half precision, where it is what is kept; ``None`` as :func:`over_log_softmax` does.

    In float32 torch's own kernel, from y, is at what memory takes.
    """
    if x.numel() < MANY or x.dtype == torch.float32 or not _library.at_hand():
        return None
    if grad_y.dtype != x.dtype or not _in_rows(x, dim):
        return None
    run = taken(_LOG_SOFTMAX_BACKWARD, x, grad_y)
    if run is None:
        return None
    grad_x = torch.empty_like(x)
    _call(run, x, grad_y.contiguous(), x, grad_x)
    return grad_x


def _gain_values(x: Tensor) -> bool:
    return x.dtype != torch.float32 or (x.shape[-1] >= _WIDE and x.numel() >= _MANY_WIDE)


def _in_rows(x: Tensor, dim: int) -> bool:
    return dim in (-1, x.dim() - 1) and x.is_contiguous()


def _call(run: Run, x: Tensor, *tensors: Tensor) -> None:
    width = x.shape[-1]
    run(x.numel() // width, width, get_num_threads(), *[t.data_ptr() for t in tensors])
