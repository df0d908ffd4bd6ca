"""Where an op remembers how its output is made again; ``recompute`` reads it. Nothing is noted while nobody asks.

A :class:`Note` stands on the node that autograd made for the call. It holds no tensor of any size: an argument that the
node saves is named by its place among the saved ones, another by the edge of the graph it came along.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple
from weakref import ReferenceType

import torch
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._autocast import autocasts

__all__ = ["Edge", "Note", "Saved", "asked", "noting", "sharded", "version_only"]

asked = 0  # how many scopes that want notes are open, in all threads
sharded = False  # whether parameters may be freed between forward and backward, as FSDP does

# An argument that nobody else keeps (a frozen bias), or that is sharded, is copied if it is at most this share of the
# output.
_COPIED_SHARE = 1 / 64


class Saved(NamedTuple):
    """An argument that the node saves for backward, by its place among the saved tensors."""

    place: int


class Edge(NamedTuple):
    """An argument that another node made, by its place among the node's next functions; as it was when it was read."""

    place: int
    version: int
    storage: int
    dtype: torch.dtype
    device: torch.device


@dataclass(slots=True)
class Note:
    """How a node's first output is made again.

    Attributes:
        again: Called with the arguments, the tensors among them filled in, it gives the output, or a tuple that starts
            with it.
        arguments: Of the call; a tensor is :class:`Saved`, :class:`Edge`, or a small copy. ``None`` where one is none
            of these: the output cannot be made again.
        over: As ``again``, but writes the output over its first argument; ``None`` where the op has no ``inplace``.
        flops: Floating-point operations that making it again takes; 0 for what is cheap.
        version: Of the output, as the call left it.
        storage: Of the output.
        geometry: Size, stride and offset of the output.
        device: Type of the output's device.
        witness: Shares the output's version counter, and no memory: tells whether the output was written to since.
        autocast: Autocast's dtype, where it was on.
        item: What ``recompute`` keeps for the output.
    """

    again: Callable[..., Any]
    arguments: tuple[Any, ...] | None
    over: Callable[..., Any] | None
    flops: int
    version: int
    storage: int
    geometry: tuple[torch.Size, tuple[int, ...], int]
    device: str
    witness: Tensor
    autocast: torch.dtype | None
    item: "ReferenceType[Any] | None" = None


def noting(
    function: type[Function],
    again: Callable[..., Any],
    flops: Callable[..., int] | None,
) -> type[Function]:
    """Return ``function`` as a class whose nodes carry a :class:`Note`.

    Args:
        function: With ``setup_context``.
        again: Takes the arguments of ``function.forward``, and has no side effect. ``inplace`` is passed as ``False``,
            and ``None`` what it calls ``_``-something: it does not read that. Where it takes more, those are the
            outputs behind the first; ``None`` for one that the node doesn't save.
        flops: Takes the same arguments; ``None`` for what is cheap.
    """
    names = list(signature(function.forward).parameters)  # pyright: ignore[reportArgumentType]
    in_place = names.index("inplace") if "inplace" in names else None
    wanted = list(signature(again).parameters)
    unread = [name.startswith("_") for name in wanted[: len(names)]]
    unread += [False] * (len(names) - len(unread))
    takes_outputs = len(wanted) > len(names)

    def over(*args: Any) -> Any:
        return again(*args[:in_place], True, *args[in_place + 1 :])  # pyright: ignore[reportOptionalOperand]

    over_or_none = None if in_place is None else over

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        function.setup_context(ctx, inputs, output)
        first = output if isinstance(output, Tensor) else output[0]
        saved = ctx.to_save or ()
        written = in_place is not None and bool(inputs[in_place])
        arguments: list[Any] | None = []
        edges = 0
        for place, value in enumerate(inputs):
            if not isinstance(value, Tensor):
                arguments.append(False if place == in_place else value)
                continue
            argument = None
            if not unread[place]:
                argument = _argument(value, edges, saved, first, written and not edges)
                if argument is None:
                    arguments = None
                    break
            edges += 1
            arguments.append(argument)
        if takes_outputs and arguments is not None:
            places = {id(t): Saved(i) for i, t in enumerate(saved)}
            arguments += [places.get(id(t)) for t in output[1:]]
        device = first.device.type
        ctx.note = Note(
            again,
            None if arguments is None else tuple(arguments),
            over_or_none,
            0 if flops is None else flops(*inputs),
            first._version + written,  # mark_dirty raises it once more, after this
            first.untyped_storage()._cdata,
            (first.size(), first.stride(), int(first.storage_offset())),
            device,
            version_only(first),
            torch.get_autocast_dtype(device) if autocasts(device) else None,
        )

    return type(function.__name__, (function,), {"setup_context": staticmethod(setup_context)})


def _argument(
    t: Tensor, edge: int, saved: tuple[Tensor | None, ...], output: Tensor, written: bool
) -> Saved | Edge | Tensor | None:
    """Return how the tensor argument ``t`` is found again; ``written`` where the call wrote the output into it."""
    if not written:
        if sharded and type(t) is nn.Parameter and _is_small(t, output):
            return t.detach().clone()
        for place, other in enumerate(saved):
            if other is t:
                return _SAVED[place]
    if t.requires_grad:
        # The call itself has raised the version of what it wrote to.
        storage = t.untyped_storage()._cdata
        return Edge(edge, t._version - written, storage, t.dtype, t.device)
    return t.detach().clone() if not written and _is_small(t, output) else None


def _is_small(t: Tensor, output: Tensor) -> bool:
    return t.numel() <= output.numel() * _COPIED_SHARE


_SAVED = [Saved(place) for place in range(64)]
_EMPTY: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def version_only(t: Tensor) -> Tensor:
    """Return a tensor that shares the version counter of ``t`` and holds none of its memory."""
    key = (t.device, t.dtype)
    empty = _EMPTY.get(key)
    if empty is None:
        empty = torch.empty(0, device=t.device, dtype=t.dtype)
        if type(empty) is Tensor:  # not a mode's, which makes fake ones
            _EMPTY[key] = empty
    alias = t.detach()
    alias.data = empty
    return alias
