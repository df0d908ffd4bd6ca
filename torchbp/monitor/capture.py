"""What belongs to which step, and when it is read.

The backward that an optimizer's step follows is the one that counts: under accumulation the earlier
ones hold part of the sum. A closure (LBFGS) runs backward inside the step: its first one is read, the
gradient where the step began. Where no optimizer is known, one that steps a watched parameter is found
when it does; a loop that has none at all steps once a backward.
"""

import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from torchbp.monitor._backwards import Backwards, in_backward
from torchbp.monitor._catalogue import Catalogue
from torchbp.monitor._listener import Listener
from torchbp.monitor._meter import Group, Meter, local
from torchbp.monitor._probe import Probe
from torchbp.monitor._row import Row
from torchbp.monitor._scaler import Scaler
from torchbp.monitor._stepped import Stepped
from torchbp.monitor._taps import Taps

__all__ = ["Capture"]

_DENSE_START = 5  # so many first steps are all sampled: trouble may be there from the beginning
_KEPT_EARLIER = 64
_RARELY = 5
_THAW = 8  # readings after which it is looked again what is frozen: fewer than make a layer disconnected
_RELEARN = 200  # steps after which it is looked again which parameters a backward reaches

Optimizer = torch.optim.Optimizer


class Capture:
    """Hands ``deliver`` one row a step.

    Args:
        model: The model; held weakly, as its parameters are.
        catalogue: Its layers and parameters.
        optimizers: Those whose steps are counted. Without any they are found when they first step.
        every: Gradients are read every so many steps, until :meth:`pace` says otherwise.
        sample_every: Layers are listened to every so many steps, likewise.
        compiled: Whether the model is compiled.
        deliver: Takes a row.

    Attributes:
        step: The step under way, from 0.
        steps: Number of steps so far.
        first: The step it began at.
        turns: Whether optimizers take turns, each with a backward of its own.
        row: Its row.
        reading: Whether it is read.
    """

    def __init__(
        self,
        model: nn.Module,
        catalogue: Catalogue,
        optimizers: Sequence[Optimizer],
        *,
        every: int,
        sample_every: int,
        compiled: bool,
        deliver: Callable[[Row], None],
    ) -> None:
        self.step = self.steps = self.first = 0
        self.turns = False
        self.row = Row(0)
        self._own_time = 0.0
        self._last: Row | None = None  # the row before
        self._found: list[tuple[int, ...]] = []  # parameters whose gradients that row has, by group
        self._reached: set[int] = set()  # the same together
        self._frozen, self._thaw = frozenset[int](), 0
        self._stepped_at = time.perf_counter()
        self._catalogue, self._deliver = catalogue, deliver
        self._every, self._sample_every = self._asked = every, sample_every
        self.reading = True
        self._passing = False  # whether the optimizer's step under way is not
        self._optimizers: dict[int, weakref.ref[Optimizer]] = {}
        self._closure = False  # whether a step that runs backward itself is under way
        self._looks = 0  # how many of its backwards have ended
        self._before: list[Group] = []  # parameters before the step
        self._ended: Row | None = None  # without an optimizer: the backward that may be the step
        self._meter = Meter(catalogue)
        self._scaler = Scaler()
        self._probe = Probe(catalogue)
        self._stepped = Stepped(catalogue)
        listener = Taps if compiled else Listener
        self._listener = listener(model, catalogue, lambda: self.row)
        self._hooks: list[RemovableHandle] = []
        for optimizer in optimizers:
            self._attend(optimizer)
        if not optimizers:
            self._hooks.append(register_optimizer_step_pre_hook(self._discover))
        # Where buckets are views of the gradients these are reduced under way.
        shows = isinstance(model, DistributedDataParallel) and not model.gradient_as_bucket_view
        before = self._before_reduction if shows else None
        self._listening = True  # or may be
        self._relearn = _RELEARN
        self._counts = 0  # the optimizer that ended the last step that was read
        self._backwards = Backwards(catalogue, local, before, self._end_backward)
        self._begin(0)

    def settle(self) -> None:
        """Measure what was only copied so far: a row that is handed over may have to wait for it."""
        self._meter.settle()
        self._listener.measure()

    def close(self) -> None:
        """Remove every hook; hand over what no step has followed."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._backwards.close()
        self._listener.close()
        if self._ended is not None:
            ended, self._ended = self._ended, None
            self._hand_over(ended)
        if self.row.backwards:
            self.row.scale = self._scaler.scale()
            self._hand_over(self.row)
            self.row = Row(self.step + 1)

    @property
    def own_time(self) -> float:
        """Seconds spent here and in the layers' hooks so far."""
        return self._own_time + self._listener.own_time

    @property
    def deaf(self) -> bool:
        """Whether the layers can't be listened to."""
        return self._listener.deaf

    def seek(self, step: int) -> None:
        """Go on at ``step``, in a run that is resumed."""
        self.first = step
        self._begin(step)

    def pace(self, every: int, sample_every: int) -> None:
        """Read and listen every so many steps from the next step on."""
        self._every, self._sample_every = every, sample_every

    @property
    def awaited(self) -> int | None:
        """The step whose row is the next to be handed over; None where it is not read."""
        if self._ended is not None:
            return self._ended.step
        return self.step if self.reading else None

    @property
    def knows_optimizers(self) -> bool:
        """Whether steps are an optimizer's; else a backward is one."""
        return bool(self._optimizers)

    # -------------------------------------------------------------------------------- backward
    def _before_reduction(self) -> None:
        if self.row.sampled:
            self.row.unreduced = self._meter.norms()

    def _end_backward(self, another: bool) -> None:
        start = time.perf_counter()
        self._looks += another
        if self._closure and self._looks > 1:
            self._listener.forget()
            return  # a closure's later look; its first one is the gradient where the step began
        if self._listening:
            self._listener.settle()
        if not self._optimizers and self._ended is not None and not self._probe.accumulates():
            self._hand_over(self._ended)
            self._ended = None
        if not self.reading and self._ended is None:
            self._count()
            self._begin(self.step + 1)
            return
        row = self.row if self._ended is None else self._ended
        if row is not self.row:
            row.absorb(self.row)
        self._read(row, another)
        if not self._optimizers:
            self._ended = row
            if self.row is row:
                self._begin(self.step + 1)
            self._probe.set()
        self._own_time += time.perf_counter() - start

    def _read(self, row: Row, another: bool) -> None:
        """Put the gradients into ``row``, in place of those of an earlier backward."""
        if another:
            if row.backwards and len(row.earlier) < _KEPT_EARLIER:
                row.earlier.append(row.parameters.get("gradient_norm", []))
            row.backwards += 1
        row.parameters.clear()
        with torch.no_grad():
            groups = self._meter.gradients()
            self._meter.measure(row, "gradient", groups)
        found = [indices for indices, _ in groups]
        self._thaw += 1
        if found != self._found or self._thaw >= _THAW:
            self._found, self._reached = found, {index for indices in found for index in indices}
            self._thaw, self._frozen = 0, self._catalogue.frozen()
        row.frozen = self._frozen
        if self._backwards.early:
            gone = self._backwards.gone(self._reached)
            row.parameters.setdefault("gradient_norm", []).extend(gone)
        else:
            self._backwards.gone(self._reached)
        if self._listener.batch is not None:
            row.host["batch"] = self._listener.batch

    # ------------------------------------------------------------------------------ optimizers
    def _discover(self, optimizer: Optimizer, *_: Any) -> None:
        mine = {id(p) for _, p in self._catalogue.alive()}
        groups = optimizer.param_groups
        known = id(optimizer) in self._optimizers
        if known or in_backward() or not any(id(p) in mine for g in groups for p in g["params"]):
            return
        if self._ended is not None:  # the backward that looked like a step of its own
            self._listener.listen(False)
            self._listening = False
            self.row, self._ended = self._ended, None
            self.step, self.reading = self.row.step, True
        self._attend(optimizer)  # torch calls the hook that is set here in the same step

    def _attend(self, optimizer: Optimizer) -> None:
        self._optimizers[id(optimizer)] = weakref.ref(optimizer)
        pre = optimizer.register_step_pre_hook(self._before_step)
        self._hooks += [pre, optimizer.register_step_post_hook(self._after_step)]

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Any) -> None:
        if in_backward():
            return
        closure = kwargs.get("closure") is not None or any(a is not None for a in args[1:])
        self._passing = self._backwards.paused and (closure or not self._is_late(optimizer))
        if self._passing:
            return
        start = time.perf_counter()
        self._scaler.look()
        self._closure = closure
        self._looks = 0
        row = self._row_of_step()
        if row is not None and row.sampled:
            with torch.no_grad():
                if not self._closure:
                    self._measure_stepped(row, optimizer)
                now = self._meter.parameters(self._meter.members(optimizer), room=2)
                self._meter.measure(row, "weight", now)
                self._before = self._meter.kept(now)
        self._own_time += time.perf_counter() - start

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

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        if in_backward():
            return
        if self._passing:
            self._pass(optimizer)
            return
        start = time.perf_counter()
        row = self._row_of_step()
        if row is not None and self._before:
            with torch.no_grad():
                if (
                    self._closure and self._looks == 1
                ):  # its one backward's gradient was stepped with
                    self._measure_stepped(row, optimizer)
                stepped = self._meter.parameters(self._meter.members(optimizer))
                pairs = zip(stepped, self._before, strict=True)
                changes = [(indices, now.minus(before)) for (indices, now), (_, before) in pairs]
                changed = [(indices, change) for indices, change in changes if change is not None]
                self._meter.measure(row, "update", changed)
        self._before, self._closure = [], False
        if self.row.backwards or (row is not self.row and self._is_missed(optimizer)):
            self.turns = self.turns or self._counts not in {0, id(optimizer)}
            self._counts = id(optimizer)
            row = self.row
            row.scale = self._scaler.scale()
            row.host["learning_rate"] = [_rate(g["lr"]) for g in optimizer.param_groups]
            self._note_stepped()
            self._begin(self.step + 1)
            self._own_time += time.perf_counter() - start
            if row.backwards:
                self._hand_over(row)
        else:
            self._own_time += time.perf_counter() - start

    def _is_late(self, optimizer: Optimizer) -> bool:
        """Whether the step is one more of the last row's, by another optimizer."""
        another = not self._backwards.passed and self._counts != id(optimizer)
        return another and self._row_before() is not None

    def _pass(self, optimizer: Optimizer) -> None:
        """Count a step of which nothing is read; the second of two optimizers ends none."""
        if self._backwards.passed or self._is_missed(optimizer):
            self._backwards.skip()
            self._count()
            self._note_stepped()
            self.step = self.row.step = self.step + 1
            if self.step % self._every == 0:
                self._begin(self.step)

    def _note_stepped(self) -> None:
        optimizers = ((key, o) for key, ref in self._optimizers.items() if (o := ref()) is not None)
        self._stepped.note((key, self._meter.members(optimizer)) for key, optimizer in optimizers)

    def _count(self) -> None:
        self.steps += 1
        self._stepped_at = time.perf_counter()

    def _is_missed(self, optimizer: Optimizer) -> bool:
        """Whether there was a backward that reached no witness; then all are hooked again.

        Its gradient is left out, for what is there by now may have been clipped.
        """
        members = self._meter.members(optimizer)
        if self._backwards.everywhere or not self._stepped.has_new(id(optimizer), members):
            return False
        self._backwards.miss()
        return True

    def _row_of_step(self) -> Row | None:
        """Return the row of the step under way, or the one before where a second optimizer steps."""
        return self.row if self.row.backwards or self._closure else self._row_before()

    def _row_before(self) -> Row | None:
        """Return the row of the step before, where that was read."""
        last = self._last
        return last if last is not None and last.step == self.step - 1 else None

    # ----------------------------------------------------------------------------------- rows
    def _begin(self, step: int) -> None:
        self.step = step
        self.reading = due = step % self._every == 0
        sampled = due and (step < _DENSE_START or step % self._sample_every == 0)
        rare = sampled and step % (_RARELY * self._sample_every) == 0
        self.row = Row(step, sampled, rare)
        if sampled or self._listening:
            self._listener.listen(sampled)
            self._listening = sampled
        self._backwards.begin_step()
        self._backwards.paused = not due and bool(self._optimizers)
        self._backwards.passed = False
        if due and step >= max(self._relearn, _DENSE_START):
            self._relearn = step + _RELEARN * (self._every // self._asked[0])
            self._backwards.learn()
        elif step >= _DENSE_START or (not due and len(self._optimizers) == 1):
            self._backwards.settle()

    def _hand_over(self, row: Row) -> None:
        row.when, before = time.time(), self._stepped_at
        self._count()
        row.host["step_time"] = 1e3 * (self._stepped_at - before)
        row.host["backwards"] = row.backwards
        self._last = row
        self._deliver(row)


def _rate(value: Tensor | float) -> Tensor | float:
    return value.detach().clone() if isinstance(value, Tensor) else float(value)
