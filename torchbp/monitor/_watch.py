"""``torchbp.watch``."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from torchbp.monitor._about import about
from torchbp.monitor._catalogue import Catalogue
from torchbp.monitor._governor import Usual
from torchbp.monitor._journal import Journal
from torchbp.monitor._monitor import Monitor

__all__ = ["watch"]


def watch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
    *,
    log_dir: str | Path | None = None,
    writer: Any = None,
    every: int = Usual(1),
    sample_every: int = Usual(10),
    share: float | None = 0.01,
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
        every: Gradient norms are read every so many steps. Left at its default it is at times
            longer, up to 16 times, see ``share``; given, 1 too, it is kept.
        sample_every: Error signals are read every so many steps, and in the first five; likewise.
        share: The monitor keeps its share of the training time below this, where that can be done
            by looking less often: not in the first 300 steps, and not where trouble is in sight.
            None to look as often as ``every`` and ``sample_every`` say, whatever it costs.
        layers: Shell patterns of the names of the layers to watch, e.g. ``["encoder.*"]``.
        rank: The rank that writes; ``"auto"`` for 0. Without torch.distributed there is one rank.

    Returns:
        The monitor; also a context manager that closes it.

    Raises:
        TypeError: ``model`` is not a module, or ``optimizer`` none.
        OSError: ``log_dir`` can't be written; no hook was attached.
        ValueError: ``log_dir`` and ``writer`` both; a period below 1; a share that is not above 0;
            no trainable layer.

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
    if share is not None and not share > 0:
        message = f"watch: expected share > 0 or None, got {share}; 0.01 is 1 % of the time"
        raise ValueError(message)
    optimizers = _optimizers(optimizer)
    if isinstance(layers, str):
        layers = [layers]
    Catalogue(model, layers)  # refuses before anything is written
    journal = None
    if _is_writing_rank(rank) and (log_dir is not None or writer is not None):
        journal = Journal(_open(log_dir, writer), about(model, optimizers))
    return Monitor(
        model,
        optimizers,
        journal,
        every=every,
        sample_every=sample_every,
        share=share,
        layers=layers,
    )


def _optimizers(given: Any) -> list[torch.optim.Optimizer]:
    if given is None:
        return []
    several = isinstance(given, Iterable) and not isinstance(given, torch.optim.Optimizer)
    optimizers = [_inner(optimizer) for optimizer in (given if several else [given])]
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            got = type(optimizer).__name__
            message = f"watch: expected a torch.optim.Optimizer, or several, got {got}; pass the optimizer itself"
            raise TypeError(message)
    return optimizers


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
