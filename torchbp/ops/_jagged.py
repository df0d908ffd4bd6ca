"""Jagged nested tensors: what works row by row is computed of the values of all rows, side by side.

Torch's own ops know them by name; of an op that torch has not, some steps they take and some they refuse.
"""

from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor

from torchbp.ops._errors import shape, wrong

__all__ = ["of_jagged", "row_by_row"]

P = ParamSpec("P")
R = TypeVar("R")
_MARK = "__row_by_row__"


def row_by_row(dim: int | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Say of a function beyond torch's, below ``@public``, that it takes jagged tensors for its first argument.

    Args:
        dim: The dimension that it works along, where it has no argument ``dim``; ``None`` for single elements.
    """

    def marked(function: Callable[P, R]) -> Callable[P, R]:
        setattr(function, _MARK, dim)
        return function

    return marked


def of_jagged(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return what calls ``function`` on the values of a jagged tensor; ``None`` where it is not :func:`row_by_row`."""
    if not hasattr(function, _MARK):
        return None
    name, along = function.__name__, getattr(function, _MARK)

    def call(dispatch: Callable[..., Any], input: Tensor, **others: Any) -> Any:
        dims = others.get("dim", along)
        if dims is not None:
            several = isinstance(dims, tuple)
            found = tuple(_of_values(name, d, input) for d in (dims if several else (dims,)))
            if "dim" in others:
                others["dim"] = found if several else found[0]
        return _as_rows(dispatch(input.values(), **others), input)

    return call


def _of_values(name: str, dim: int, input: Tensor) -> int:
    """Return the dimension of the values, which have none for the batch, that is ``dim`` of the jagged tensor."""
    n = input.dim()
    if not -n <= dim < n:
        message = wrong(name, f"a dim of {shape(input)}", dim, "count from 0, or back from -1")
        raise IndexError(message)
    if dim % n in (0, input._ragged_idx):  # pyright: ignore[reportAttributeAccessIssue]
        _refuse(name, dim, input)
    return dim % n - 1


def _refuse(name: str, dim: int, input: Tensor) -> NoReturn:
    kind = "the batch's" if dim % input.dim() == 0 else "the ragged one"
    rule = f"a dim that all rows of {shape(input)} have alike"
    advice = "pad it (to_padded_tensor), or take its rows one by one (unbind)"
    raise RuntimeError(wrong(name, rule, f"{dim}, {kind}", advice))


def _as_rows(values: Tensor, like: Any) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(
        values,
        like._offsets,
        like._lengths,
        like._ragged_idx,
        like._maybe_min_seqlen,
        like._maybe_max_seqlen,
    )
