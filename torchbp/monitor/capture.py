"""Where training is listened to: gradients where they are final, error signals where they pass.

A post-accumulate hook on every parameter notes that a backward is under way and queues a callback
for its end; the callback queues itself once more, because DDP queues its reduction after ours.
What it then reads is reduced and not yet clipped. The backward that an optimizer's step follows
is the one that counts: under accumulation the earlier ones hold part of the sum.

Error signals come from hooks on the layers' outputs, and those from a module forward hook for all
modules, which is there during sampled steps only. The model itself carries no module hook: it can
be copied, pickled and compiled.
"""

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from torchbp.monitor._catalogue import Catalogue
from torchbp.monitor._registry import all_quantities

__all__ = ["Capture", "Row"]

_DENSE_START = 5  # so many first steps are all sampled: trouble may be there from the beginning

Optimizer = torch.optim.Optimizer


@dataclass
class Row:
    """What one step left on the device, by the order of registration.

    Attributes:
        step: The step.
        when: Wall time in seconds since 1970.
        gradients: Pieces of the parameters' vector: indices, squared norms.
        errors: By layer, squared error signals of its outputs, and their number of elements.
        host: Numbers known to the host, or 0-d tensors.
    """

    step: int
    when: float
    gradients: list[tuple[np.ndarray, Tensor]]
    errors: dict[int, list[tuple[Tensor, int]]] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)


class Capture:
    """Hands ``deliver`` one row a step.

    Args:
        model: The model.
        catalogue: Its layers and parameters.
        optimizers: Those whose steps are counted; without any, a step is a backward.
        every: Gradients are read every so many steps.
        sample_every: Error signals are read every so many steps.
        deliver: Takes a row.

    Attributes:
        step: The step under way, from 0.
    """

    def __init__(
        self,
        model: nn.Module,
        catalogue: Catalogue,
        optimizers: Sequence[Optimizer],
        *,
        every: int,
        sample_every: int,
        deliver: Callable[[Row], None],
    ) -> None:
        self.step = 0
        self._model = weakref.ref(model)
        self._catalogue = catalogue
        self._counts_backwards = not optimizers
        self._every, self._sample_every = every, sample_every
        self._deliver = deliver
        self._task = -1
        self._batch = 1
        self._pending: list[tuple[np.ndarray, Tensor]] | None = None
        self._errors: dict[int, list[tuple[Tensor, int]]] = {}
        self._forward_hooks: list[RemovableHandle] = []
        self._measure_gradient = _measure("gradient_norm")
        self._measure_error = _measure("error_signal")
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._note_backward)
            for parameter in self._alive()
        ]
        self._hooks += [o.register_step_pre_hook(self._before_step) for o in optimizers]
        self._sample()

    @property
    def under_way(self) -> bool:
        """Whether a backward has ended that no step has followed yet."""
        return self._pending is not None

    def close(self) -> None:
        """Remove every hook."""
        for hook in (*self._hooks, *self._forward_hooks):
            hook.remove()
        self._hooks, self._forward_hooks = [], []
        self._deliver = _ignore

    # -------------------------------------------------------------------------------- gradients
    def _alive(self) -> list[Tensor]:
        return [p for ref in self._catalogue.parameters if (p := ref()) is not None]

    def _note_backward(self, _: Tensor) -> None:
        # By the number of the graph task: a flag would stay set after an exception in backward.
        task = torch._C._current_graph_task_id()  # noqa: SLF001
        if task != self._task and self.step % self._every == 0:
            self._task = task
            queue = torch.autograd.Variable._execution_engine.queue_callback  # noqa: SLF001
            queue(lambda: queue(self._end_backward))

    def _end_backward(self) -> None:
        self._pending = self._read_gradients()
        if self._counts_backwards:
            self._end_step({})

    def _read_gradients(self) -> list[tuple[np.ndarray, Tensor]]:
        groups: dict[torch.device, tuple[list[int], list[Tensor]]] = {}
        for index, ref in enumerate(self._catalogue.parameters):
            parameter = ref()
            gradient = None if parameter is None else parameter.grad
            if gradient is None or not gradient.numel():
                continue
            if gradient.layout != torch.strided:
                gradient = gradient.coalesce().values()
            indices, gradients = groups.setdefault(gradient.device, ([], []))
            indices.append(index)
            gradients.append(gradient.detach())
        with torch.no_grad():
            return [(np.array(i), self._measure_gradient(g)) for i, g in groups.values()]

    # ------------------------------------------------------------------------------------ steps
    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        if self._pending is not None:
            rates = [float(group["lr"]) for group in optimizer.param_groups]
            self._end_step({"learning_rate": rates})
        elif self.step % self._every:
            self.step += 1
            self._sample()

    def _end_step(self, host: dict[str, Any]) -> None:
        row = Row(self.step, time.time(), self._pending or [], self._errors, host)
        self._pending, self._errors = None, {}
        self.step += 1
        self._sample()
        self._deliver(row)

    # ---------------------------------------------------------------------------- error signals
    def _sample(self) -> None:
        """Listen to the layers in the coming step, or stop."""
        sampled = self.step % self._every == 0 and (
            self.step < _DENSE_START or self.step % self._sample_every == 0
        )
        if sampled and not self._forward_hooks:
            self._forward_hooks = [
                register_module_forward_pre_hook(self._before_forward),
                register_module_forward_hook(self._after_forward),
            ]
        elif not sampled:
            for hook in self._forward_hooks:
                hook.remove()
            self._forward_hooks = []

    def _before_forward(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if module is self._model():
            self._batch = next((t.shape[0] for t in inputs if isinstance(t, Tensor) and t.ndim), 1)

    def _after_forward(self, module: nn.Module, _: object, output: Any) -> None:
        place = self._catalogue.place(module)
        if place is None or torch.compiler.is_compiling():
            return
        self._catalogue.note_run(place)
        tensor = _first_tensor(output)
        if tensor is not None and tensor.requires_grad:
            errors, batch = self._errors, self._batch

            def note_error(delta: Tensor) -> None:
                with torch.no_grad():
                    square = self._measure_error(delta) * batch**2
                errors.setdefault(place, []).append((square, delta.numel()))

            tensor.register_hook(note_error)


def _measure(name: str) -> Callable[[Any], Tensor]:
    measure = all_quantities()[name].measure
    assert measure is not None
    return measure


def _first_tensor(output: Any) -> Tensor | None:
    """Return the layer's output proper: an LSTM's is the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, dict) else output
    if isinstance(parts, (tuple, list)) or isinstance(output, dict):
        return next((t for t in parts if isinstance(t, Tensor) and t.requires_grad), None)
    return None


def _ignore(_: Row) -> None:
    pass
