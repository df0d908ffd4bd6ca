"""What belongs to which step, and when it is read.

The backward that an optimizer's step follows is the one that counts: under accumulation the earlier
ones hold part of the sum. A closure (LBFGS) runs backward inside the step: its first one is read, the
gradient where the step began. Where no optimizer is known, one that steps a watched parameter is found
when it does; a loop that has none at all steps once a backward.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torchbp.monitor._backwards import Backwards
from torchbp.monitor._catalogue import Catalogue
from torchbp.monitor._changes import Changes
from torchbp.monitor._gradients import Gradients
from torchbp.monitor._listener import Listener
from torchbp.monitor._meter import Meter, local
from torchbp.monitor._optimizers import Optimizer, Optimizers
from torchbp.monitor._probe import Probe
from torchbp.monitor._row import Row
from torchbp.monitor._scaler import Scaler
from torchbp.monitor._taps import Taps

__all__ = ["Capture"]

_DENSE_START = 5  # so many first steps are all sampled: trouble may be there from the beginning
_RARELY = 5
_RELEARN = 200  # steps after which it is looked again which parameters a backward reaches


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
        away: Whether what happens is left aside.
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
        self.turns = self.away = False
        self.row = Row(0)
        self.reading = True
        self._deliver, self._own_time = deliver, 0.0
        self._stepped_at = time.perf_counter()
        self._every, self._sample_every = self._asked = every, sample_every
        self._relearn = _RELEARN
        self._last: Row | None = None  # the row before
        self._counts = 0  # the optimizer that ended the last step that was read
        self._ended: Row | None = None  # without an optimizer: the backward that may be the step
        self._passing = False  # whether the optimizer's step under way is not read
        self._closure = False  # whether a step that runs backward itself is under way
        self._looks = 0  # how many of its backwards have ended
        self._scaler, self._probe = Scaler(), Probe(catalogue)
        self._meter = meter = Meter(catalogue)
        self._gradients, self._changes = Gradients(catalogue, meter), Changes(meter)
        listener = Taps if compiled else Listener
        self._listener = listener(model, catalogue, lambda: self.row)
        self._listening = True  # or may be
        self._optimizers = Optimizers(
            catalogue,
            meter,
            optimizers,
            before=self._before_step,
            after=self._after_step,
            found=self._find,
        )
        # Where buckets are views of the gradients these are reduced under way.
        shows = isinstance(model, DistributedDataParallel) and not model.gradient_as_bucket_view
        before = self._before_reduction if shows else None
        self._backwards = Backwards(catalogue, local, before, self._end_backward)
        self._begin(0)

    def settle(self) -> None:
        """Measure what was only copied so far: a row that is handed over may have to wait for it."""
        self._meter.settle()
        self._listener.measure()

    def close(self) -> None:
        """Remove every hook; hand over what no step has followed."""
        self._optimizers.close()
        self._backwards.close()
        self._listener.close()
        self._listening = False
        if self._ended is not None:
            ended, self._ended = self._ended, None
            self._hand_over(ended)
        if self.row.backwards:
            self.row.scale = self._scaler.scale()
            self._hand_over(self.row)
            self.row = Row(self.step + 1)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave aside backwards and steps in the block; the step under way goes on behind it."""
        if self.away:
            yield
            return
        start = time.perf_counter()
        self._set_away(True)
        try:
            yield
        finally:
            self._set_away(False)
            self._stepped_at += time.perf_counter() - start

    def _set_away(self, away: bool) -> None:
        self.away = self._backwards.away = self._optimizers.away = away
        if self._listening:
            self._listener.listen(not away)

    @property
    def own_time(self) -> float:
        """Seconds spent here and in the layers' hooks so far."""
        return self._own_time + self._listener.own_time

    @property
    def deaf(self) -> str:
        """Why the layers can't be listened to, if so."""
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
        return len(self._optimizers) > 0

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
        if not self.knows_optimizers and self._ended is not None and not self._probe.accumulates():
            self._hand_over(self._ended)
            self._ended = None
        if not self.reading and self._ended is None:
            self._count()
            self._begin(self.step + 1)
            return
        row = self.row if self._ended is None else self._ended
        if row is not self.row:
            row.absorb(self.row)
        self._gradients.read(row, self._backwards, self._optimizers, another=another)
        if self._listener.batch is not None:
            row.host["batch"] = self._listener.batch
        if not self.knows_optimizers:
            self._ended = row
            if self.row is row:
                self._begin(self.step + 1)
            self._probe.set()
        self._own_time += time.perf_counter() - start

    # ------------------------------------------------------------------------------ optimizers
    def _find(self) -> None:
        """Go back to the step that looked as if its backward were all of it."""
        if self._ended is not None:
            self._listener.listen(False)
            self._listening = False
            self.row, self._ended = self._ended, None
            self.step, self.reading = self.row.step, True

    def _before_step(self, optimizer: Optimizer, closure: bool) -> None:
        self._passing = self._backwards.paused and (closure or not self._is_late(optimizer))
        if self._passing:
            return
        start = time.perf_counter()
        self._scaler.look()
        self._closure, self._looks = closure, 0
        row = self._row_of_step()
        if row is not None and row.sampled:
            self._changes.begin(row, optimizer, closure=closure)
        self._own_time += time.perf_counter() - start

    def _after_step(self, optimizer: Optimizer) -> None:
        if self._passing:
            self._pass(optimizer)
            return
        start = time.perf_counter()
        row = self._row_of_step()
        if row is not None:
            self._changes.end(row, optimizer, closure=self._closure and self._looks == 1)
        self._changes.forget()
        self._closure = False
        ended = self.row
        missed = row is not ended and self._is_missed(optimizer)
        if ended.backwards or missed:
            self.turns = self.turns or self._counts not in {0, id(optimizer)}
            self._counts = id(optimizer)
            ended.scale = self._scaler.scale()
            ended.host["learning_rate"] = [_rate(g["lr"]) for g in optimizer.param_groups]
            self._optimizers.end_step()
            self._begin(self.step + 1)
        self._own_time += time.perf_counter() - start
        if ended.backwards:
            self._hand_over(ended)
        elif missed:
            self._count()

    def _is_late(self, optimizer: Optimizer) -> bool:
        """Whether the step is one more of the last row's, by another optimizer."""
        another = not self._backwards.passed and self._counts != id(optimizer)
        return another and self._row_before() is not None

    def _pass(self, optimizer: Optimizer) -> None:
        """Count a step of which nothing is read; the second of two optimizers ends none."""
        if self._backwards.passed or self._is_missed(optimizer):
            self._backwards.skip()
            self._count()
            self._optimizers.end_step()
            self.step = self.row.step = self.step + 1
            if self.step % self._every == 0:
                self._begin(self.step)

    def _count(self) -> None:
        self.steps += 1
        self._stepped_at = time.perf_counter()

    def _is_missed(self, optimizer: Optimizer) -> bool:
        """Whether there was a backward that reached no witness; then all are hooked again.

        Its gradient is left out, for what is there by now may have been clipped.
        """
        if self._backwards.everywhere or not self._optimizers.has_new(optimizer):
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
        self._backwards.paused = not due and self.knows_optimizers
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
