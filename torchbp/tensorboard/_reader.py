"""The event file reader: a run's folder back as numpy arrays."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchbp.tensorboard._index import Index
from torchbp.tensorboard._layout import PLUGIN
from torchbp.tensorboard._vector import scalars, vectors
from torchbp.tensorboard._verdicts import verdicts

__all__ = ["Run", "Series", "read"]


@dataclass(frozen=True)
class Series:
    """One quantity over time.

    Attributes:
        steps: int64 ``(S,)``, ascending.
        times: float64 ``(S,)``, wall time in seconds since 1970.
        values: float32 ``(S, N)`` for a vector, ``(S,)`` for a scalar. NaN where nothing was there
            to measure; :func:`is_absent` tells such a NaN from one that was measured.
        names: One an entry; empty for a scalar.
        kinds: One an entry, e.g. the layer's class; may be empty.
        axis: What an entry stands for, e.g. ``"layer"``.
        unit: The unit of the values.
        title: What a chart of it is called.
    """

    steps: NDArray[np.int64]
    times: NDArray[np.float64]
    values: NDArray[np.float32]
    names: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    axis: str = ""
    unit: str = ""
    title: str = ""


@dataclass(frozen=True)
class Run:
    """All that a run's event files hold.

    Attributes:
        vectors: By quantity; ``"<quantity>/max"`` and ``"<quantity>/min"`` are the extremes of
            intervals.
        scalars: By tag, whoever wrote them.
        texts: By tag, ``(step, markdown)`` in order.
        records: By name, ``(step, value)`` in order: what JSON can hold.
        verdicts: What :attr:`torchbp.monitor.Monitor.verdicts` were, as mappings, and with
            ``quantities``, where to look; those that stand first, the gravest first.
        notes: What could not be read, and why.
    """

    vectors: dict[str, Series] = field(default_factory=dict)
    scalars: dict[str, Series] = field(default_factory=dict)
    texts: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    records: dict[str, list[tuple[int, Any]]] = field(default_factory=dict)
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read(run_dir: str | Path) -> Run:
    """Return what the event files in ``run_dir`` hold, as numpy arrays.

    A tail that is torn, of a run that was killed or still goes on, is left out. Where a run was
    resumed, what it had logged beyond the point it was resumed from is dropped, as in TensorBoard.

    Args:
        run_dir: The folder of one run, not of several.

    Returns:
        The run; empty where its files hold nothing yet.

    Raises:
        FileNotFoundError: There is no event file in ``run_dir``.

    Example:
        >>> import tempfile
        >>> from torchbp.tensorboard import EventWriter, read
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with EventWriter(folder) as writer:
        ...         writer.scalar("loss/train", 7, 0.5)
        ...     read(folder).scalars["loss/train"].steps
        array([7])
    """
    folder = Path(run_dir)
    index = Index(folder, foreign=True)
    if folder.is_dir():
        index.refresh()
    if not index.files:
        message = (
            f"read: expected a folder with event files, got {str(run_dir)!r} without any; "
            "give the log_dir of one run"
        )
        raise FileNotFoundError(message)
    run = Run(verdicts=verdicts(index) or [], notes=index.notes)
    for name, v in vectors(index).items():
        run.vectors[name] = Series(
            v.steps, v.times, v.read(), v.names, v.kinds, v.axis, v.unit, v.title
        )
    for name, s in scalars(index).items():
        run.scalars[name] = Series(s.steps, s.times, s.read()[:, 0])
    for name, tag in index.tags.items():
        points = list(zip(tag.steps, tag.values, strict=True))
        if tag.plugin == "text":
            run.texts[name] = [(step, str(text)) for step, text in points]
        elif tag.plugin == PLUGIN and "record" in tag.content:
            run.records[tag.content["record"]] = [(s, json.loads(str(v))) for s, v in points]
    return run
