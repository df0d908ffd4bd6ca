"""What an optimizer's step is made with and what it changes: clipped gradients, weights, updates."""

import torch
from torch import Tensor

from torchbp.monitor._meter import Group, Meter
from torchbp.monitor._optimizers import Optimizer
from torchbp.monitor._row import Row

__all__ = ["Changes"]


class Changes:
    """Puts them into the row of a sampled step.

    Args:
        meter: Measures them.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._before: list[Group] = []  # parameters before the step

    def begin(self, row: Row, optimizer: Optimizer, *, closure: bool) -> None:
        """Measure what there is before the step; under a closure its gradients are yet to come."""
        with torch.no_grad():
            if not closure:
                self._measure_stepped(row, optimizer)
            now = self._meter.parameters(self._meter.members(optimizer), room=2)
            self._meter.measure(row, "weight", now)
            self._before = self._meter.kept(now)

    def end(self, row: Row, optimizer: Optimizer, *, closure: bool) -> None:
        """Measure the step; ``closure``: its one backward's gradient was stepped with."""
        if not self._before:
            return
        with torch.no_grad():
            if closure:
                self._measure_stepped(row, optimizer)
            stepped = self._meter.parameters(self._meter.members(optimizer))
            pairs = zip(stepped, self._before, strict=True)
            changes = [(indices, now.minus(before)) for (indices, now), (_, before) in pairs]
            changed = [(indices, change) for indices, change in changes if change is not None]
            self._meter.measure(row, "update", changed)

    def forget(self) -> None:
        """Let go of the parameters before the step."""
        self._before = []

    def _measure_stepped(self, row: Row, optimizer: Optimizer) -> None:
        name = "stepped_gradient_norm"
        others = row.parameters.pop(name, [])
        gradients = self._meter.gradients(self._meter.members(optimizer))
        self._meter.measure(row, "stepped", gradients)
        scale = getattr(optimizer, "grad_scale", None)  # fused: it unscales inside the step
        pieces = row.parameters.get(name, [])
        if isinstance(scale, Tensor):
            self._meter.settle()
            pieces = [
                (i, torch.as_tensor(t) / scale.to(torch.as_tensor(t).device)) for i, t in pieces
            ]
        row.parameters[name] = others + pieces
