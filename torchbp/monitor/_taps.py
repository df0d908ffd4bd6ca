"""Where the layers of a compiled model are listened to, without a graph break.

``torch.compile`` takes module hooks into its graph where they are there before the model's first call,
and ignores later ones. A hook here asks a flag of Python's: the model is compiled twice, as it is and
listening, and a step that is not sampled runs the former.

What comes back to a layer's output can't be written down inside a compiled backward. It is handed out
as a gradient: a tap returns its layer's output together with a leaf s that has no influence on it, and
calls (Σ δ², n, n·B) the gradient of s. Activations are counted into buffers.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from torchbp.monitor._catalogue import Catalogue
from torchbp.monitor._quantity import Quantity, precise
from torchbp.monitor._registry import all_quantities
from torchbp.monitor._row import Row

__all__ = ["Taps", "is_compiled"]

_FUNCTIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh"}
_WINDOW_SAMPLES, _WINDOW_STEPS = 1024, 10
_COMPILED = (
    "the model had been compiled and called before it was watched; watch it before its first call"
)
_UNITS = ("out_features", "out_channels", "num_features")


class _TapFunction(torch.autograd.Function):
    """The identity in z; the gradient of s is (Σ δ², n, n·B)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, s: Tensor, batch: int) -> Tensor:
        ctx.batch, ctx.dtype = batch, s.dtype
        return z.clone()  # not a view, which must not be changed in place: relu_() may follow

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (delta,) = grads
        size = delta.numel()
        square = delta.to(ctx.dtype).square().sum()
        sizes = square.new_full((), size), square.new_full((), size * ctx.batch)
        told = torch.stack((square, *sizes))
        return delta, told, None


class _Switch:
    """Shared by all taps of a model: whether to listen, and the layer that ran last."""

    def __init__(self) -> None:
        self.on = False
        self.last = -1


class _Hook:
    """A forward hook that copies and pickles of the model carry without effect."""

    def __init__(self, switch: _Switch) -> None:
        self.switch = switch

    def __deepcopy__(self, _: Any) -> Any:
        return _nothing

    def __reduce__(self) -> str:
        return "_nothing"


def _nothing(*_: Any) -> None:
    """Do nothing."""


class _Layer(_Hook):
    """The tap of a layer.

    Attributes:
        leaf: s.
        totals: By quantity of outputs, the sum so far.
        alive: bool ``(units,)``: those that were positive behind a ReLU.
        seen: The number of samples of a unit.
        counts: Saturated activations, and all.
    """

    def __init__(self, switch: _Switch, place: int, module: nn.Module) -> None:
        super().__init__(switch)
        weight = next(module.parameters(recurse=False))
        self.place = place
        self.leaf = weight.new_zeros(3, dtype=precise(weight), requires_grad=True)
        units = next((getattr(module, name) for name in _UNITS if hasattr(module, name)), 0)
        self.alive = torch.zeros(units, dtype=torch.bool, device=weight.device)
        self.seen = weight.new_zeros((), dtype=torch.float32)
        self.counts = weight.new_zeros(2, dtype=torch.float32)

    def __call__(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.switch.on or not isinstance(output, Tensor) or not torch.is_grad_enabled():
            return None
        self.switch.last = self.place
        return _TapFunction.apply(output, self.leaf, args[0].shape[0] if args else 1)


class _Activation(_Hook):
    """The tap of an activation; what it counts goes to the layer before it."""

    def __init__(self, switch: _Switch, function: str, layers: dict[int, _Layer]) -> None:
        super().__init__(switch)
        self.function, self.layers = function, layers
        quantities = all_quantities().values()
        self.saturated = next(q for q in quantities if q.at == "activation")
        self.units = next(q for q in quantities if q.at == "units")

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        if not self.switch.on or not torch.is_grad_enabled() or self.switch.last not in self.layers:
            return
        layer = self.layers[self.switch.last]
        stack = output.detach().unsqueeze(0)
        if self.function == "relu":
            alive = _measured(self.units, stack, "relu")
            if alive is not None and alive.shape[1] == layer.alive.shape[0]:
                layer.alive.logical_or_(alive[0])
                layer.seen.add_(output.numel() // alive.shape[1])
        else:
            count = _measured(self.saturated, stack, self.function)
            layer.counts.add_(torch.stack((count[0], count.new_full((), output.numel()))))


class Taps:
    """Fills rows with what is seen of the layers of a compiled model; the face of a Listener.

    Attributes:
        batch: Length of the first tensor that the first layer was called with last, 0-d; None before, and
            where a layer of the model takes the batch as its second dimension.
        own_time: Nothing: what is done in the graph is not told apart.
        deaf: Why nothing is heard, where a backward has shown that the taps are not in the compiled graph.
    """

    def __init__(self, model: nn.Module, catalogue: Catalogue, row: Any) -> None:
        self.batch: Tensor | None = None
        self._first = all(getattr(m, "batch_first", True) for m in model.modules())
        self.own_time = 0.0
        self.deaf = ""
        self._row = row
        self._switch = _Switch()
        self._layers: dict[int, _Layer] = {}
        self._steps = 0
        self._heard = False
        quantities = all_quantities().values()
        self._error = next(q for q in quantities if q.at == "error")
        self._saturated = next(q for q in quantities if q.at == "activation")
        self._units = next(q for q in quantities if q.at == "units")
        self._hooks = []
        self._model = weakref.ref(model)
        for module in model.modules():
            place = catalogue.place(module)
            kinds = (f for kind, f in _FUNCTIONS.items() if isinstance(module, kind))
            if place is not None:
                hook: Any = _Layer(self._switch, place, module)
                self._layers[place] = hook
            elif function := next(kinds, None):
                hook = _Activation(self._switch, function, self._layers)
            else:
                continue
            self._hooks.append(module.register_forward_hook(hook))

    def listen(self, on: bool) -> None:
        """Turn the flag."""
        self._switch.on = on
        self.forget()

    def close(self) -> None:
        """Take the hooks away."""
        self._switch.on = False
        for hook in self._hooks:
            hook.remove()

    def forget(self) -> None:
        """Drop what no backward has followed."""
        for layer in self._layers.values():
            layer.leaf.grad = None

    def settle(self) -> None:
        """Put what was counted into the row."""
        if not self._switch.on:
            return
        heard = [layer for layer in self._layers.values() if layer.leaf.grad is not None]
        if not heard:
            self.deaf = "" if self._heard else _COMPILED
            return
        self._heard, self.deaf, row = True, "", self._row()
        with torch.no_grad():
            told = torch.stack([layer.leaf.grad for layer in heard if layer.leaf.grad is not None])
            batch = told[0, 2] / told[0, 1]
            places = [layer.place for layer in heard]
            ones = [1.0] * len(heard)
            norms = told[:, 0].sqrt() * batch
            self.batch = batch if self._first else None
            row.add(self._error.name, (places, norms, ones, told[:, 1].contiguous()))
            self._tell_activations(row)
        self.forget()

    def measure(self) -> None:
        """Do nothing: what was heard was measured in the backward."""

    def _tell_activations(self, row: Row) -> None:
        layers = list(self._layers.values())
        places, ones = [layer.place for layer in layers], [1.0] * len(layers)
        counts = torch.stack([layer.counts for layer in layers])
        row.add(self._saturated.name, (places, counts[:, 0].clone(), ones, counts[:, 1].clone()))
        for layer in layers:
            layer.counts.zero_()
        self._steps += 1
        if self._steps == _WINDOW_STEPS:
            self._steps = 0
            enough = torch.stack([layer.seen >= _WINDOW_SAMPLES for layer in layers])
            dead = torch.stack([(~layer.alive).sum(dtype=torch.float32) for layer in layers])
            sizes = [dead.new_full((), layer.alive.numel()) for layer in layers]
            units = torch.stack(sizes)
            row.add(self._units.name, (places, dead * enough, ones, units * enough))
            for layer, told in zip(layers, enough, strict=True):
                layer.alive.logical_and_(~told)
                layer.seen.mul_(~told)


def _measured(quantity: Quantity, *values: Any) -> Any:
    assert quantity.measure is not None
    return quantity.measure(*values)


def is_compiled(model: nn.Module) -> bool:
    """Whether ``model`` or a part of it is compiled."""
    return any(
        hasattr(module, "_orig_mod") or module._compiled_call_impl is not None  # noqa: SLF001
        for module in model.modules()
    )
