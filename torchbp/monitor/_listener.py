"""Where layers are listened to: their outputs, what comes back to them, and the activation behind.

All of it hangs on a module hook for every module of the process, which is there in sampled steps only.
The model itself carries no module hook: it can be copied, pickled and saved at any time.
"""

import time
import weakref
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from torchbp.monitor._backwards import graph_task, is_captured
from torchbp.monitor._catalogue import Catalogue
from torchbp.monitor._heard import Forward, Heard
from torchbp.monitor._row import Row

__all__ = ["Listener"]

# A module's place among the layers, the activation it is, and whether it is the model.
_Role = tuple[Callable[[], nn.Module | None], int | None, str | None, bool]
_NONE: _Role = (lambda: None), None, None, False

_SILENT = (
    "the model runs without its layers: it is scripted, a CUDA graph has captured them, or their parameters are read "
    "by another module, as a ParameterList's are"
)

_is_compiling = torch.compiler.is_compiling

_MODULES: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh"}


class Listener:
    """Fills rows with what is seen of the layers.

    Args:
        model: The model; held weakly.
        catalogue: Its layers.
        row: Gives the row of the step under way.

    Attributes:
        deaf: Why no layer was heard though the model ran, if so.
    """

    def __init__(self, model: nn.Module, catalogue: Catalogue, row: Callable[[], Row]) -> None:
        self.deaf = ""
        self._model = weakref.ref(model)
        self._catalogue = catalogue
        self._row = row
        self._recurs = any(isinstance(module, nn.RNNBase) for module in model.modules())
        self._hooks: list[RemovableHandle] = []
        self._roles: dict[int, _Role] = {}
        self._heard = Heard()
        self._forward = Forward(row(), over=True)

    @property
    def batch(self) -> int | None:
        """Size of the last batch that was listened to: the length of the first tensor the model got.

        Or of its second dimension, where a recurrent or an attention layer has a batch of so many.
        """
        return self._forward.batch or None

    @property
    def own_time(self) -> float:
        """Seconds spent in hooks so far."""
        return self._heard.own_time

    def listen(self, on: bool) -> None:
        """Set the hooks, or take them away."""
        self._heard.forget()
        self._forward.over = True
        if on and not self._hooks:
            self._hooks = [register_module_forward_hook(self._after_forward)]
            if self._recurs:
                before: Any = self._before_forward  # torch's annotation leaves out what it returns
                self._hooks.append(register_module_forward_pre_hook(before))
        elif not on:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

    def close(self) -> None:
        """Take the hooks away, and measure and let go what is left."""
        self.listen(False)
        self._heard.measure()
        self._heard.windows = {}

    def settle(self) -> None:
        """Measure what was heard, now that a backward has ended."""
        self._heard.settle()

    def measure(self) -> None:
        """Measure what was only copied so far."""
        self._heard.measure()

    def forget(self) -> None:
        """Drop what was heard since the backward before."""
        self._heard.forget()

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Listen to what comes back to the time steps of a recurrent layer's input."""
        if not isinstance(module, nn.RNNBase) or _is_compiling() or is_captured():
            return None
        place = self._catalogue.place(module)
        sequence = args[0] if args else None
        if place is None or not isinstance(sequence, Tensor) or not torch.is_grad_enabled():
            return None
        # Of its own, so that what other layers do with the sequence doesn't count; raw data gets
        # a gradient for this once.
        own = sequence.view_as(sequence) if sequence.requires_grad else sequence.detach()
        own.requires_grad_()
        row, heard = self._row(), self._heard
        dim = 1 if module.batch_first and own.ndim == 3 else 0
        own.register_hook(lambda delta: heard.times(row, place, delta, dim))
        return (own, *args[1:])

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if _is_compiling() or is_captured():  # nothing is computed, and later replays are silent
            return
        start = time.perf_counter()
        self._hear(module, args, output)
        self._heard.own_time += time.perf_counter() - start

    def _hear(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        reference, place, function, whole = self._roles.get(id(module)) or _NONE
        if reference() is not module:
            place, function, whole = self._learn(module)
        if place is not None:
            self._after_layer(module, place, args, output)
        elif function and isinstance(output, Tensor) and output.requires_grad:
            self._note_function(output, function)
        if whole and graph_task() == -1:
            self._end_forward(args)

    def _learn(self, module: nn.Module) -> tuple[int | None, str | None, bool]:
        """Remember what the module is: a layer, an activation, the model, or of no interest."""
        whole, place = module is self._model(), self._catalogue.place(module)
        role = place, _function_of_module(type(module)), whole
        self._roles[id(module)] = weakref.ref(module), *role
        return role

    def _after_layer(
        self, module: nn.Module, place: int, args: tuple[Any, ...], output: Any
    ) -> None:
        forward, again = self._forward, graph_task() != -1
        if forward.over and not again:
            self._heard.forget()  # what is left is of a backward that failed
            forward = self._forward = Forward(self._row())
        given = args[0] if args and isinstance(args[0], Tensor) else None
        if again and place in forward.ran:
            # Checkpointing runs it once more. (Its reentrant form runs it without autograd at
            # first; then this is the run that counts.)
            forward.last = None
            return
        if given is not None:
            function = _function_of(given)
            if function is not None:
                self._note_function(given, function)
            forward.shape = forward.shape or tuple(given.shape)
            first = getattr(module, "batch_first", None)
            if given.ndim == 3 and isinstance(first, bool):
                forward.samples = given.shape[0 if first else 1]
        self._note_run(place)
        tensor = _first_tensor(output)
        if tensor is None or not tensor.requires_grad:
            return
        if not again:
            forward.ran.add(place)
        forward.last = place
        forward.told.discard(place)
        call = forward.calls[place] = forward.calls.get(place, -1) + 1
        heard = self._heard
        tensor.register_hook(partial(heard.delta, forward, place, call, True))
        if isinstance(module, nn.LSTMCell):  # the gradient through time comes by its second output
            output[1].register_hook(partial(heard.delta, forward, place, call, False))
        if forward.row.rare:
            heard.output(forward.row, place, tensor)

    def _note_run(self, place: int) -> None:
        self._catalogue.note_run(place)
        if torch.is_grad_enabled():  # or it is an evaluation between steps
            row = self._forward.row
            row.ran = row.ran or set()
            row.ran.add(place)

    def _note_function(self, output: Tensor, function: str) -> None:
        forward = self._forward
        known = forward.activations.get(id(output))
        if known is not None and known() is output:
            return  # the layer that ran last is another one behind the same activation
        forward.activations[id(output)] = weakref.ref(output)
        if forward.last is not None and forward.last not in forward.told:
            forward.told.add(forward.last)
            self._heard.function(forward.row, forward.last, function, output)

    def _end_forward(self, args: tuple[Any, ...]) -> None:
        if self._forward.over:  # no layer of it ran
            if torch.is_grad_enabled():
                self.deaf = _SILENT
            return
        self.deaf = ""
        tensors = (t for t in args if isinstance(t, Tensor) and t.ndim)
        self._forward.shape = next((tuple(t.shape) for t in tensors), self._forward.shape)
        self._forward.over = True


@cache
def _function_of_module(kind: type[nn.Module]) -> str | None:
    return next((f for activation, f in _MODULES.items() if issubclass(kind, activation)), None)


def _function_of(tensor: Tensor) -> str | None:
    """Return which activation made the tensor: torch's, or a Function that bears its name."""
    node = tensor.grad_fn
    return None if node is None else _function_named(node.name())


@cache
def _function_named(node: str) -> str | None:
    name, functions = node.lower(), _MODULES.values()
    return next(
        (f for f in functions if name.startswith((f"{f}backward", f"{f}functionbackward"))), None
    )


def _first_tensor(output: Any) -> Tensor | None:
    """Return the layer's output proper: an LSTM's is the first of a tuple."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    parts = list(output.values()) if isinstance(output, dict) else output
    if isinstance(parts, (tuple, list)):
        return next((t for t in parts if isinstance(t, Tensor) and t.requires_grad), None)
    return None
