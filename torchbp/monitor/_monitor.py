"""``torchbp.watch`` and the monitor it returns."""

import time
import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

from torchbp.monitor._about import about
from torchbp.monitor._catalogue import Catalogue
from torchbp.monitor._desk import Desk
from torchbp.monitor._diagnosis import Layers, Verdict
from torchbp.monitor._harvest import Sums, harvest, reduced
from torchbp.monitor._journal import Journal
from torchbp.monitor._judge import Judge
from torchbp.monitor._reader import Reader
from torchbp.monitor._registry import all_diagnoses
from torchbp.monitor._row import Row
from torchbp.monitor._signals import attend, leave
from torchbp.monitor.capture import Capture

__all__ = ["Monitor", "watch"]

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
        self._shared = _Shared(model, self._catalogue)
        self._share_from = time.perf_counter(), 0.0
        self._drain_time = 0.0
        self._capture = Capture(
            model,
            self._catalogue,
            optimizers,
            every=every,
            sample_every=sample_every,
            compiled=_is_compiled(model),
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
            value = value.detach().clone()
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
        count = len(self._catalogue)
        arrive = harvest(rows, len(self._catalogue.parameters), count)
        if self._shared.ranks:
            sums = arrive()
            sums = self._shared.without_shards(sums) if local else self._shared.add(sums, count)
            arrive = partial(list, sums)
        self._desk.put(lambda: self._work(arrive()))
        del self._rows[: len(rows)]
        self._drain_time += time.perf_counter() - start

    def _work(self, rows: list[Sums]) -> None:
        assert self._layers is not None
        journal, failure = self._journal, None
        readings = [self._reader.read(sums, *self._layers) for sums in rows]
        for reading in readings:
            self._judge.consider(reading)
        if journal is not None and rows:
            try:
                journal.write(readings)
                journal.verdicts(rows[-1].row.step, self._judge.verdicts)
            except (OSError, ValueError) as error:  # a full disk ends the files, not verdicts
                self._journal, failure = None, error
        if failure is not None:
            raise failure


class _Shared:
    """What ranks have in common.

    Attributes:
        ranks: Whether the model is spread over several, by DDP or as DTensors.
    """

    def __init__(self, model: nn.Module, catalogue: Catalogue) -> None:
        parameters = [p for _, p in catalogue.alive()]
        sharded = [isinstance(p, DTensor) for p in parameters]
        spread = isinstance(model, DistributedDataParallel) or any(sharded)
        self.ranks = spread and torch.distributed.get_world_size() > 1
        if not self.ranks:
            return
        self._whole = not any(sharded)
        first = torch.distributed.get_rank() == 0
        self._mine = np.array([_adds(p) if isinstance(p, DTensor) else first for p in parameters])
        backend = torch.distributed.get_backend()
        self._device = parameters[0].device if "nccl" in backend else torch.device("cpu")

    def add(self, rows: list[Sums], layers: int) -> list[Sums]:
        """Sum over the ranks."""
        return reduced(rows, self._mine, layers, self._device)

    def without_shards(self, rows: list[Sums]) -> list[Sums]:
        """Drop what this rank has only a part of."""
        for sums in rows:
            sums.layers.clear()
            sums.host.pop("local_square", None)
            if not self._whole:
                sums.parameters.clear()
        return rows


def _adds(parameter: DTensor) -> bool:
    """Whether this rank adds its shard: of replicas only the first does."""
    coordinate = parameter.device_mesh.get_coordinate()
    places = zip(parameter.placements, coordinate or (), strict=False)
    return all(at == 0 for placement, at in places if isinstance(placement, Replicate))


def _is_compiled(model: nn.Module) -> bool:
    return any(
        hasattr(module, "_orig_mod") or module._compiled_call_impl is not None  # noqa: SLF001
        for module in model.modules()
    )


def watch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
    *,
    log_dir: str | Path | None = None,
    writer: Any = None,
    every: int = 1,
    sample_every: int = 10,
    layers: Sequence[str] | None = None,
    rank: int | Literal["auto"] = "auto",
) -> Monitor:
    """Watch the gradients of ``model`` while it trains, and say what is wrong.

    Nothing else changes in the training loop: a step is counted when ``optimizer`` steps, and its
    gradients are those that the last backward before it left, before clipping.

    Args:
        model: The model. It is referred to weakly and gets no module hooks.
        optimizer: The optimizer, or several. Without one every backward counts as a step.
        log_dir: Folder for TensorBoard, one a run. With neither this nor ``writer`` there are
            verdicts only.
        writer: A ``torch.utils.tensorboard.SummaryWriter`` to write into instead; stays open.
        every: Gradient norms are read every so many steps.
        sample_every: Error signals are read every so many steps, and in the first five.
        layers: Shell patterns of the names of the layers to watch, e.g. ``["encoder.*"]``.
        rank: The rank that writes; ``"auto"`` for 0. Without torch.distributed there is one rank.

    Returns:
        The monitor; also a context manager that closes it.

    Raises:
        TypeError: ``model`` is not a module.
        OSError: ``log_dir`` can't be written; no hook was attached.
        ValueError: ``log_dir`` and ``writer`` both; a period below 1; no trainable layer.

    Example:
        >>> import torch, torchbp
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with torchbp.watch(model, optimizer) as monitor:
        ...     for _ in range(20):
        ...         loss = model(torch.randn(16, 4)).square().mean()
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         optimizer.step()
        >>> print(monitor.summary())
        Sequential, 20 steps, 2 layers watched: nothing is wrong
    """
    if not isinstance(model, nn.Module):
        got = type(model).__name__
        message = f"watch: expected a torch.nn.Module, got {got}; pass the model itself"
        raise TypeError(message)
    if log_dir is not None and writer is not None:
        message = "watch: expected log_dir or writer, got both; give one"
        raise ValueError(message)
    for name, period in (("every", every), ("sample_every", sample_every)):
        if period < 1:
            message = f"watch: expected {name} >= 1, got {period}; 1 is every step"
            raise ValueError(message)
    if optimizer is None:
        optimizers: list[torch.optim.Optimizer] = []
    elif isinstance(optimizer, torch.optim.Optimizer):
        optimizers = [optimizer]
    else:
        optimizers = list(optimizer)
    optimizers = [_inner(optimizer) for optimizer in optimizers]
    if isinstance(layers, str):
        layers = [layers]
    Catalogue(model, layers)  # refuses before anything is written
    journal = None
    if _is_writing_rank(rank) and (log_dir is not None or writer is not None):
        journal = Journal(_open(log_dir, writer), about(model, optimizers))
    return Monitor(
        model, optimizers, journal, every=every, sample_every=sample_every, layers=layers
    )


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer that steps: Lightning's and accelerate's wrap one."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _open(log_dir: str | Path | None, writer: Any) -> Any:
    from torchbp.tensorboard import BorrowedWriter, EventWriter

    if log_dir is None:
        return BorrowedWriter(writer)
    try:
        return EventWriter(log_dir)
    except OSError as error:
        reason = error.strerror or str(error)
        message = (
            f"watch: expected a log_dir that can be written, got {str(log_dir)!r} ({reason}); "
            "give another folder"
        )
        raise type(error)(error.errno, message) from error


def _is_writing_rank(rank: int | Literal["auto"]) -> bool:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return True
    return distributed.get_rank() == (0 if rank == "auto" else rank)
