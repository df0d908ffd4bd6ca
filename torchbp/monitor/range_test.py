"""``torchbp.lr_range_test``: which learning rates suit a model, found in one short run that leaves no trace."""

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from torchbp._random import forked
from torchbp.monitor._monitor import monitors_of

__all__ = ["RangeTest", "lr_range_test"]

_LEAST = 10  # steps before a rise of the loss may end the test: the first losses scatter
_FALLEN = 4.0  # standard deviations of the smoothed loss, below where it began: less may be the batches' doing


@dataclass(frozen=True)
class RangeTest:
    """What :func:`lr_range_test` measured. ``print`` it.

    Attributes:
        rates: float64 ``(S,)``: the learning rate of each step, of the first parameter group.
        losses: float64 ``(S,)``: the batch's loss before that step.
        smoothed: float64 ``(S,)``: ``losses`` under a centred triangular window.
        suggestion: The rate where the smoothed loss falls most steeply over log(rate), of those that took it below its
            beginning by more than batches scatter; None where none does.
        lowest: The rate of the lowest smoothed loss; above it training begins to diverge.
    """

    rates: NDArray[np.float64]
    losses: NDArray[np.float64]
    smoothed: NDArray[np.float64]
    suggestion: float | None
    lowest: float

    def __str__(self) -> str:
        head = f"learning rates {self.rates[0]:.1e} to {self.rates[-1]:.1e} in {len(self.rates)} steps: "
        if self.suggestion is None:
            return (
                head
                + "the loss never falls by more than batches scatter; raise end= or steps=, take larger batches, "
                "or look for a vanished gradient"
            )
        head += f"try {self.suggestion:.1e}; the loss is lowest at {self.lowest:.1e}"
        if self.lowest == self.rates[-1]:
            return head + ", the last: where it diverges lies beyond"
        return head + " and diverges beyond"

    def plot(self, axes: Any = None) -> Any:
        """Draw the losses over the rates, with the suggestion, and return the axes.

        Args:
            axes: matplotlib's axes; made where None.

        Raises:
            ImportError: matplotlib is not installed.
        """
        if axes is None:
            from matplotlib.figure import Figure

            axes = Figure(figsize=(6, 4), layout="constrained").add_subplot()
        axes.plot(self.rates, self.losses, ".", color="0.7", label="a batch")
        axes.plot(self.rates, self.smoothed, color="tab:blue", label="smoothed")
        if self.suggestion is not None:
            axes.axvline(
                self.suggestion, color="tab:orange", label=f"suggested {self.suggestion:.1e}"
            )
        axes.axvline(self.lowest, color="0.5", linestyle=":", label=f"lowest at {self.lowest:.1e}")
        low, high = self.smoothed.min(), self.smoothed[0]
        axes.set(
            xscale="log",
            xlabel="learning rate",
            ylabel="loss",
            ylim=(low - 0.1 * (high - low), None),
        )
        if high > low:
            axes.set_ylim(top=high + (high - low))
        axes.legend()
        return axes


def lr_range_test(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    *,
    start: float = 1e-7,
    end: float = 10.0,
    steps: int = 100,
    stop: float = 4.0,
    log_dir: str | Path | None = None,
) -> RangeTest:
    """Train for ``steps`` steps while the learning rate grows from ``start`` to ``end``, and suggest one.

    ``rate(i) = start · (end/start)^(i/(steps−1))`` for the first parameter group; the others keep their ratio to it.
    Too low a rate leaves the loss where it is, a right one lets it fall, too high a one makes it diverge: there the
    test ends. Afterwards parameters, buffers, gradients, the optimizer, the mode and the random number generators are
    what they were. A monitor of :func:`watch` that watches the model is paused meanwhile: its steps and its log are
    those of the run alone.

    Args:
        model: Any module; trained in ``train()`` mode, on the device of its first parameter.
        optimizer: Any optimizer over the model's parameters; its own rates are left aside meanwhile.
        loader: Yields ``(input, target)``; begun again when it ends.
        loss: ``loss(model(input), target)``, 0-d.
        start: First rate, > 0.
        end: Last rate, > start.
        steps: Steps, ≥ 10.
        stop: End early where the smoothed loss is above ``stop`` times the lowest so far, or not finite.
        log_dir: Where TensorBoard shows the test: loss and rate over the steps as scalars and, with matplotlib
            installed, the loss over the rate as a picture.

    Returns:
        Rates, losses, and the suggested rate.

    Raises:
        ValueError: A number is out of its range, or the loader is empty.
        TypeError: The loader yields something else than pairs.

    Example:
        >>> import torch, torchbp
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 1)
        >>> x = torch.randn(256, 4)
        >>> batches = [(rows, rows.sum(1, keepdim=True)) for rows in x.split(32)]
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> test = torchbp.lr_range_test(model, optimizer, batches, torch.nn.functional.mse_loss)
        >>> 1e-3 < test.suggestion < 1
        True

    References:
        Leslie N. Smith, Cyclical Learning Rates for Training Neural Networks, 2017, arXiv:1506.01186, section 3.3
        (there with a linear growth); the exponential growth and the steepest descent are those of fastai's lr_find.
    """
    _demand(start > 0, "start > 0", start)
    _demand(end > start, f"end > start = {start}", end)
    _demand(steps >= _LEAST, f"steps >= {_LEAST}", steps)
    rates = np.geomspace(start, end, steps)
    with _restored(model, optimizer):
        losses = list(_losses(model, optimizer, loader, loss, rates, stop))
    finite = np.isfinite(losses)
    if not finite.any():
        message = f"lr_range_test: expected a finite loss, got {losses[0]} at the first step; look at the data"
        raise ValueError(message)
    result = _judged(rates[: len(losses)][finite], np.array(losses)[finite], steps)
    if log_dir is not None:
        _write(result, Path(log_dir))
    return result


def _demand(holds: bool, rule: str, value: float) -> None:
    if not holds:
        message = f"lr_range_test: expected {rule}, got {value}; choose another"
        raise ValueError(message)


@contextmanager
def _restored(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Give back all that training changes, also after an exception, while nobody watches."""
    tensors = [*model.parameters(), *model.buffers()]
    values = [t.detach().clone() for t in tensors]
    # Of what the optimizer has not, only what was written to: a monitor knows by the version what nobody trains.
    untrained = {p: p._version for p in model.parameters()}  # noqa: SLF001
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            untrained.pop(parameter, None)
    gradients = [(p, p.grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    state = copy.deepcopy(optimizer.state_dict())
    try:
        with ExitStack() as stack, forked():
            for monitor in monitors_of(model.parameters()):
                stack.enter_context(monitor.paused())
            for parameter in model.parameters():
                parameter.grad = None
            model.train()
            yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                if untrained.get(tensor) != tensor._version:  # noqa: SLF001
                    tensor.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, mode in modes:
            module.training = mode
        optimizer.load_state_dict(state)


def _losses(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    rates: NDArray[np.float64],
    stop: float,
) -> Iterator[float]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    first = optimizer.param_groups[0]["lr"] or 1.0
    shares = [float(group["lr"] / first) if first else 1.0 for group in optimizer.param_groups]
    smooth, weight, lowest = 0.0, 0.0, math.inf
    for i, (rate, batch) in enumerate(zip(rates, _endless(loader), strict=False)):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            message = (
                f"lr_range_test: expected a loader of (input, target) pairs, got {type(batch).__name__}; "
                "wrap it in a generator that yields pairs"
            )
            raise TypeError(message)
        x, y = (part.to(device) if isinstance(part, Tensor) else part for part in batch)
        for group, share in zip(optimizer.param_groups, shares, strict=True):
            group["lr"] = rate * share
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        yield (measured := float(value.detach()))
        smooth, weight = 0.9 * smooth + 0.1 * measured, 0.9 * weight + 0.1
        lowest = min(lowest, smooth / weight) if i >= _LEAST // 2 else lowest
        if not math.isfinite(measured) or (i >= _LEAST and smooth / weight > stop * lowest > 0):
            return


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            message = "lr_range_test: expected a loader that yields batches, got an empty one; give a DataLoader"
            raise ValueError(message)


def _judged(rates: NDArray[np.float64], losses: NDArray[np.float64], steps: int) -> RangeTest:
    """Smooth without a lag, which would shift the suggestion upwards, and find the steepest descent."""
    reach = min(max(steps // 20, 1), (len(losses) - 1) // 2)
    window = np.bartlett(2 * reach + 3)[1:-1] if reach else np.ones(1)
    padded = np.pad(losses, reach, mode="edge")
    smoothed = np.convolve(padded, window / window.sum(), mode="valid").astype(np.float64)
    least = int(smoothed.argmin())
    # At first the rate is too low to matter: from one loss to the next it is another batch, no more.
    first = losses[: max(len(losses) // 4, _LEAST // 2)]
    share = np.sqrt(np.square(window).sum()) / window.sum()
    scatter = np.diff(first).std() / np.sqrt(2) * share if len(first) > 1 else 0.0
    below = smoothed[1 : least + 1] < np.median(first) - _FALLEN * scatter
    suggestion = None
    if below.any():
        slopes = np.diff(smoothed[: least + 1]) / np.diff(np.log(rates[: least + 1]))
        steepest = int(np.where(below, slopes, np.inf).argmin())
        suggestion = float(np.sqrt(rates[steepest] * rates[steepest + 1]))
    return RangeTest(rates, losses, smoothed, suggestion, float(rates[least]))


def _write(result: RangeTest, log_dir: Path) -> None:
    from torch.utils.tensorboard.writer import SummaryWriter

    with SummaryWriter(str(log_dir)) as writer:
        for step, (rate, value) in enumerate(zip(result.rates, result.losses, strict=True)):
            writer.add_scalar("lr_range_test/loss", value, step)
            writer.add_scalar("lr_range_test/log10_rate", math.log10(rate), step)
        writer.add_text("lr_range_test/suggestion", str(result))
        try:
            figure = result.plot().figure
        except ImportError:
            warnings.warn(
                "lr_range_test: matplotlib is not installed, so log_dir has no picture",
                stacklevel=3,
            )
        else:
            writer.add_figure("lr_range_test/loss over rate", figure)
