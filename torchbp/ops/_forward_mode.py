"""Forward mode inside forward mode, ``jacfwd(jacfwd(f))``: a Function's ``jvp`` whose own derivative is not lost.

Torch runs ``jvp`` with forward mode switched off, in the outer transforms too, so that every derivative of it is 0
without a word (pytorch#197867). Here it stays on where there is an outer one, and what ``jvp`` reads has lost its
tangents of the inner one, whose rule it is.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as transforms_active
from torch._C._functorch import (
    TransformType,
    _add_batch_dim,
    get_interpreter_stack,
    get_unwrapped,
    is_batchedtensor,
    maybe_get_bdim,
    maybe_get_level,
)
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd.forward_ad import _set_fwd_grad_enabled

__all__ = ["differentiable_in_forward_mode"]


def differentiable_in_forward_mode(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``jvp``, the static method of a Function, with tangents of its own where forward mode is nested."""

    @wraps(jvp)
    def call(ctx: Any, *tangents: Tensor | None) -> Any:
        if not (transforms_active() and _nested()):
            return jvp(ctx, *tangents)
        with _set_fwd_grad_enabled(True):
            return jvp(_Primals(ctx), *_primals(tangents))

    return call


class _Primals:
    """A ``ctx`` whose saved tensors have no tangent of the innermost forward mode."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.saved_tensors = _primals(ctx.saved_tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _nested() -> bool:
    """Whether an outer ``torch.func.jvp`` waits for the derivative of what this one computes."""
    levels = get_interpreter_stack() or ()
    return sum(level.key() == TransformType.Jvp for level in levels) > 1


def _primals(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else _primal(t) for t in tensors)


def _primal(t: Tensor) -> Tensor:
    if is_batchedtensor(t):  # vmap knows no rule for the call below
        with retrieve_current_functorch_interpreter().lower():
            inner = _primal(get_unwrapped(t))
        return _add_batch_dim(inner, maybe_get_bdim(t), maybe_get_level(t))
    return torch.ops.aten._fw_primal.default(t, 0)
