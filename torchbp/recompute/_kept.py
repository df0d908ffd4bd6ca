"""What stands in the graph for a tensor that an op wants for backward: the tensor, or how it is made again.

Autograd's own check, that nobody wrote to a saved tensor, is off where there are saved-tensor hooks: it is made here.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from torchbp.ops._autocast import autocasts
from torchbp.ops._recipe import version_only

__all__ = ["Kept", "Made", "Recipe", "Share"]


class Kept:
    """A tensor that is kept as it is, with the version it had, and whether it is a parameter.

    Args:
        tensor: To be kept.
        whole: What is kept for the output of which it is a view.
        itself: Whether it is a parameter, kept as autograd keeps it: if its data is exchanged before backward, that is
            what backward gets.
    """

    __slots__ = (
        "__weakref__",
        "data",
        "itself",
        "parameter",
        "required",
        "tensor",
        "version",
        "whole",
    )

    def __init__(self, tensor: Tensor, whole: "Kept | None" = None, itself: bool = False) -> None:
        self.whole, self.itself = whole, itself
        self.data = tensor.untyped_storage()._cdata if itself else 0
        self.parameter = type(tensor) is nn.Parameter
        self.required = tensor.requires_grad
        # Detached: a saved output would hold its own node, which holds this.
        self.tensor = tensor if itself else tensor.detach()
        self.version = None if tensor.is_inference() else tensor._version

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.tensor.numel() * self.tensor.element_size()

    @property
    def storage(self) -> int:
        """Which storage it stands in."""
        return self.tensor.untyped_storage()._cdata

    def untouched(self) -> bool:
        """Whether nobody wrote to it since."""
        return self.version is None or self.tensor._version == self.version

    def part(self) -> "Kept | None":
        """Return what a recipe takes it for: what it is now, whatever becomes of a parameter's data later.

        ``None`` where it was written to, or has other data already: freed by who shards it, say.
        """
        if not self.itself:
            return self
        return Kept(self.tensor) if self.untouched() and self.storage == self.data else None

    def open(self) -> Tensor:
        """Return the tensor; raise as autograd does if it was changed in place."""
        if not self.untouched():
            raise _changed(self.tensor, self.tensor._version, self.version)
        return self.tensor


class Recipe:
    """A call that makes an output again.

    Args:
        call: Gives the output, or a tuple that starts with it.
        arguments: Of the call: what is :class:`Kept`, a :class:`Share` of what is made, a :class:`Recipe` of what
            nobody saves, or no tensor.
        autocast: Autocast's dtype, where it was on as the output was made first.
        device: Type of the output's device.
        flops: Floating-point operations of the call; 0 for a cheap one.
        over: The same call, writing the output over its first argument; ``None`` where there is none.
    """

    __slots__ = ("arguments", "autocast", "call", "device", "flops", "over", "steps")

    def __init__(
        self,
        call: Callable[..., Any],
        arguments: tuple[Any, ...],
        autocast: torch.dtype | None,
        device: str,
        flops: int = 0,
        over: Callable[..., Any] | None = None,
    ) -> None:
        self.call, self.arguments, self.autocast, self.device = call, arguments, autocast, device
        self.over = over
        self.steps, self.flops = 1, flops  # of the whole chain; steps are calls
        for a in arguments:
            if type(a) is Share:
                self.steps += a.made.recipe.steps
            elif type(a) is Recipe:
                self.steps += a.steps
                self.flops += a.flops

    def open(self) -> Tensor:
        """Return the output, made again."""
        arguments = [a.open() if type(a) in _OPENED else a for a in self.arguments]
        if self.flops:
            arguments = list(map(_requiring, arguments, self.arguments))
        call = self.call
        if (
            self.over is not None
            and type(self.arguments[0]) is Recipe
            and _fits(arguments)
            and not self.arguments[0].hands_on(arguments[0])
        ):
            # Its first argument was made just now, for it alone. What a cheap op takes is memory's time, most of all
            # where memory is fresh: in place a ReLU is six times as fast.
            call = self.over
        dtype = self.autocast
        with torch.no_grad():
            if dtype or autocasts(self.device):
                with torch.autocast(self.device, dtype, dtype is not None, cache_enabled=False):
                    made = call(*arguments)
            else:
                made = call(*arguments)
        return made if isinstance(made, Tensor) else made[0]

    def hands_on(self, output: Tensor) -> bool:
        """Whether ``output``, which this gave, stands in an argument's memory, which others need."""
        storage = output.untyped_storage()._cdata
        for a in self.arguments:
            if type(a) is Recipe:
                if a.hands_on(output):
                    return True
            elif type(a) in _OPENED:
                held = a.tensor if type(a) is Kept else a.made.made
                if held is not None and held.untyped_storage()._cdata == storage:
                    return True
        return False


class Made:
    """An output that was let go: made again when backward needs it, once for all who share it.

    Args:
        output: The tensor that is let go, a whole dense storage.
        recipe: Of it.
        witness: As :func:`version_only` gives it for the output.
    """

    __slots__ = (
        "__weakref__",
        "made",
        "made_version",
        "nbytes",
        "recipe",
        "size",
        "storage",
        "stride",
        "users",
        "version",
        "witness",
    )

    def __init__(self, output: Tensor, recipe: Recipe, witness: Tensor | None) -> None:
        self.recipe = recipe
        self.size, self.stride = output.size(), output.stride()
        self.nbytes = output.numel() * output.element_size()
        self.version, self.storage = output._version, output.untyped_storage()._cdata
        self.witness = version_only(output) if witness is None else witness
        self.users = 0  # shares alive
        self.made: Tensor | None = None
        self.made_version = 0

    def untouched(self) -> bool:
        """Whether nobody wrote to the output since."""
        return self.witness._version == self.version

    def open(self) -> Tensor:
        """Return the output, made again unless another who needs it had it made in this backward."""
        made = self.made
        if made is None:
            made = self.recipe.open()
            if made.stride() != self.stride:
                strided = torch.empty_strided(
                    self.size, self.stride, dtype=made.dtype, device=made.device
                )
                made = strided.copy_(made)
            if self.users > 1 and _let_go_later(self):  # this goes when the last of them is done
                self.made, self.made_version = made, made._version
        elif made._version != self.made_version:  # by somebody's backward
            raise _changed(made, made._version, self.made_version)
        return made


class Share:
    """What one node keeps of a :class:`Made`: the output or a view of it.

    Args:
        made: Of which.
        view: The view, whose geometry is taken; ``None`` for the output itself.
        checked: Whether the output must not have been written to, as is asked of what a node saves; a part of another
            is made again from what it was made of, whatever became of it.
    """

    __slots__ = ("__weakref__", "checked", "made", "offset", "size", "stride")

    def __init__(self, made: Made, view: Tensor | None, checked: bool) -> None:
        made.users += 1
        self.made, self.checked = made, checked
        if view is None:
            self.size, self.stride, self.offset = made.size, made.stride, 0
        else:
            self.size, self.stride = view.size(), view.stride()
            self.offset = view.storage_offset()

    def __del__(self) -> None:
        self.made.users -= 1

    def part(self) -> "Share":
        """Return the same as a part of another."""
        share = Share(self.made, None, checked=False)
        share.size, share.stride, share.offset = self.size, self.stride, self.offset
        return share

    def open(self) -> Tensor:
        """Return the tensor, made again; raise as autograd does if it, or what it is made of, was changed in place."""
        made = self.made
        if self.checked and not made.untouched():
            raise _changed(made.witness, made.witness._version, made.version, made.size)
        tensor = made.open()
        if self.size == tensor.size() and self.stride == tensor.stride():
            return tensor
        return tensor.as_strided(self.size, self.stride, self.offset + tensor.storage_offset())


_OPENED = (Kept, Share, Recipe)


def _requiring(value: Any, part: Any) -> Any:
    """Return an argument of a product, requiring grad as it did: torch picks the kernel of ``F.linear`` by that."""
    if type(part) not in _OPENED or (type(part) is Kept and not part.required):
        return value
    return value.detach().requires_grad_()


def _fits(arguments: list[Any]) -> bool:
    """Whether the first argument has the size and dtype of what a call on all of them gives."""
    first, *others = (a for a in arguments if isinstance(a, Tensor))
    dtypes = (first.dtype, torch.bool)  # a mask
    return all(a.size() == first.size() and a.dtype in dtypes for a in others)


class _Backward(threading.local):
    """The backward that runs in this thread, and what holds its output in it for who needs it next."""

    def __init__(self) -> None:
        self.task = -1
        self.holding: list[ReferenceType[Made]] = []


_backward = _Backward()


def _let_go_later(made: Made) -> bool:
    """Whether a backward runs, at whose end ``made`` lets its output go: with retain_graph the shares live on."""
    task = torch._C._current_graph_task_id()
    if task == -1:
        return False
    if task != _backward.task:
        _backward.task, _backward.holding = task, []
        Variable._execution_engine.queue_callback(partial(_let_go, _backward.holding))
    _backward.holding.append(ref(made))
    return True


def _let_go(holding: list[ReferenceType[Made]]) -> None:
    for found in holding:
        if (made := found()) is not None:
            made.made = None


def _changed(
    t: Tensor, version: int, expected: int | None, size: torch.Size | None = None
) -> RuntimeError:
    """Return the error that autograd raises for a saved tensor that was written to."""
    shape = list(t.size() if size is None else size)
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{t.type()} {shape}] is at version {version}; expected version {expected} instead. "
        "Hint: write out of place, or clone the tensor before the op that needs it."
    )
