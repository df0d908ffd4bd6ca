"""The monitor that ``torchbp.watch`` returns: what it knows, and when it drains, judges and writes."""

import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from torchbp.monitor._catalogue import Catalogue
from torchbp.monitor._desk import Desk
from torchbp.monitor._diagnosis import Layers, Moment, Reading, Verdict
from torchbp.monitor._governor import DRAIN_EVERY, UNSEEN, Governor, Periods, Vote
from torchbp.monitor._harvest import Sums, harvest, without_skipped
from torchbp.monitor._journal import Journal
from torchbp.monitor._judge import Judge
from torchbp.monitor._jump import Jump
from torchbp.monitor._ledger import Ledger, number
from torchbp.monitor._ranks import Shared
from torchbp.monitor._reader import Reader
from torchbp.monitor._registry import all_diagnoses
from torchbp.monitor._row import Row
from torchbp.monitor._signals import attend, leave
from torchbp.monitor._taps import is_compiled
from torchbp.monitor.capture import Capture

__all__ = ["Monitor", "monitors_of"]

_EARLY_DRAINS = frozenset({2, 5, 10, 20})
_DEAF = (
    "its layers can't be listened to, so error signals and activations are not seen, nor is vanishing "
    "or exploding"
)
_THAWED = "to see what has begun to learn since, close the monitor and watch the model again"
_open: weakref.WeakSet["Monitor"] = weakref.WeakSet()


def monitors_of(parameters: Iterable[Tensor]) -> list["Monitor"]:
    """Return the monitors that are open and watch one of ``parameters``."""
    asked = {id(p) for p in parameters}
    return [m for m in _open if any(id(p) in asked for _, p in m._catalogue.alive())]  # noqa: SLF001


class Monitor:
    """Watches one model; made by :func:`watch`."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        journal: Journal | None,
        *,
        every: int,
        sample_every: int,
        share: float | None,
        layers: Sequence[str] | None,
    ) -> None:
        self._name = type(model).__name__
        self._model = weakref.ref(model)
        self._catalogue = Catalogue(model, layers)
        self._journal = journal
        self._judge = Judge(all_diagnoses())
        self._reader = Reader()
        self._desk = Desk()
        self._layers: tuple[Layers, np.ndarray, np.ndarray] | None = None
        self._governor = Governor(share, every, sample_every)
        self._written = self._governor.periods
        self._jump, self._jumped, self._late_losses = Jump(), False, False
        self._reads = self._backwards = 0
        self._next = DRAIN_EVERY
        self._closed = False
        self._shared = Shared(model, self._catalogue)
        self._share_from = time.perf_counter(), 0.0
        self._drain_time = self._drains_from = self._own_from = 0.0
        self._capture = Capture(
            model,
            self._catalogue,
            optimizers,
            every=int(every),
            sample_every=int(sample_every),
            compiled=is_compiled(model),
            deliver=self._take,
        )
        self._ledger = Ledger(self._capture)
        # When the model goes, and when the process ends, nothing that was measured is lost.
        self._finalizer = weakref.finalize(model, self.close, local=True)
        if journal is not None:
            attend(id(self), partial(self.close, local=True))
        _open.add(self)

    # --------------------------------------------------------------------------------- the user
    @property
    def notes(self) -> list[str]:
        """What can't be seen of this model, or is seen less often than asked for, and why."""
        deaf = self._capture.deaf
        notes = [f"not seen: {deaf}: {_DEAF}"] if deaf else []
        model = self._model()
        late = self._catalogue.missing(model) if model is not None else []
        if late:
            names = ", ".join(late[:3]) + ", ..." * (len(late) > 3)
            notes.append(f"not seen: {names}, frozen when the model was watched; {_THAWED}")
        longest = self._governor.longest
        if longest != self._governor.asked:
            notes.append(f"seen less often, at times: {self._governor.told(longest)}")
        return notes

    @property
    def periods(self) -> Periods:
        """How often the monitor looks at present, in steps."""
        return self._governor.periods

    @property
    def step(self) -> int:
        """The step under way: the number of optimizer steps so far, or of backwards without one.

        Set it where a run is resumed from a checkpoint.
        """
        return self._capture.step

    @step.setter
    def step(self, step: int) -> None:
        self._capture.seek(step)

    @property
    def verdicts(self) -> list[Verdict]:
        """What was found so far, in the order in which it was found.

        Over several ranks: what was found at the last drain, for only all together can drain.
        """
        if not self._shared.ranks:
            self._drain(streams=True)
        self._desk.join()
        return list(self._judge.verdicts)

    def log_loss(
        self, *, train: Tensor | float | None = None, val: Tensor | float | None = None
    ) -> None:
        """Log the loss of the step under way, or of the last step if called after it.

        Args:
            train: The training loss, 0-d; a tensor is not waited for.
            val: The validation loss.
        """
        for name, value in (("loss_train", train), ("loss_val", val)):
            if value is not None:
                self.log(name, value)

    def log(self, name: str, value: Tensor | float) -> None:
        """Log a number of your own.

        Args:
            name: The tag it gets in TensorBoard.
            value: A number or a 0-d tensor, which is not waited for.

        Raises:
            ValueError: ``value`` is a tensor of more than one element.
        """
        value = number(name, value)
        if self._capture.away:
            return
        if name == "loss_train":
            if isinstance(value, Tensor):
                self._late_losses = True
            elif self._jump.note(value):
                self._jumped = True
                self._look()
        self._ledger.log(name, value)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave aside what happens in the block, as a trial on the side: it is neither counted nor logged.

        The step under way goes on behind it, so a trial that trains puts the parameters, and the very tensors that
        were their gradients, back. :func:`torchbp.lr_range_test` does all of this by itself.

        Example:
            >>> import copy, torch, torchbp
            >>> model = torch.nn.Linear(4, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> with torchbp.watch(model, optimizer) as monitor:
            ...     before = copy.deepcopy(model.state_dict())
            ...     with monitor.paused():
            ...         model(torch.ones(2, 4)).sum().backward()
            ...         optimizer.step()
            ...     _ = model.load_state_dict(before)
            ...     optimizer.zero_grad()
            ...     monitor.step
            0
        """
        start = time.perf_counter()
        try:
            with self._capture.paused():
                yield
        finally:
            since, spent = self._share_from
            self._share_from = since + time.perf_counter() - start, spent

    def summary(self) -> str:
        """Return the verdicts in plain words, or that nothing is wrong."""
        verdicts = sorted(self.verdicts, key=lambda v: v.step)
        count = self._capture.steps
        steps = f"{count} step" + ("" if count == 1 else "s")
        head = f"{self._name}, {steps}, {len(self._catalogue)} layers watched"
        if not verdicts:
            return "\n".join([f"{head}: nothing is wrong", *self.notes])
        return "\n".join([f"{head}:", *map(str, verdicts), *self.notes])

    def close(self, *, local: bool = False) -> None:
        """Write what is left, remove all hooks, close the file. A second call does nothing.

        Args:
            local: Don't wait for other ranks: what only all of them together know of the last
                steps is left out. A ``with`` block that ends in an exception closes so.
        """
        if self._closed:
            return
        self._closed = True
        _open.discard(self)
        self._finalizer.detach()
        leave(id(self))
        self._capture.close()
        try:
            self._drain(local=local, streams=True)
            self._desk.close()
        finally:
            if self._journal is not None:
                self._journal.close()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(local=kind is not None)

    def __str__(self) -> str:
        return self.summary()

    # ---------------------------------------------------------------------------------- the work
    def _take(self, row: Row) -> None:
        own, governor = self._capture.own_time, self._governor
        governor.note(row.sampled, own - self._own_from, 1e-3 * row.host["step_time"])
        self._own_from = own
        if row.sampled:
            since, spent = self._share_from
            now, own = time.perf_counter(), own + self._drain_time + self._desk.spent
            row.host["monitor_share"] = UNSEEN * (own - spent) / max(now - since, 1e-9)
            self._share_from = now, own
        self._ledger.add(row)
        self._reads += 1
        self._backwards += row.backwards
        # Ranks may skip different steps, so over several of them backward passes are counted.
        count = self._backwards if self._shared.ranks else self._reads
        if self._capture.turns:
            governor.keep_reading()
        if self._closed:
            return
        if self._judge.restless or self._jumped:
            self._look()
        if count >= self._next:
            self._drain(keep=1, votes=True)
            between = governor.periods.drain_every // governor.periods.every
            self._next = between * (count // between + 1)
        elif self._reads in _EARLY_DRAINS and not self._shared.ranks:
            self._drain(keep=1)

    def _look(self) -> None:
        """Look closely now; several ranks do when they meet."""
        if not self._shared.ranks and self._governor.look(self._capture.steps):
            self._pace()

    def _jumps(self, readings: Sequence[Reading]) -> bool:
        losses = [float(r.values["loss_train"][0]) for r in readings if "loss_train" in r.values]
        return sum(map(self._jump.note, losses)) > 0

    def _pace(self) -> None:
        periods = self._governor.periods
        self._capture.pace(periods.every, periods.sample_every)

    def _vote(self) -> Vote:
        spent = self._drain_time + self._desk.spent
        drain, self._drains_from = spent - self._drains_from, spent
        restless, self._jumped = self._judge.restless or self._jumped, False
        return self._governor.vote(drain, restless=restless)

    def _drain(
        self, *, keep: int = 0, local: bool = False, votes: bool = False, streams: bool = False
    ) -> None:
        """Send rows to the host, to be judged and written there.

        ``keep``: so many of the last stay behind, for their loss may be logged after the step.
        ``votes``: decide how often to look from now on.
        ``streams``: called from anywhere, perhaps in another stream of a GPU than training was in.
        """
        rows, between = self._ledger.take_out(keep)
        if not rows and not between:
            return
        start = time.perf_counter()
        if self._layers is None:
            self._layers = self._catalogue.layers()
        self._capture.settle()
        count = len(self._catalogue)
        ranks = self._shared.ranks
        size = len(self._catalogue.parameters)
        arrive = harvest(rows, size, count, apart=ranks, streams=streams)
        vote = self._vote() if votes else Vote()
        if ranks:
            sums = arrive()
            if local:
                self._shared.without_shards(sums)
            else:
                vote = self._shared.add(sums, count, vote)
            arrive = partial(list, sums)
        if votes and self._governor.decide(self._capture.steps, vote, self._shared.count):
            self._pace()
        periods = self.periods
        self._desk.put(lambda: self._work(arrive(), between, periods))
        self._drain_time += time.perf_counter() - start

    def _work(self, sums: list[Sums], between: list[Moment], periods: Periods) -> None:
        assert self._layers is not None
        journal, failure = self._journal, None
        blocks, readings = self._reader.read(without_skipped(sums), *self._layers, between)
        self._judge.consider(readings)
        if self._late_losses and self._jumps(readings):
            self._jumped = True
        if journal is not None and (readings or between):
            try:
                journal.write(blocks, readings, between)
                step = readings[-1].step if readings else between[-1][0]
                journal.verdicts(step, self._judge.verdicts)
                if periods != self._written:
                    journal.periods(step, self._governor.told(periods))
                    self._written = periods
            except (OSError, ValueError) as error:  # a full disk ends the files, not verdicts
                self._journal, failure = None, error
        if failure is not None:
            raise failure
