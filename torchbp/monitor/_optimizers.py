"""The optimizers whose steps are counted: those that were given, or one that steps a watched parameter."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from torchbp.monitor._backwards import in_backward
from torchbp.monitor._catalogue import Catalogue
from torchbp.monitor._meter import Meter

__all__ = ["Optimizer", "Optimizers"]

Optimizer = torch.optim.Optimizer


class Optimizers:
    """Calls ``before`` and ``after`` a step, unless that is made inside a backward: no optimizer ends a step there.

    Remembers, of every optimizer's parameters, the first gradient there was when a step ended. A second
    optimizer's step finds it as it was. Gradients that came of a backward since are tensors of their own,
    unless they were reset in place.

    Args:
        catalogue: The parameters.
        meter: Knows which of them are an optimizer's.
        given: The optimizers; without any they are found when they first step.
        before: Takes the optimizer, and whether its step runs a closure.
        after: Takes the optimizer.
        found: Called when one is found, before its step.

    Attributes:
        away: Whether steps are left aside.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        meter: Meter,
        given: Sequence[Optimizer],
        *,
        before: Callable[[Optimizer, bool], None],
        after: Callable[[Optimizer], None],
        found: Callable[[], None],
    ) -> None:
        self.away = False
        self._catalogue, self._meter = catalogue, meter
        self._before, self._after, self._found = before, after, found
        self._known: dict[int, weakref.ref[Optimizer]] = {}
        self._inside: set[int] = set()  # those that last stepped inside a backward
        self._stepped: dict[int, weakref.ref[Tensor]] = {}
        self._hooks: list[RemovableHandle] = []
        for optimizer in given:
            self._attend(optimizer)
        if not given:
            self._hooks.append(register_optimizer_step_pre_hook(self._discover))

    def __len__(self) -> int:
        return len(self._known) - len(self._inside)

    def members(self) -> set[int]:
        """Return the indices of the parameters that one of them has."""
        known = (reference() for reference in self._known.values())
        return {i for each in known if each is not None for i in self._meter.members(each)}

    def close(self) -> None:
        """Remove every hook."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def end_step(self) -> None:
        """Remember which gradients there are at the end of a step."""
        self._stepped = {}
        for key, reference in self._known.items():
            optimizer = reference()
            gradient = None if optimizer is None else self._gradient(optimizer)
            if gradient is not None:
                self._stepped[key] = weakref.ref(gradient)

    def has_new(self, optimizer: Optimizer) -> bool:
        """Whether there is a gradient that was not there when the last step ended."""
        now, before = self._gradient(optimizer), self._stepped.get(id(optimizer))
        return now is not None and (before is None or before() is not now)

    def _gradient(self, optimizer: Optimizer) -> Tensor | None:
        for index in self._meter.members(optimizer):
            parameter = self._catalogue.parameters[index]()
            if parameter is not None and parameter.grad is not None:
                return parameter.grad
        return None

    def _discover(self, optimizer: Optimizer, *_: Any) -> None:
        if self.away:
            return
        mine = {id(p) for _, p in self._catalogue.alive()}
        groups = optimizer.param_groups
        known = id(optimizer) in self._known
        if known or in_backward() or not any(id(p) in mine for g in groups for p in g["params"]):
            return
        self._found()
        self._attend(optimizer)  # torch calls the hook that is set here in the same step

    def _attend(self, optimizer: Optimizer) -> None:
        self._known[id(optimizer)] = weakref.ref(optimizer)
        pre = optimizer.register_step_pre_hook(self._before_step)
        self._hooks += [pre, optimizer.register_step_post_hook(self._after_step)]

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Any) -> None:
        if self.away:
            return
        if in_backward():
            self._inside.add(id(optimizer))
        else:
            if id(optimizer) in self._inside:
                self._found()
                self._inside.remove(id(optimizer))
            closure = kwargs.get("closure") is not None or any(a is not None for a in args[1:])
            self._before(optimizer, closure)

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        if not (self.away or in_backward()):
            self._after(optimizer)
