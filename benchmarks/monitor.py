"""Times what ``torchbp.watch`` adds to a training step, beside what is done in its place.

Plain and watched steps take turns, block by block, in one process on one thread; what is counted is the
time of the process, so that the writer's thread is in it too. ``torchbp.watch`` is set aside for the plain
steps of the same model: two equal models differ by up to 3 %, as their memory lies. The other ways have a
twin that is not watched.
``make bench-monitor`` writes benchmarks/data/monitor-cpu-<date>.json and prints the table. ``wandb`` is
timed where it is installed. With ``--device cuda`` a turn is of several steps and is timed on the wall,
until the GPU and the writer's thread have done with it.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import torchbp
from benchmarks.run import DATA, about, clock
from torchbp.monitor import _governor as governor

F = nn.functional


class Branch(nn.Module):
    """A residual block of ResNet-20."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(a, b, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(b, b, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(b), nn.BatchNorm2d(b)
        self.short = nn.Conv2d(a, b, 1, stride, bias=False) if a != b else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.short(x))


class Block(nn.Module):
    """A block of a GPT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.n1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, c))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class GPT(nn.Module):
    """A small GPT: 12 layers, width 192, 65 tokens, as trained on characters."""

    def __init__(
        self, width: int = 192, heads: int = 6, vocabulary: int = 65, length: int = 128
    ) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(12))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.places(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def _mlp() -> nn.Module:
    hidden = [part for _ in range(40) for part in (nn.Linear(32, 32), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(32, 10))


def _resnet() -> nn.Module:
    widths = [16] * 3 + [32] * 3 + [64] * 3
    blocks = [Branch(a, b, 1 if a == b else 2) for a, b in zip([16, *widths], widths, strict=False)]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


@dataclass(frozen=True)
class Task:
    """A model with its batch.

    Attributes:
        model: Makes the model.
        inputs: Makes inputs and targets.
        turn: Steps before it is the other's turn: few where a step takes long, so that the machine is
            the same for both; many where it is short, so that each finds its own data in the caches.
        warm: Steps before the first that counts: all as often as asked for, but for the last.
        half: Under autocast to bfloat16.
    """

    model: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, Tensor]]
    turn: int
    warm: int
    half: bool = False


def _tokens(vocabulary: int, *shape: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randint(0, vocabulary, shape), torch.randint(0, vocabulary, shape))


TASKS = {
    "MLP, 40 layers of 32": Task(
        _mlp, lambda: (torch.randn(64, 32), torch.randint(0, 10, (64,))), 50, 1205
    ),
    "ResNet-20, 32×32": Task(
        _resnet, lambda: (torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))), 1, 105
    ),
    "GPT, 12 layers of 192": Task(GPT, _tokens(65, 8, 128), 1, 105),
}
# As large as GPT-2: 124 million parameters.
ON_GPU = {
    **TASKS,
    "GPT-2, 12 layers of 768": Task(
        lambda: GPT(768, 12, 50304, 1024), _tokens(50304, 8, 1024), 1, 105, half=True
    ),
}
_TURN = 5  # steps, on a GPU, whose queue is empty at the end of a turn

_BLOCK = 10  # steps at least
_AS_ASKED = 60  # where a step takes long, the governor waits for so many instead of 300
After = Callable[[int, Tensor], None]


def _nothing(
    _model: nn.Module, _optimizer: torch.optim.Optimizer, _folder: str, _end: ExitStack
) -> After:
    return lambda _step, _loss: None


class Watched:
    """Logs the loss; sets the monitor aside."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        folder: str,
        end: ExitStack,
        **options: Any,
    ) -> None:
        self.monitor = torchbp.watch(model, optimizer, log_dir=folder, **options)
        end.callback(self.monitor.close)
        self._capture = self.monitor._capture  # noqa: SLF001
        self._model, self._optimizer = model, optimizer

    def __call__(self, _step: int, loss: Tensor) -> None:
        self.monitor.log_loss(train=loss)

    @property
    def listens(self) -> bool:
        """Whether the hook for all modules stands."""
        return self._capture.row.sampled

    @property
    def spent(self) -> float:
        """Seconds the monitor has counted so far."""
        monitor = self.monitor
        return self._capture.own_time + monitor._drain_time + monitor._desk.spent  # noqa: SLF001

    def join(self) -> None:
        """Wait for the writer's thread."""
        self.monitor._desk.join()  # noqa: SLF001

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take every hook away for a while, and this out of what the monitor takes for a step's time."""
        optimizer: Any = self._optimizer
        hooks = [p._post_accumulate_grad_hooks for p in self._model.parameters()]  # noqa: SLF001
        hooks += [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]  # noqa: SLF001
        there = [(found, dict(found)) for found in hooks if found]
        begin = time.perf_counter()
        for found, _ in there:
            found.clear()
        try:
            yield
        finally:
            for found, kept in there:
                found.update(kept)
            self._capture._stepped_at += time.perf_counter() - begin  # noqa: SLF001


def _watch(*about: Any) -> After:
    return Watched(*about)


def _as_asked(*about: Any) -> After:
    return Watched(*about, share=None)


def _rarely(*about: Any) -> After:
    return Watched(*about, every=10, sample_every=50)


def _scalars(
    model: nn.Module, _optimizer: torch.optim.Optimizer, folder: str, end: ExitStack
) -> After:
    writer = SummaryWriter(folder)
    end.callback(writer.close)

    def after(step: int, loss: Tensor) -> None:
        writer.add_scalar("loss", loss.item(), step)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                writer.add_scalar(f"grad/{name}", parameter.grad.norm().item(), step)

    return after


def _histograms(
    model: nn.Module, _optimizer: torch.optim.Optimizer, folder: str, end: ExitStack
) -> After:
    writer = SummaryWriter(folder)
    end.callback(writer.close)

    def after(step: int, loss: Tensor) -> None:
        writer.add_scalar("loss", loss.item(), step)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                writer.add_histogram(f"grad/{name}", parameter.grad, step)

    return after


def _wandb(
    model: nn.Module, _optimizer: torch.optim.Optimizer, folder: str, end: ExitStack
) -> After:
    import wandb  # pyright: ignore[reportMissingImports]

    run = wandb.init(mode="offline", dir=folder, settings=wandb.Settings(silent=True))
    run.watch(model, log="gradients", log_freq=10)
    end.callback(run.finish)

    def after(step: int, loss: Tensor) -> None:
        run.log({"loss": loss.item()}, step=step)

    return after


WAYS: dict[str, Callable[[nn.Module, torch.optim.Optimizer, str, ExitStack], After]] = {
    "nothing": _nothing,
    "torchbp.watch": _watch,
    "watch(share=None)": _as_asked,
    "watch(every=10, sample_every=50)": _rarely,
    "norm().item() and add_scalar": _scalars,
    "add_histogram": _histograms,
    "wandb.watch, offline, every 10 steps": _wandb,
}


class Training:
    """A model that trains in a way of being watched."""

    def __init__(self, task: Task, way: str, device: str, folder: str, end: ExitStack) -> None:
        torch.manual_seed(0)
        self._model = task.model().to(device)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-3, momentum=0.9)
        self._inputs = tuple(t.to(device) for t in task.inputs())
        self._context = torch.autocast(device, torch.bfloat16) if task.half else nullcontext()
        self._now = clock(device, 1)
        self.step = 0
        self._after = WAYS[way](self._model, self._optimizer, folder, end)
        self.watched = self._after if isinstance(self._after, Watched) else None

    def train(self, steps: int) -> float:
        """Train; return the time in seconds."""
        start = self._now()
        self._steps(steps, self._after)
        if self.watched is not None:
            self.watched.join()
        return self._now() - start

    def plain(self, steps: int) -> float:
        """The same with the monitor set aside."""
        assert self.watched is not None
        with self.watched.aside():
            start = self._now()
            self._steps(steps, lambda _step, _loss: None)
            return self._now() - start

    def _steps(self, steps: int, after: After) -> None:
        x, y = self._inputs
        for _ in range(steps):
            self._optimizer.zero_grad()
            with self._context:
                logits = self._model(x)
                loss = F.cross_entropy(logits.flatten(0, -2), y.flatten())
            loss.backward()
            self._optimizer.step()
            after(self.step, loss)
            self.step += 1


def measure(name: str, way: str, device: str, seconds: float) -> dict[str, Any]:
    """Return one row: the time of a step as it is and as it is watched, and their ratio with its interval."""
    task = ON_GPU[name]
    turn = task.turn if device == "cpu" else _TURN
    with tempfile.TemporaryDirectory() as folder, ExitStack() as end:
        if task.turn == 1:
            end.enter_context(mock.patch.object(governor, "_FIRST", _AS_ASKED))
        ours = Training(task, way, device, folder, end)
        watched = ours.watched
        twin = None if watched else Training(task, "nothing", device, folder, end)
        ours.train(task.warm if watched else 55)
        if twin:
            twin.train(55)
        pairs: list[tuple[float, float]] = []
        begin, spent = ours.step, watched.spent if watched else 0.0
        until = time.perf_counter() + seconds
        while time.perf_counter() < until or len(pairs) < 5:
            pairs.append(block(ours, twin, turn))
        own = {}
        if watched:
            own = {
                "own_us": 1e6 * (watched.spent - spent) / (ours.step - begin) * 2,
                "periods": watched.monitor.periods,
                "first_step": begin,
            }
    low, high = interval(pairs)
    ratio, bare = map(statistics.fmean, zip(*pairs, strict=True))
    return {
        "model": name,
        "way": way,
        "ratio": ratio / bare,
        "low": low,
        "high": high,
        "blocks": len(pairs),
        "steps_a_block": max(turn, _BLOCK),
        "steps_a_turn": turn,
        "plain_us": 1e6 * bare,
        "added_us": 1e6 * (ratio - bare),
        "load_average": os.getloadavg()[0],
        **own,
    }


def block(ours: Training, twin: Training | None, turn: int) -> tuple[float, float]:
    """Train 10 steps, or one turn if that is more, in turns with plain ones; return the times of a step.

    Before a sampled step the monitor's hook stands for every module of the process, so plain steps wait
    until it is over.
    """
    watched = bare = 0.0
    plain = twin.train if twin else ours.plain
    owed, done, steps = 0, 0, max(turn, _BLOCK)
    for _ in range(0, steps, turn):
        watched += ours.train(turn)
        owed += turn
        if ours.watched is None or not ours.watched.listens:
            bare += plain(owed)
            done, owed = done + owed, 0
    return watched / steps, bare / max(done, 1)


def interval(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the 95 % interval of the ratio of the means, by resampling the pairs."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(pairs), (2000, len(pairs)), generator=generator)
    sums = torch.tensor(pairs, dtype=torch.float64)[chosen].sum(1)
    ratios = sums[:, 0] / sums[:, 1]
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as markdown: one line a way, one column a model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = [
        "| time of a step, ratio | " + " | ".join(models) + " |",
        "|-" * (len(models) + 1) + "|",
    ]
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = {row["model"]: row for row in rows if row["way"] == way}
        cells = [
            f"{r['ratio']:.3f} ({r['low']:.3f} to {r['high']:.3f})" if r else "–"
            for r in map(mine.get, models)
        ]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def store(fresh: list[dict[str, Any]], device: str) -> None:
    """Put rows into the file of today; what was not timed again is kept."""
    DATA.mkdir(exist_ok=True)
    facts = about(device)
    path = DATA / f"monitor-{device}-{facts['date']}.json"
    timed = {(row["model"], row["way"]) for row in fresh}
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = fresh + [row for row in before if (row["model"], row["way"]) not in timed]
    text = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f'{{"about": {json.dumps(facts)},\n"rows": [\n{text}\n]}}\n')


def main() -> int:
    """Run the benchmark and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=[""], help="by the start of a name")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), help="by the start of a name")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each row")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("WANDB_SILENT", "true")
    rows = []
    tasks = TASKS if args.device == "cpu" else ON_GPU
    for model in (m for m in tasks if m.startswith(tuple(args.models))):
        for way in (w for w in WAYS if w.startswith(tuple(args.ways))):
            try:
                rows.append(measure(model, way, args.device, args.seconds))
            except ImportError as error:
                print(f"{way}: not timed: {error}", file=sys.stderr)
                continue
            print(json.dumps(rows[-1]), file=sys.stderr)
            if not args.no_write:
                store(rows, args.device)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
