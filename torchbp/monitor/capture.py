"""Where gradients are read, and how a step is told from the next.

A post-accumulate hook on every parameter notes that a backward is under way and queues a callback
for its end; the callback queues itself once more, because DDP queues its reduction after ours.
What it then reads is reduced and not yet clipped. The backward that an optimizer's step follows
is the one that counts: under accumulation the earlier ones hold part of the sum.

Parameters that are stepped inside backward have no gradient left at its end: theirs are read in the
hook, which stands before the user's. A closure (LBFGS) runs backward inside the step: its first one
is read, the gradient where the step began. A GradScaler is found on the call stack of the step; what
it scaled is divided out on the host.
"""

import sys
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from torchbp.monitor._catalogue import Catalogue
from torchbp.monitor._listener import Listener
from torchbp.monitor._norms import changes, copies, squares
from torchbp.monitor._quantity import Quantity
from torchbp.monitor._registry import all_quantities
from torchbp.monitor._row import Row

__all__ = ["Capture"]

_DENSE_START = 5  # so many first steps are all sampled: trouble may be there from the beginning
_KEPT_EARLIER = 64
_RARELY = 5
_SCALER = torch.amp.GradScaler
_SCALER_STEPS = {_SCALER.step.__code__, _SCALER._maybe_opt_step.__code__}  # noqa: SLF001

Optimizer = torch.optim.Optimizer


class Capture:
    """Hands ``deliver`` one row a step.

    Args:
        model: The model; held weakly, as its parameters are.
        catalogue: Its layers and parameters.
        optimizers: Those whose steps are counted. Without any they are found when they first step;
            a loop that has none at all steps once a backward.
        every: Gradients are read every so many steps.
        sample_every: Layers are listened to every so many steps.
        listens: Whether layers can be listened to at all.
        deliver: Takes a row.

    Attributes:
        step: The step under way, from 0.
        row: Its row.
        last: The row before, if any.
        own_time: Seconds spent here so far.
    """

    def __init__(
        self,
        model: nn.Module,
        catalogue: Catalogue,
        optimizers: Sequence[Optimizer],
        *,
        every: int,
        sample_every: int,
        listens: bool,
        deliver: Callable[[Row], None],
    ) -> None:
        self.step = 0
        self.row = Row(0)
        self.last: Row | None = None
        self.own_time = 0.0
        self._stepped_at = time.perf_counter()
        self._catalogue = catalogue
        self._every, self._sample_every, self._listens = every, sample_every, listens
        self._deliver = deliver
        self._measures = {
            at: [q for q in all_quantities().values() if q.at == at]
            for at in ("gradient", "stepped", "weight", "update")
        }
        self._task = -1
        self._scaler: Callable[[], Any] = lambda: None
        self._steps_in_backward: set[int] | None = None  # not known before the first backward
        self._marks_only = False
        self._early: dict[int, Tensor] = {}
        self._optimizers: set[int] = set()
        self._closure = False  # whether a step that runs backward itself is under way
        self._before: tuple[tuple[int, ...], list[Tensor]] | None = None
        self._probe: tuple[weakref.ref[Tensor], weakref.ref[Tensor], int, int] | None = None
        self._ended: Row | None = None
        self._listener = Listener(model, catalogue, lambda: self.row)
        self._hooks: list[RemovableHandle] = []
        for index, parameter in catalogue.alive():
            hook = parameter.register_post_accumulate_grad_hook(partial(self._accumulated, index))
            self._hooks.append(hook)
            _put_first(parameter._post_accumulate_grad_hooks, hook.id)  # noqa: SLF001
        for optimizer in optimizers:
            self._attend(optimizer)
        if not optimizers:
            self._hooks.append(register_optimizer_step_pre_hook(self._discover))
        self._begin(0)

    def close(self) -> None:
        """Remove every hook; hand over what no step has followed."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._listener.listen(False)
        if self._ended is not None:
            ended, self._ended = self._ended, None
            self._hand_over(ended)
        if self.row.backwards:
            self._hand_over(self.row)
            self.row = Row(self.step + 1)

    def seek(self, step: int) -> None:
        """Go on at ``step``, in a run that is resumed."""
        self._begin(step)

    # -------------------------------------------------------------------------------- gradients
    def _accumulated(self, index: int, parameter: Tensor) -> None:
        # Most calls end here: they come once a parameter and backward.
        if self._marks_only and torch._C._current_graph_task_id() == self._task:  # noqa: SLF001
            return
        if self.step % self._every and self._optimizers:
            return
        known = self._steps_in_backward
        if (known is None or index in known) and parameter.grad is not None:
            with torch.no_grad():
                self._early[index] = squares([_local(parameter.grad)])
        # By the number of the graph task: a flag would stay set after an exception in backward.
        task = torch._C._current_graph_task_id()  # noqa: SLF001
        if task != self._task:
            self._task = task
            queue = torch.autograd.Variable._execution_engine.queue_callback  # noqa: SLF001
            queue(lambda: queue(self._end_backward))

    def _end_backward(self) -> None:
        start = time.perf_counter()
        if self._closure and self.row.backwards:
            return  # a closure's later look; its first one is the gradient where the step began
        accumulating = self._optimizers or self._is_accumulating()
        if not accumulating and self._ended is not None:
            self._hand_over(self._ended)
            self._ended = None
        if self.step % self._every and self._ended is None:
            self._begin(self.step + 1)
            return
        row = self.row if self._ended is None else self._ended
        if row is not self.row:
            row.absorb(self.row)
        gradients = self._present_gradients()
        if row.backwards and len(row.earlier) < _KEPT_EARLIER:
            row.earlier.append(row.parameters.get("gradient_norm", []))
        row.backwards += 1
        row.host["batch"] = self._listener.batch
        self._measure(row, "gradient", gradients)
        self._add_early(row, {index for index, _ in gradients})
        if not self._optimizers:
            self._ended = row
            if self.row is row:
                self._begin(self.step + 1)
            self._set_probe()
        self.own_time += time.perf_counter() - start

    def _add_early(self, row: Row, present: set[int]) -> None:
        early = {i: t for i, t in self._early.items() if i not in present}
        self._early = {}
        if self._steps_in_backward is None:
            self._steps_in_backward = set(early)
            self._marks_only = not early
        for index, square in early.items():
            row.parameters.setdefault("gradient_norm", []).append(((index,), square))

    def _present_gradients(self) -> list[tuple[int, Tensor]]:
        found = []
        for index, reference in enumerate(self._catalogue.parameters):
            parameter = reference()
            gradient = None if parameter is None else parameter.grad
            if gradient is not None:
                if type(gradient) is not Tensor or gradient.layout is not torch.strided:
                    gradient = _local(gradient)
                if gradient.numel():
                    found.append((index, gradient))
        return found

    def _measure(self, row: Row, at: str, tensors: list[tuple[int, Tensor]]) -> None:
        devices: dict[torch.device, list[tuple[int, Tensor]]] = {}
        for index, tensor in tensors:
            devices.setdefault(tensor.device, []).append((index, tensor))
        with torch.no_grad():
            for quantity in self._measures[at]:
                if not _is_due(quantity, row):
                    continue
                assert quantity.measure is not None
                row.parameters[quantity.name] = [
                    (tuple(i for i, _ in group), quantity.measure([t for _, t in group]))
                    for group in devices.values()
                ]

    # ------------------------------------------------------------------- steps without optimizer
    def _set_probe(self) -> None:
        for _, parameter in self._catalogue.alive():
            grad = parameter.grad
            if grad is not None:
                versions = parameter._version, grad._version  # noqa: SLF001
                self._probe = (weakref.ref(parameter), weakref.ref(grad), *versions)
                return
        self._probe = None

    def _is_accumulating(self) -> bool:
        """Whether since the last backward neither a parameter was changed nor its gradient reset."""
        if self._probe is None or self._ended is None:
            return False
        parameter, grad = self._probe[0](), self._probe[1]()
        if parameter is None or grad is None or parameter.grad is not grad:
            return False
        versions = parameter._version, grad._version  # noqa: SLF001
        return versions == (self._probe[2], self._probe[3] + 1)

    def _discover(self, optimizer: Optimizer, *_: Any) -> None:
        mine = {id(p) for _, p in self._catalogue.alive()}
        groups = optimizer.param_groups
        known = id(optimizer) in self._optimizers
        if known or _in_backward() or not any(id(p) in mine for g in groups for p in g["params"]):
            return
        if self._ended is not None:  # the backward that looked like a step of its own
            self._listener.listen(False)
            self.row, self._ended = self._ended, None
            self.step = self.row.step
        self._attend(optimizer)  # torch calls the hook that is set here in the same step

    def _attend(self, optimizer: Optimizer) -> None:
        self._optimizers.add(id(optimizer))
        pre = optimizer.register_step_pre_hook(self._before_step)
        self._hooks += [pre, optimizer.register_step_post_hook(self._after_step)]

    # ------------------------------------------------------------------------------------ steps
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Any) -> None:
        if _in_backward():
            return
        start = time.perf_counter()
        self._find_scaler()
        self._closure = kwargs.get("closure") is not None or any(a is not None for a in args[1:])
        if self._closure:
            self.row.backwards, self.row.parameters = 0, {}
        found_inf = getattr(optimizer, "found_inf", None)  # fused: it skips inside the step
        if isinstance(found_inf, Tensor):
            self.row.host["found_inf"] = found_inf.clone()
        row = self._row_of_step()
        if row is not None and row.sampled:
            mine = self._parameters_of(optimizer)
            if not self._closure:
                self._measure_stepped(row, optimizer, mine)
            self._measure_more(row, "weight", mine)
            self._before = tuple(i for i, _ in mine), copies([p for _, p in mine])
        self.own_time += time.perf_counter() - start

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        if _in_backward():
            return
        start = time.perf_counter()
        row = self._row_of_step()
        self._closure = False
        if row is not None and self._before is not None:
            indices, before = self._before
            after = dict(self._parameters_of(optimizer))
            with torch.no_grad():
                difference = changes([after[i] for i in indices], before)
            self._measure_more(row, "update", list(zip(indices, difference, strict=True)))
        self._before = None
        if self.row.backwards or self.step % self._every:
            row = self.row
            scaler = self._scaler()
            if scaler is not None and scaler.is_enabled() and scaler._scale is not None:  # noqa: SLF001
                row.scale = scaler._scale.clone()  # noqa: SLF001  # changed in place by update()
            row.host["learning_rate"] = [_rate(g["lr"]) for g in optimizer.param_groups]
            self._begin(self.step + 1)
            self.own_time += time.perf_counter() - start
            if row.backwards:
                self._hand_over(row)
        else:
            self.own_time += time.perf_counter() - start

    def _row_of_step(self) -> Row | None:
        """Return the row of the step under way, or the last one where a second optimizer steps."""
        return self.row if self.row.backwards or self._closure else self.last

    def _parameters_of(self, optimizer: Optimizer) -> list[tuple[int, Tensor]]:
        members = {id(p) for group in optimizer.param_groups for p in group["params"]}
        local = ((i, _local(p.detach())) for i, p in self._catalogue.alive() if id(p) in members)
        return [(i, p) for i, p in local if p.numel()]

    def _measure_stepped(
        self, row: Row, optimizer: Optimizer, mine: list[tuple[int, Tensor]]
    ) -> None:
        members = {i for i, _ in mine}
        gradients = [(i, g) for i, g in self._present_gradients() if i in members]
        self._measure_more(row, "stepped", gradients)
        scale = getattr(optimizer, "grad_scale", None)  # fused: it unscales inside the step
        if isinstance(scale, Tensor):
            name = self._measures["stepped"][0].name
            scaled = row.parameters[name]
            row.parameters[name] = [(i, t / scale.to(t.device).square()) for i, t in scaled]

    def _measure_more(self, row: Row, at: str, tensors: list[tuple[int, Tensor]]) -> None:
        """Measure, beside what another optimizer of the same step has left."""
        before = {q.name: row.parameters.get(q.name, []) for q in self._measures[at]}
        self._measure(row, at, tensors)
        for name, pieces in before.items():
            row.parameters[name] = pieces + row.parameters.get(name, [])

    def _find_scaler(self) -> None:
        if self._scaler() is not None:
            return
        frame = sys._getframe(2)  # noqa: SLF001
        for _ in range(12):
            if frame is None:
                return
            # Not of other frames: asking a frame for its locals keeps them alive.
            if frame.f_code in _SCALER_STEPS:
                self._scaler = weakref.ref(frame.f_locals["self"])
                return
            frame = frame.f_back

    def _begin(self, step: int) -> None:
        self.step = step
        sampled = (
            self._listens
            and step % self._every == 0
            and (step < _DENSE_START or step % self._sample_every == 0)
        )
        self.row = Row(step, sampled, sampled and step % (_RARELY * self._sample_every) == 0)
        self._listener.listen(sampled)

    def _hand_over(self, row: Row) -> None:
        row.when, now = time.time(), time.perf_counter()
        row.host["step_time"] = 1e3 * (now - self._stepped_at)
        self._stepped_at = now
        row.host["backwards"] = row.backwards
        self.last = row
        self._deliver(row)


def _is_due(quantity: Quantity, row: Row) -> bool:
    return {"every step": True, "sampled": row.sampled, "rarely": row.rare}[quantity.often]


def _put_first(hooks: Any, key: int) -> None:
    """Let a hook run before those that were there. Torch runs them as a plain dict is ordered."""
    if isinstance(hooks, dict) and key in hooks:
        others = {k: v for k, v in hooks.items() if k != key}
        mine = hooks[key]
        hooks.clear()
        hooks[key] = mine
        hooks.update(others)


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's shard, and the values of a sparse gradient."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    if tensor.layout != torch.strided:
        tensor = tensor.coalesce().values()
    return tensor.detach()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # noqa: SLF001


def _rate(value: Tensor | float) -> Tensor | float:
    return value.detach().clone() if isinstance(value, Tensor) else float(value)
