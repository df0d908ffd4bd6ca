"""A Function under ``vmap``, differentiated from outside, as an ensemble of models is trained.

Torch (2.13) writes down along which dimension each saved tensor is batched, once for ``save_for_backward`` and
``save_for_forward``: the list of the latter is what remains. An op that saves less for backward than for forward mode
would be refused there, or read one tensor's dimension as another's. So what both save is saved as one list.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._functorch.autograd_function import CtxCustomSave
from torch.autograd.function import Function

__all__ = ["vmapped"]


class _Saving:
    """A ``ctx`` that keeps apart what is saved for backward and for forward mode; all else is the own one's."""

    def __init__(self, ctx: Any) -> None:
        self.__dict__.update(own=ctx, backward=(), forward=None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["own"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["own"], name, value)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.__dict__["backward"] = tensors

    def save_for_forward(self, *tensors: Tensor | None) -> None:
        self.__dict__["forward"] = tensors


class _Saved(_Saving):
    """A ``ctx`` with its part of the saved tensors."""

    def __init__(self, ctx: Any, part: slice) -> None:
        super().__init__(ctx)
        self.__dict__["saved_tensors"] = ctx.saved_tensors[part]


def vmapped(function: type[Function]) -> type[Function]:
    """Return ``function`` with its saved tensors in one list where they may be batched."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(ctx, CtxCustomSave):
            ctx.for_backward = None
            function.setup_context(ctx, inputs, output)
            if ctx.saved_for_forward is None and ctx.to_save:
                ctx.save_for_forward(*ctx.to_save)
            return
        saving = _Saving(ctx)
        function.setup_context(saving, inputs, output)
        forward = saving.backward if saving.forward is None else saving.forward
        both = (*saving.backward, *forward)
        ctx.for_backward = len(saving.backward)
        ctx.save_for_backward(*both)
        ctx.save_for_forward(*both)

    def of_part(method: Callable[..., Any], forward: bool) -> Callable[..., Any]:
        def call(ctx: Any, *args: Any) -> Any:
            n = ctx.for_backward
            if n is None:
                return method(ctx, *args)
            return method(_Saved(ctx, slice(n, None) if forward else slice(n)), *args)

        return call

    methods = {
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(of_part(function.backward, forward=False)),
        "jvp": staticmethod(of_part(function.jvp, forward=True)),
    }
    return type(function.__name__, (function,), methods)
