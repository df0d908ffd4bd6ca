"""``torchbp.watch`` and the monitor it returns."""

import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from torchbp.monitor._catalogue import Catalogue
from torchbp.monitor._diagnosis import Layers, Reading, Verdict
from torchbp.monitor._journal import Journal
from torchbp.monitor._judge import Judge
from torchbp.monitor._registry import all_diagnoses, all_quantities
from torchbp.monitor.capture import Capture, Row

__all__ = ["Monitor", "watch"]

_DRAIN_EVERY = 50
_EARLY_DRAINS = frozenset({1, 5, 10, 20})


class Monitor:
    """Watches one model; made by :func:`watch`.

    Attributes:
        verdicts: What was found so far, in the order in which it was found.
    """

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
        self._rows: list[Row] = []
        self._logged: dict[str, Any] = {}
        self._layers: tuple[Layers, np.ndarray, np.ndarray] | None = None
        self._steps = 0
        self._closed = False
        self._capture = Capture(
            model,
            self._catalogue,
            optimizers,
            every=every,
            sample_every=sample_every,
            deliver=self._take,
        )
        # When the model goes, and when the process ends, nothing that was measured is lost.
        self._finalizer = weakref.finalize(model, self.close)

    # --------------------------------------------------------------------------------- the user
    @property
    def step(self) -> int:
        """The step under way: the number of optimizer steps so far, or of backwards without one."""
        return self._capture.step

    @property
    def verdicts(self) -> list[Verdict]:
        """What was found so far, in the order in which it was found."""
        self._drain()
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
        if self._rows and not self._capture.under_way:
            self._rows[-1].host[name] = value
        else:
            self._logged[name] = value

    def summary(self) -> str:
        """Return the verdicts in plain words, or that nothing is wrong."""
        verdicts = self.verdicts
        head = f"{self._name}, {self._steps} steps, {len(self._catalogue)} layers watched"
        if not verdicts:
            return f"{head}: nothing is wrong"
        return "\n".join([f"{head}:", *map(str, verdicts)])

    def close(self) -> None:
        """Write what is left, remove all hooks, close the file. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._capture.close()
        self._finalizer.detach()
        try:
            self._drain()
        finally:
            if self._journal is not None:
                self._journal.close()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __str__(self) -> str:
        return self.summary()

    # ---------------------------------------------------------------------------------- the work
    def _take(self, row: Row) -> None:
        row.host.update(self._logged)
        self._logged = {}
        self._rows.append(row)
        self._steps += 1
        if self._steps % _DRAIN_EVERY == 0 or self._steps in _EARLY_DRAINS:
            self._drain(keep=1)

    def _drain(self, keep: int = 0) -> None:
        """Bring rows to the host, judge them, write them.

        ``keep``: so many of the last stay behind, for their loss may be logged after the step.
        """
        split = len(self._rows) - keep
        rows, self._rows = self._rows[:split], self._rows[split:]
        if not rows:
            return
        if self._layers is None:
            self._layers = self._catalogue.layers()
        for row in rows:
            reading = self._read(row, *self._layers)
            self._judge.consider(reading)
            if self._journal is not None:
                self._journal.write(reading, row.when, chart=bool(row.errors))
        if self._journal is not None:
            self._journal.verdicts(rows[-1].step, self._judge.verdicts)

    def _read(self, row: Row, layers: Layers, order: np.ndarray, columns: np.ndarray) -> Reading:
        quantities = all_quantities()
        values: dict[str, np.ndarray] = {}
        present: dict[str, np.ndarray] = {}
        squares = np.zeros(len(layers.parameters))
        for indices, piece in row.gradients:
            squares[indices] = piece.double().cpu().numpy()
        finish = quantities["gradient_norm"].finish
        assert finish is not None
        values["gradient_norm"] = finish(squares)[columns]
        if row.errors:
            sums, counts = np.zeros(len(order)), np.zeros(len(order))
            for place, parts in row.errors.items():
                sums[place] = sum(float(square) for square, _ in parts)
                counts[place] = sum(count for _, count in parts)
            finish = quantities["error_signal"].finish
            assert finish is not None
            there = counts[order] > 0
            signals = finish(sums, counts)[order]
            values["error_signal"] = np.where(there, signals, np.nan)
            present["error_signal"] = there
        for name, value in row.host.items():
            values[name] = np.atleast_1d(np.asarray(_number(value), np.float64))
        reading = Reading(row.step, values, present, layers)
        for quantity in quantities.values():
            if quantity.at == "derived" and quantity.finish is not None:
                derived = quantity.finish(reading)
                if derived is not None:
                    values[quantity.name] = derived
        return reading


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
    if isinstance(layers, str):
        layers = [layers]
    Catalogue(model, layers)  # refuses before anything is written
    journal = None
    if _is_writing_rank(rank) and (log_dir is not None or writer is not None):
        journal = Journal(_open(log_dir, writer))
    return Monitor(
        model, optimizers, journal, every=every, sample_every=sample_every, layers=layers
    )


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


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
