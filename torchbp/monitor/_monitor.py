"""The monitor that ``torchbp.watch`` returns: what it knows, and when it drains, judges and writes."""

import time
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchbp.monitor._catalogue import Catalogue
from torchbp.monitor._desk import Desk
from torchbp.monitor._diagnosis import Layers, Verdict
from torchbp.monitor._harvest import Sums, harvest
from torchbp.monitor._journal import Journal
from torchbp.monitor._judge import Judge
from torchbp.monitor._ranks import Shared
from torchbp.monitor._reader import Reader
from torchbp.monitor._registry import all_diagnoses
from torchbp.monitor._row import Row
from torchbp.monitor._signals import attend, leave
from torchbp.monitor._taps import is_compiled
from torchbp.monitor.capture import Capture

__all__ = ["Monitor"]

_DRAIN_EVERY = 50
_EARLY_DRAINS = frozenset({2, 5, 10, 20})
_DEAF = (
    "the model had been compiled and called before it was watched: its layers can't be listened to, "
    "so error signals and activations are not seen, nor is vanishing or exploding; watch it before "
    "its first call"
)


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
        layers: Sequence[str] | None,
    ) -> None:
        self._name = type(model).__name__
        self._catalogue = Catalogue(model, layers)
        self._journal = journal
        self._judge = Judge(all_diagnoses())
        self._reader = Reader()
        self._desk = Desk()
        self._rows: list[Row] = []
        self._logged: dict[str, Any] = {}
        self._layers: tuple[Layers, np.ndarray, np.ndarray] | None = None
        self._steps = self._backwards = 0
        self._closed = False
        self._shared = Shared(model, self._catalogue)
        self._share_from = time.perf_counter(), 0.0
        self._drain_time = 0.0
        self._capture = Capture(
            model,
            self._catalogue,
            optimizers,
            every=every,
            sample_every=sample_every,
            compiled=is_compiled(model),
            deliver=self._take,
        )
        # When the model goes, and when the process ends, nothing that was measured is lost.
        self._finalizer = weakref.finalize(model, self.close, local=True)
        if journal is not None:
            attend(id(self), partial(self.close, local=True))

    # --------------------------------------------------------------------------------- the user
    @property
    def notes(self) -> list[str]:
        """What can't be seen of this model, and why."""
        return [_DEAF] if self._capture.deaf else []

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
            self._drain()
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
        if isinstance(value, Tensor):
            if value.numel() != 1:
                message = (
                    f"log: expected one number for {name!r}, got shape {tuple(value.shape)}; "
                    "reduce it, e.g. by .mean()"
                )
                raise ValueError(message)
            value = (
                value.item() if type(value) is Tensor and value.is_cpu else value.detach().clone()
            )
        last = self._rows[-1] if self._rows else None
        if last is None or self._capture.row.backwards or name in last.host:
            self._logged[name] = value
        else:
            last.host[name] = value

    def summary(self) -> str:
        """Return the verdicts in plain words, or that nothing is wrong."""
        verdicts = sorted(self.verdicts, key=lambda v: v.step)
        steps = f"{self._steps} step" + ("" if self._steps == 1 else "s")
        head = f"{self._name}, {steps}, {len(self._catalogue)} layers watched"
        notes = [f"not seen: {note}" for note in self.notes]
        if not verdicts:
            return "\n".join([f"{head}: nothing is wrong", *notes])
        return "\n".join([f"{head}:", *map(str, verdicts), *notes])

    def close(self, *, local: bool = False) -> None:
        """Write what is left, remove all hooks, close the file. A second call does nothing.

        Args:
            local: Don't wait for other ranks: what only all of them together know of the last
                steps is left out. A ``with`` block that ends in an exception closes so.
        """
        if self._closed:
            return
        self._closed = True
        self._finalizer.detach()
        leave(id(self))
        self._capture.close()
        try:
            self._drain(local=local)
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
        row.host.update(self._logged)
        self._logged = {}
        if row.sampled:
            since, spent = self._share_from
            now, own = time.perf_counter(), self._capture.own_time + self._drain_time
            row.host["monitor_share"] = (own - spent) / max(now - since, 1e-9)
            self._share_from = now, own
        self._rows.append(row)
        self._steps += 1
        # Ranks may skip different steps, so over several of them backward passes are counted.
        before, self._backwards = self._backwards, self._backwards + row.backwards
        due = self._steps in _EARLY_DRAINS or self._steps % _DRAIN_EVERY == 0
        if self._shared.ranks:
            due = before // _DRAIN_EVERY != self._backwards // _DRAIN_EVERY
        if due and not self._closed:
            self._drain(keep=1)

    def _drain(self, *, keep: int = 0, local: bool = False) -> None:
        """Send rows to the host, to be judged and written there.

        ``keep``: so many of the last stay behind, for their loss may be logged after the step.
        """
        rows = self._rows[: len(self._rows) - keep]
        if not rows:
            return
        start = time.perf_counter()
        if self._layers is None:
            self._layers = self._catalogue.layers()
        self._capture.settle()
        count = len(self._catalogue)
        ranks = self._shared.ranks
        arrive = harvest(rows, len(self._catalogue.parameters), count, apart=ranks)
        if ranks:
            sums = arrive()
            sums = self._shared.without_shards(sums) if local else self._shared.add(sums, count)
            arrive = partial(list, sums)
        self._desk.put(lambda: self._work(arrive()))
        del self._rows[: len(rows)]
        self._drain_time += time.perf_counter() - start

    def _work(self, sums: list[Sums]) -> None:
        assert self._layers is not None
        journal, failure = self._journal, None
        blocks, readings = self._reader.read(sums, *self._layers)
        self._judge.consider(readings)
        if journal is not None and readings:
            try:
                journal.write(blocks, readings)
                journal.verdicts(readings[-1].step, self._judge.verdicts)
            except (OSError, ValueError) as error:  # a full disk ends the files, not verdicts
                self._journal, failure = None, error
        if failure is not None:
            raise failure
