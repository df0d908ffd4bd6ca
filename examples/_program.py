"""What every example shares: the common options, the progress bar, and how it ends."""

import argparse
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from torchbp.monitor import Monitor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all examples have.

    Args:
        doc: The example's docstring: its help.
        name: The example's name, from which the default of ``--log-dir`` is made.
    """
    made = argparse.ArgumentParser(
        prog=f"{name}.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path("runs") / time.strftime(f"{name}-%Y%m%d-%H%M%S")
    made.add_argument(
        "--log-dir", type=Path, default=default, help="TensorBoard's folder (runs/...)"
    )
    made.add_argument("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    made.add_argument(
        "--small", action="store_true", help="a few seconds' run, whose results mean nothing"
    )
    return made


def track(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yield ``items`` under a progress bar that stays quiet in a log file."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True) as progress:
        yield from progress.track(items, total, description=what)


def batches(count: int, size: int, steps: int) -> Iterator[torch.Tensor]:
    """Yield ``steps`` times the row numbers of a batch: epochs of ``count`` rows in random order, last part dropped."""
    while True:
        for rows in torch.randperm(count).split(size):
            if steps <= 0:
                return
            if len(rows) == min(size, count):
                steps -= 1
                yield rows


def finish(
    args: argparse.Namespace,
    results: Mapping[str, float],
    *,
    promised: Mapping[str, bool],
    monitor: Monitor | None = None,
) -> int:
    """Tell what came out, keep it in ``results.json`` beside the logs, and return the exit status.

    Args:
        args: From :func:`parser`.
        results: What was measured, by name.
        promised: Statements that must hold at full size.
        monitor: Its verdicts are told.

    Returns:
        1 if a promise is broken in a run of full size, else 0.
    """
    verdicts = monitor.verdicts if monitor else []
    width = max(map(len, results))
    for name, value in results.items():
        print(f"  {name:{width}}  {value:.4g}")
    for statement, holds in promised.items():
        print(f"  {'holds' if holds else 'small run' if args.small else 'BROKEN':>9}: {statement}")
    if monitor:
        print(monitor.summary())
    args.log_dir.mkdir(parents=True, exist_ok=True)
    told = {
        "results": dict(results),
        "promised": dict(promised),
        "verdicts": [f"{v.kind} {v.severity} {v.layer} {v.step}" for v in verdicts],
    }
    (args.log_dir / "results.json").write_text(json.dumps(told, indent=1))
    print(f"look at it: tensorboard --logdir {args.log_dir}")
    return int(not args.small and not all(promised.values()))


def draw_pictures(path: Path, rows: Mapping[str, torch.Tensor]) -> None:
    """Draw pictures ``(N, 1, H, W)`` row by row, with the names as titles, into a PNG file."""
    from matplotlib.figure import Figure

    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(columns * 0.9, len(rows) * 1.15), layout="constrained")
    for part, (name, pictures) in zip(
        figure.subfigures(len(rows), squeeze=False).flat, rows.items(), strict=True
    ):
        part.suptitle(name, fontsize=9)
        for axes, picture in zip(part.subplots(1, columns), pictures, strict=True):
            axes.imshow(picture[0], cmap="gray", vmin=0, vmax=1)
            axes.set_axis_off()
    _save(figure, path)


def draw_heat_map(
    path: Path, values: list[list[float]], rows: list[str], columns: list[str], title: str
) -> None:
    """Draw ``values``, coloured by their logarithm and with its nearest power of ten written in, into a PNG file."""
    import numpy as np
    from matplotlib.figure import Figure

    logs = np.log10(np.maximum(np.array(values), 1e-45))
    figure = Figure(figsize=(2.5 + 1.2 * len(columns), 1 + 0.28 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(logs, cmap="viridis", aspect="auto", vmin=-12, vmax=2)
    axes.set(xticks=range(len(columns)), yticks=range(len(rows)))
    figure.suptitle(title, fontsize=10)
    axes.set_xticklabels(columns)
    axes.set_yticklabels(rows, fontsize=8)
    for (i, j), value in np.ndenumerate(logs):
        axes.text(
            j,
            i,
            f"$10^{{{round(value)}}}$",
            ha="center",
            va="center",
            fontsize=8,
            color="w" if value < -4 else "k",
        )
    figure.colorbar(image, label="log10")
    _save(figure, path)


Curves = Mapping[str, list[tuple[float, float]]]


def draw_lines(path: Path, panels: Mapping[str, Curves], y: str, *, log_x: bool = False) -> None:
    """Draw curves of ``(x, y)`` points into a PNG file: a panel for each ``x``, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7 if len(panels) == 1 else 5 * len(panels), 4), layout="constrained")
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (x, curves) in zip(row, panels.items(), strict=True):
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), label=name)
        axes.set(xlabel=x, xscale="log" if log_x else "linear")
        axes.legend(fontsize=8)
    row[0].set_ylabel(y)
    _save(figure, path)


def _save(figure: "Figure", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
