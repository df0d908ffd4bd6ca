"""``torchbp demo``: deep networks that differ in one thing each; whose gradient vanishes, and what helps."""

import os
import shlex
import shutil
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torchbp.cli._command import Command, CouldNotRun
from torchbp.cli._images import Images, digits, idx_folder

if TYPE_CHECKING:
    from torch import nn

    from torchbp.monitor import Verdict

DESCRIPTION = """\
Checks the gradients of the ops in use, then trains deep networks on real images, watches their gradients, and says in
plain words which network's gradient vanishes or explodes, at which layer, since which step, and what helps.

examples:
  torchbp demo                                   scikit-learn's digits
  torchbp demo --data fashion-mnist/   a folder of MNIST-style *-ubyte[.gz] files
  torchbp demo --depth 40 --steps 200
"""


SMALL = 2**15  # elements of a layer


@dataclass(frozen=True)
class Outcome:
    """What came of training one network."""

    name: str
    accuracy: float
    losses: tuple[float, float]
    error_signal: tuple[float, float]
    verdicts: "list[Verdict]"


def arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of MNIST-style *-ubyte[.gz] files"
    )
    parser.add_argument(
        "--log-dir", type=Path, metavar="DIR", help="where to log (runs/demo-<time>)"
    )
    parser.add_argument("--depth", type=_positive, default=20, help="hidden layers (%(default)s)")
    parser.add_argument("--width", type=_positive, default=64, help="units a layer (%(default)s)")
    parser.add_argument("--steps", type=_positive, default=300, help="training steps (%(default)s)")
    parser.add_argument("--batch", type=_positive, default=64, help="images a step (%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="Adam's learning rate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (%(default)s)")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def run(args: Namespace) -> int:
    """Check, train, tell."""
    try:
        from rich.console import Console
    except ImportError:
        message = "expected rich to be installed; pip install 'torchbp[demo]'"
        raise CouldNotRun(message) from None
    console = Console(highlight=False)
    images = digits() if args.data is None else idx_folder(args.data)
    log_dir = args.log_dir or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    _claim(log_dir)
    with _threads_for(args.batch * args.width):
        if not _check_ops(console):
            return 1
        outcomes: list[Outcome] = []
        try:
            outcomes.extend(_train_all(console, images, log_dir, args))
        except KeyboardInterrupt:
            console.print(f"\ninterrupted; what was logged stays in {log_dir}")
            raise
        finally:
            if outcomes:
                _tell(console, outcomes)
                _point(console, log_dir)
    return 0


@contextmanager
def _threads_for(elements: int) -> Iterator[None]:
    """Use one thread where a layer is small: more are no faster, and wait for one another where a core is busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1 if elements < SMALL else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _point(console, log_dir: Path) -> None:  # noqa: ANN001
    """Say where what was logged can be seen, in commands that work where this one did."""
    folder = shlex.quote(str(log_dir))
    see = f'{_beside("tensorboard")} --logdir {folder}   (the tab "Grad flow")'
    keep = f"{_beside('torchbp')} report {folder} -o report.html"
    console.print(f"\nsee it:   {see}\nkeep it:  {keep}", soft_wrap=True, markup=False)


def _beside(name: str) -> str:
    """Return the command ``name`` of this environment, as a path unless the shell finds it."""
    here = Path(sys.executable).parent / name
    found = shutil.which(name)
    if not here.exists() or (found and Path(found).resolve() == here.resolve()):
        return name
    inside = here.is_relative_to(Path.cwd())
    return shlex.quote(str(here.relative_to(Path.cwd()) if inside else here))


def _claim(log_dir: Path) -> None:
    """Make sure that ``log_dir`` can be written, before any work."""
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = (
            f"--log-dir: expected a folder that can be written, got {log_dir} ({error.strerror})"
        )
        raise CouldNotRun(message) from None
    if not os.access(log_dir, os.W_OK):
        message = f"--log-dir: expected a folder that can be written, got {log_dir}; choose another"
        raise CouldNotRun(message)


def _check_ops(console) -> bool:  # noqa: ANN001  # rich is imported only when the demo runs
    """Check the gradients of the ops in use against finite differences; print a line each."""
    import torch

    import torchbp
    from torchbp import functional as F

    torch.manual_seed(0)
    x, w = torch.randn(3, 4), torch.randn(2, 4)
    labels = torch.tensor([0, 3, 1])
    calls: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]] = {
        "linear": (F.linear, (x, w, torch.randn(2))),
        "sigmoid": (F.sigmoid, (x,)),
        "tanh": (F.tanh, (x,)),
        "relu": (F.relu, (x,)),
        "layer_norm": (
            lambda x, w, b: F.layer_norm(x, (4,), w, b),
            (x, torch.randn(4), torch.randn(4)),
        ),
        "cross_entropy": (lambda x: F.cross_entropy(x, labels), (x,)),
    }
    console.print("[bold]The gradients of the ops in use, against finite differences[/]")
    right = True
    for name, (function, inputs) in calls.items():
        start = time.perf_counter()
        tensors = tuple(t.double().requires_grad_() for t in inputs)
        report = torchbp.gradcheck(function, tensors, raise_exception=False)
        mark = "[green]right[/]" if report else f"[red]wrong[/] {report}"
        console.print(f"  {name:14} {mark}  {1e3 * (time.perf_counter() - start):4.0f} ms")
        right = right and bool(report)
    return right


# ----------------------------------------------------------------------------------- the training
def _train_all(console, images: Images, log_dir: Path, args: Namespace) -> Iterator[Outcome]:  # noqa: ANN001
    import torch
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from torchbp.cli._networks import networks

    torch.manual_seed(args.seed)
    classes = int(images.train[1].max()) + 1
    built = list(networks(images.train[0].shape[1], classes, args.depth, args.width))
    count = len(images.train[0])
    console.print(
        f"\n[bold]{len(built)} networks, {args.depth} hidden layers, on {count} images: {images.name}[/]"
    )
    columns = (
        TextColumn("  {task.description:16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as progress:
        for name, model in built:
            task = progress.add_task(name, total=args.steps, loss=float("nan"))
            yield _train(
                name,
                model,
                images,
                log_dir,
                args,
                lambda loss, t=task: progress.update(t, advance=1, loss=loss),
            )


def _train(
    name: str,
    model: "nn.Module",
    images: Images,
    log_dir: Path,
    args: Namespace,
    tick: Callable[[float], object],
) -> Outcome:
    import torch

    import torchbp
    from torchbp import functional as F

    x, y = map(torch.from_numpy, images.train)
    test_x, test_y = map(torch.from_numpy, images.test)
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    run_dir = log_dir / name.replace(", ", "-").replace(" + ", "-").replace(" ", "-")
    losses = []
    with torchbp.watch(model, optimizer, log_dir=run_dir) as monitor:
        for _ in range(args.steps):
            batch = torch.randint(len(x), (args.batch,), generator=generator)
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.log_loss(train=loss)
            losses.append(loss.item())
            tick(losses[-1])
        with torch.no_grad():
            right = (model(test_x).argmax(1) == test_y).float().mean().item()
        monitor.log("accuracy_test", right)
    return Outcome(name, right, (losses[0], losses[-1]), _ends(run_dir), monitor.verdicts)


def _ends(run_dir: Path) -> tuple[float, float]:
    """Return the last measured error signal of the first layer and of the last, read back from the log."""
    from torchbp.tensorboard import read

    signal = read(run_dir).vectors["error_signal"].values[-1]
    return float(signal[0]), float(signal[-1])


# ------------------------------------------------------------------------------------ the verdict
def _tell(console, outcomes: list[Outcome]) -> None:  # noqa: ANN001
    """Print the table, then each trouble in plain words; all of it from what was measured."""
    from rich.box import SIMPLE_HEAD
    from rich.padding import Padding
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))  # 80 columns hold it
    table.add_column("network", no_wrap=True)
    for head in ("accuracy", "loss", "signal"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for o in outcomes:
        first, last = o.error_signal
        table.add_row(
            o.name,
            f"{o.accuracy:.1%}",
            f"{o.losses[0]:.2g} → {o.losses[1]:.2g}",
            f"{first / last:.0e}" if last else "–",
            _words(o.verdicts),
        )
    console.print()
    console.print(table)
    console.print("accuracy: on held-out images; signal: error signal, first layer / last\n")
    for o in outcomes:
        for v in _worst(o.verdicts):
            ended = "" if v.until is None else f", until step {v.until}"
            where = f" from layer [bold]{v.layer}[/] back to the input" if v.layer else ""
            kind = _KINDS.get(v.kind, v.kind)
            console.print(f"[bold]{o.name}[/]: {kind}{where}, since step {v.step}{ended}.")
            console.print(Padding(f"measured: {v.evidence}", (0, 0, 0, 2)))
            console.print(Padding(f"what helps: {v.advice}\n", (0, 0, 0, 2)))
    healthy = [o for o in outcomes if not _worst(o.verdicts)]
    if healthy and len(healthy) < len(outcomes):
        best = max(healthy, key=lambda o: o.accuracy)
        sick = min((o for o in outcomes if o not in healthy), key=lambda o: o.accuracy)
        console.print(
            f"[bold]{best.name}[/] is healthy and reaches {best.accuracy:.1%}, "
            f"where [bold]{sick.name}[/] reaches {sick.accuracy:.1%}."
        )


_KINDS = {
    "vanishing": "the gradient [bold red]vanishes[/]",
    "exploding": "the gradient [bold red]explodes[/]",
    "nonfinite": "the gradient is [bold red]not finite[/]",
}


def _worst(verdicts: "list[Verdict]") -> "list[Verdict]":
    """Return the warnings and alerts, one a kind, the gravest and earliest first."""
    graver = {"alert": 0, "warning": 1}
    told = sorted(
        (v for v in verdicts if v.severity in graver), key=lambda v: (graver[v.severity], v.step)
    )
    return [v for i, v in enumerate(told) if v.kind not in {u.kind for u in told[:i]}]


def _words(verdicts: "list[Verdict]") -> str:
    worst = _worst(verdicts)
    if not worst:
        return "[green]healthy[/]"
    return ", ".join(f"[red]{v.kind}[/]" + (f" from {v.layer}" if v.layer else "") for v in worst)


COMMAND = Command(
    help="deep networks on real images: which one's gradient vanishes, and what helps",
    description=DESCRIPTION,
    arguments=arguments,
    run=run,
)
