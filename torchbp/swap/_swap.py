"""convert() and revert(): which torchbp layer takes the place of which torch layer, in a model that is already built.

A layer, torch's or one that transformers writes itself, is swapped by its class alone: ``layer.__class__ =
torchbp.nn.Linear``. Parameters, buffers, hooks and every reference to the layer or its parameters (an optimizer's,
say) stay what they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.parametrize import is_parametrized

from torchbp.ops._op import all_ops
from torchbp.swap import _transformers
from torchbp.swap._fused_loss import separate_loss

__all__ = ["Report", "convert", "report", "revert", "twins"]

M = TypeVar("M", bound=nn.Module)


@cache
def twins() -> dict[type[nn.Module], type[nn.Module]]:
    """Return torchbp's class for each class of torch that has one."""
    ours = [module for op in all_ops().values() for module in op.modules]
    return {
        theirs: module
        for module in ours
        if (theirs := module.__mro__[1]) is getattr(nn, module.__name__, None)
    }


@dataclass(frozen=True)
class Report:
    """What of a model computes with hand-written backward passes. ``print`` it.

    Attributes:
        hand_written: Name and class of each torchbp layer.
        convertible: Name and class of each torch layer that :func:`convert` would take.
        left: Name, class and reason of each layer that :func:`convert` leaves as it is.
    """

    hand_written: tuple[tuple[str, str], ...]
    convertible: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str, str], ...]

    def __str__(self) -> str:
        width = max(
            (len(row[0]) for row in (*self.hand_written, *self.convertible, *self.left)), default=0
        )
        ours, theirs, left = len(self.hand_written), len(self.convertible), len(self.left)
        lines = [
            f"{ours} layers are torchbp's, {theirs} can be converted, {left} stay torch's own",
        ]
        lines += [f"  {name:{width}}  {kind}" for name, kind in self.hand_written]
        lines += [
            f"  {name:{width}}  {kind}: torch's; convert() takes it"
            for name, kind in self.convertible
        ]
        lines += [f"  {name:{width}}  {kind}: {reason}" for name, kind, reason in self.left]
        return "\n".join(lines)


def convert(model: M) -> M:
    """Give every layer of ``model`` that has a hand-written twin that twin's class, in place.

    Layers of torch.nn, and the activations and RMS norms that transformers writes itself.

    Values, gradients (to rounding), ``state_dict``, hooks, parameters and optimizers that hold them stay. Calling it
    twice is calling it once. :func:`report` tells what was, or would be, converted, and what was not and why.

    Args:
        model: Any module; its own class is converted too. Convert before ``fully_shard``.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: ``model`` is sharded already.

    Example:
        >>> import torch, torchbp
        >>> model = torchbp.convert(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU()))
        >>> type(model[0])
        <class 'torchbp.nn.Linear'>
        >>> model
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
          (1): ReLU()
        )
    """
    return _swap(model, _twin, "convert")


def revert(model: M) -> M:
    """Undo :func:`convert` and :func:`fuse_loss`: every torchbp layer of ``model`` becomes torch's again, in place.

    Layers that were built as torchbp's become torch's too.

    Args:
        model: Any module.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: ``model`` is sharded already.

    Example:
        >>> import torch, torchbp
        >>> type(torchbp.revert(torchbp.nn.Linear(4, 3)))
        <class 'torch.nn.modules.linear.Linear'>
    """
    _swap(model, _original, "revert")
    separate_loss(model)
    return model


def report(model: nn.Module) -> Report:
    """Tell which layers of ``model`` are torchbp's, which :func:`convert` would take, and why it leaves the others.

    Args:
        model: Any module; it is not changed.

    Returns:
        The report; containers, which compute nothing themselves, are left out.

    Example:
        >>> import torch
        >>> from torchbp.swap import report
        >>> print(report(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Conv2d(1, 1, 3))))
        0 layers are torchbp's, 1 can be converted, 1 stay torch's own
          0  Linear: torch's; convert() takes it
          1  Conv2d: has no hand-written twin
    """
    ours = {module for op in all_ops().values() for module in op.modules}
    hand_written, convertible, left = [], [], []
    for name, module in model.named_modules():
        kind = type(module)
        if _without_parametrizations(module) in ours or _transformers.original(module) is not None:
            hand_written.append((name, kind.__name__))
        elif (reason := _reason_to_leave(module)) is None:
            convertible.append((name, kind.__name__))
        elif reason:
            left.append((name, kind.__name__, reason))
    return Report(tuple(hand_written), tuple(convertible), tuple(left))


def _reason_to_leave(module: nn.Module) -> str | None:
    """Return why a layer is not converted; ``None`` where it is, ``""`` for a container."""
    kind = type(module)
    if _twin(module) is not None:
        return "its forward was replaced on the instance" if "forward" in vars(module) else None
    base = next((c for c in kind.__mro__ if c in twins()), None)
    if base is not None:
        return f"a subclass of {base.__name__}, with behaviour of its own"
    own = next(module.parameters(recurse=False), None) is not None
    is_leaf = own or next(module.children(), None) is None
    return "has no hand-written twin" if is_leaf else ""


def _twin(module: nn.Module) -> type[nn.Module] | None:
    """Return torchbp's class for a layer of torch's or of transformers'."""
    return twins().get(type(module)) or _transformers.twin(module)


def _original(module: nn.Module) -> type[nn.Module] | None:
    """Return the class that a torchbp layer takes the place of."""
    kind = _originals().get(_without_parametrizations(module))
    if kind is not None and is_parametrized(module):
        # The class of torch's making holds the properties of the parametrized; copies of the layer share it.
        own = {k: v for k, v in vars(type(module)).items() if k not in {"__dict__", "__weakref__"}}
        return type(type(module).__name__, (kind,), own)
    return kind or _transformers.original(module)


def _without_parametrizations(module: nn.Module) -> type[nn.Module]:
    """Return a layer's class, or that over which ``torch.nn.utils.parametrize`` has put one of its own."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


@cache
def _originals() -> dict[type[nn.Module], type[nn.Module]]:
    return {ours: theirs for theirs, ours in twins().items()}


def _swap(model: M, other: Callable[[nn.Module], type[nn.Module] | None], verb: str) -> M:
    if not isinstance(model, nn.Module):
        message = (
            f"{verb}: expected a torch.nn.Module, got {type(model).__name__}; pass the model itself"
        )
        raise TypeError(message)
    if any(isinstance(m, FSDPModule) for m in model.modules()):
        # Its layers have classes of FSDP's making: another class would silently drop the sharding.
        message = f"{verb}: expected a model that is not sharded, got one after fully_shard; {verb} it first"
        raise RuntimeError(message)
    for module in list(model.modules()):
        kind = None if "forward" in vars(module) else other(module)
        if kind is not None:
            module.__class__ = kind
    return model
