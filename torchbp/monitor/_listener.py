"""Where layers are listened to: their outputs, what comes back to them, and the activation behind.

All of it hangs on two module hooks for every module of the process, which are there in sampled steps
only. The model itself carries no module hook: it can be copied, pickled and saved at any time.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from torchbp.monitor._catalogue import Catalogue
from torchbp.monitor._quantity import Quantity
from torchbp.monitor._registry import all_quantities
from torchbp.monitor._row import Row

__all__ = ["Listener"]

_MODULES: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh"}
_WINDOW_SAMPLES, _WINDOW_STEPS = 1024, 10


class Listener:
    """Fills rows with what is seen of the layers.

    Args:
        model: The model; held weakly.
        catalogue: Its layers.
        row: Gives the row of the step under way.

    Attributes:
        batch: Length of the first tensor that the model was called with last.
    """

    def __init__(self, model: nn.Module, catalogue: Catalogue, row: Callable[[], Row]) -> None:
        self.batch = 1
        self._model = weakref.ref(model)
        self._catalogue = catalogue
        self._row = row
        self._hooks: list[RemovableHandle] = []
        self._last: int | None = None  # the layer that ran last
        self._told: set[int] = set()  # layers whose activation was seen in this forward
        self._ran: set[int] = set()  # layers that ran in this forward outside a backward
        self._windows: dict[int, tuple[Tensor, int, int]] = {}
        quantities = all_quantities().values()
        self._error = next(q for q in quantities if q.at == "error")
        self._outputs = [q for q in quantities if q.at == "output"]
        self._activations = [q for q in quantities if q.at == "activation"]
        (self._units,) = (q for q in quantities if q.at == "units")

    def listen(self, on: bool) -> None:
        """Set the hooks, or take them away."""
        if on and not self._hooks:
            self._hooks = [
                register_module_forward_pre_hook(self._before_forward),
                register_module_forward_hook(self._after_forward),
            ]
        elif not on:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

    def _before_forward(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        if module is self._model():
            if not _in_backward():
                self._last = None
                self._told, self._ran = set(), set()
                tensors = (t for t in inputs if isinstance(t, Tensor) and t.ndim)
                self.batch = next((t.shape[0] for t in tensors), self.batch)
            return
        place = self._catalogue.place(module)
        if place is None:
            return
        if self._is_recomputed(place):
            self._last = None
        if self._awaits_activation():
            given = inputs[0] if inputs else None
            function = _function_of(given) if isinstance(given, Tensor) else None
            if function is not None:
                self._note_activation(given, function)

    def _after_forward(self, module: nn.Module, _: object, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        place = self._catalogue.place(module)
        if place is None:
            function = next((f for kind, f in _MODULES.items() if isinstance(module, kind)), None)
            takes_part = isinstance(output, Tensor) and output.requires_grad
            if function and takes_part and self._awaits_activation():
                self._note_activation(output, function)
            return
        self._catalogue.note_run(place)
        tensor = _first_tensor(output)
        if tensor is None or not tensor.requires_grad:
            return
        if self._is_recomputed(place):
            return
        if not _in_backward():
            self._ran.add(place)
        self._last = place
        self._told.discard(place)
        row = self._row()
        self._listen_to_error(row, place, tensor)
        with torch.no_grad():
            for quantity in self._outputs:
                row.add(quantity.name, place, _measured(quantity, tensor), tensor.numel())

    def _awaits_activation(self) -> bool:
        return self._last is not None and self._last not in self._told

    def _is_recomputed(self, place: int) -> bool:
        """Whether checkpointing runs the layer once more, inside backward.

        Its reentrant form runs it without autograd at first; then this is the run that counts.
        """
        return _in_backward() and place in self._ran

    def _listen_to_error(self, row: Row, place: int, output: Tensor) -> None:
        batch, quantity = self.batch, self._error

        def note(delta: Tensor) -> None:
            with torch.no_grad():
                total = _measured(quantity, delta)
            row.add(quantity.name, place, total, delta.numel(), batch)

        output.register_hook(note)

    def _note_activation(self, output: Any, function: str) -> None:
        place = self._last
        assert place is not None
        self._told.add(place)
        row = self._row()
        with torch.no_grad():
            values = output.detach()
            for quantity in self._activations:
                total = _measured(quantity, values, function)
                if total is not None:
                    row.add(quantity.name, place, total, values.numel())
            alive = _measured(self._units, values, function)
            if alive is not None:
                self._note_units(row, place, alive, values.numel() // max(alive.numel(), 1))

    def _note_units(self, row: Row, place: int, alive: Tensor, samples: int) -> None:
        before, seen, steps = self._windows.get(place, (alive, 0, 0))
        if before.shape != alive.shape:
            before, seen, steps = alive, 0, 0
        alive, seen, steps = before | alive, seen + samples, steps + 1
        self._windows[place] = (alive, seen, steps)
        if seen >= _WINDOW_SAMPLES and steps >= _WINDOW_STEPS:
            dead = (~alive).sum(dtype=torch.float32)
            row.add(self._units.name, place, dead, alive.numel())
            del self._windows[place]


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # noqa: SLF001


def _measured(quantity: Quantity, *values: Any) -> Any:
    assert quantity.measure is not None
    return quantity.measure(*values)


def _function_of(tensor: Tensor) -> str | None:
    """Return which activation made the tensor: torch's, or a Function that bears its name."""
    node = tensor.grad_fn
    name = "" if node is None else node.name().lower()
    return next((f for f in _MODULES.values() if name.startswith(f"{f}backward")), None) or next(
        (f for f in _MODULES.values() if name.startswith(f"{f}functionbackward")), None
    )


def _first_tensor(output: Any) -> Tensor | None:
    """Return the layer's output proper: an LSTM's is the first of a tuple."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    parts = list(output.values()) if isinstance(output, dict) else output
    if isinstance(parts, (tuple, list)):
        return next((t for t in parts if isinstance(t, Tensor) and t.requires_grad), None)
    return None
