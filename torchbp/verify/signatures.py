"""How a function is called: the signature of what stands behind it."""

import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.autograd import Function

__all__ = ["function_of", "holdings", "methods_of", "signature_of"]


def signature_of(func: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a function: of a Module its forward's, of a Function's ``apply`` its forward's too.

    Raises:
        ValueError: It has none, as functions that are built in.
    """
    if isinstance(func, nn.Module):
        return inspect.signature(func.forward)
    function = function_of(func)
    if not function:
        return inspect.signature(func)
    whole = inspect.signature(function.forward)
    apart = function.setup_context is not Function.setup_context
    return whole if apart else whole.replace(parameters=list(whole.parameters.values())[1:])


def function_of(func: Callable[..., Any]) -> type[Function] | None:
    """Return the Function whose ``apply`` this is."""
    owner = getattr(func, "__self__", None)
    is_function = isinstance(owner, type) and issubclass(owner, Function)
    return owner if is_function and getattr(func, "__name__", "") == "apply" else None


def holdings(cls: type) -> list[Any]:
    """Return what stands in a class itself; of static and class methods the functions."""
    return [getattr(x, "__func__", x) for x in vars(cls).values()]


def methods_of(cls: type) -> list[types.FunctionType]:
    """Return the functions among that."""
    return [x for x in holdings(cls) if inspect.isfunction(x)]
