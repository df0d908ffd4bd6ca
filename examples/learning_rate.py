"""The levers: learning rate. A range test suggests one; schedules and optimizers are compared at theirs."""

import argparse
import sys
from collections.abc import Callable

import torch
from _data import Labelled, fashion
from _program import batches, draw_lines, finish, parser, track
from torch.optim import lr_scheduler

import torchbp
import torchbp.functional as F
from torchbp import nn

Optimizers = dict[str, Callable[..., torch.optim.Optimizer]]
OPTIMIZERS: Optimizers = {
    "SGD": torch.optim.SGD,
    "momentum": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
    "RMSprop": torch.optim.RMSprop,
    "Adam": torch.optim.Adam,
}


def network() -> nn.Sequential:
    """Return a network of three layers."""
    return nn.Sequential(
        nn.Flatten(),
        nn.LazyLinear(128),
        nn.LayerNorm(128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def scheduler(name: str, optimizer: torch.optim.Optimizer, steps: int) -> lr_scheduler.LRScheduler:
    """Return the schedule of that name."""
    if name == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if name == "warm-up, linear":
        warm = max(steps // 10, 1)
        return lr_scheduler.LambdaLR(
            optimizer, lambda i: min((i + 1) / warm, (steps - i) / (steps - warm))
        )
    if name == "steps":
        return lr_scheduler.StepLR(optimizer, max(steps // 3, 1), 0.3)
    return lr_scheduler.ConstantLR(optimizer, 1.0)


def train(
    data: Labelled, kind: str, rate: float, schedule: str, args: argparse.Namespace, steps: int
) -> list[tuple[float, float]]:
    """Return the test loss at some steps."""
    torch.manual_seed(args.seed)
    model = network()
    model(data.x[:1])
    optimizer = OPTIMIZERS[kind](model.parameters(), lr=rate)
    plan = scheduler(schedule, optimizer, steps)
    curve = []
    with torchbp.watch(
        model, optimizer, log_dir=args.log_dir / f"{kind}-{schedule}-{rate:.0e}"
    ) as monitor:
        for step, rows in enumerate(batches(len(data.x), args.batch, steps), 1):
            loss = F.cross_entropy(model(data.x[rows]), data.y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            plan.step()
            monitor.log_loss(train=loss)
            if step % max(steps // 10, 1) == 0:
                with torch.no_grad():
                    value = F.cross_entropy(model(data.test_x), data.test_y)
                monitor.log_loss(val=value)
                curve.append((float(step), value.item()))
    return curve


def main() -> int:
    """Run the range test for each optimizer; train at the suggestion, a thirtieth and thirty times; then schedules."""
    options = parser(__doc__, "learning_rate")
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--batch", type=int, default=64)
    args = options.parse_args()
    data = fashion(limit=600 if args.small else 12_000)
    steps = 20 if args.small else args.steps
    pairs = [
        (data.x[i : i + args.batch], data.y[i : i + args.batch])
        for i in range(0, len(data.x) - args.batch, args.batch)
    ]

    suggested: dict[str, float] = {}
    for kind, make in OPTIMIZERS.items():
        torch.manual_seed(args.seed)
        model = network()
        model(data.x[:1])
        test = torchbp.lr_range_test(
            model, make(model.parameters(), lr=1.0), pairs, F.cross_entropy, start=1e-6, end=30.0,
            steps=20 if args.small else 120, log_dir=args.log_dir / f"range-test-{kind}",
        )  # fmt: skip
        print(f"{kind:9} {test}")
        suggested[kind] = test.suggestion or 1e-3
    tried = {k: [suggested[k] / 30, suggested[k], suggested[k] * 30] for k in OPTIMIZERS}
    cases = [(k, rate, "constant") for k in OPTIMIZERS for rate in tried[k]]
    cases += [("Adam", suggested["Adam"], s) for s in ("cosine", "warm-up, linear", "steps")]
    curves = {
        c: train(data, *c, args, steps)
        for c in track(cases, len(cases), f"training on {data.name}")
    }
    print("  optimizer  rate     schedule           test loss")
    for (kind, rate, schedule), curve in curves.items():
        print(f"  {kind:9}  {rate:7.1e}  {schedule:17}  {curve[-1][1]:9.3f}")
    optimizers = {
        f"{k}, {r:.0e}": c
        for (k, r, s), c in curves.items()
        if r == suggested[k] and s == "constant"
    }
    schedules = {s: c for (k, r, s), c in curves.items() if k == "Adam" and r == suggested[k]}
    panels = {
        "step; each at its suggested rate": optimizers,
        "step; Adam under schedules": schedules,
    }
    draw_lines(args.log_dir / "learning_rate.png", panels, "test loss")
    final = {case: curve[-1][1] for case, curve in curves.items()}
    better = [
        final[k, suggested[k], "constant"]
        < 1.05 * min(final[k, rate, "constant"] for rate in tried[k])
        for k in OPTIMIZERS
    ]
    return finish(
        args,
        {f"rate suggested for {k}": r for k, r in suggested.items()}
        | {f"test loss, {k}": final[k, r, "constant"] for k, r in suggested.items()},
        promised={
            "the suggestion is the best of three, a thirtieth of it and thirty times it, to 5 %": all(
                better
            ),
        },
    )


if __name__ == "__main__":
    sys.exit(main())
