"""The levers: overfitting. A large network, few pictures; dropout, weight decay, and stopping on the verdict."""

import argparse
import sys

import torch
from _data import Labelled, fashion
from _program import batches, draw_lines, finish, parser, track

import torchbp
import torchbp.functional as F
from torchbp import nn

REMEDIES = ("none", "dropout", "weight decay", "early stopping", "all three")


def train(
    data: Labelled, remedy: str, args: argparse.Namespace, steps: int
) -> tuple[list[tuple[float, float]], int | None]:
    """Return the validation loss over the steps, and since when the monitor calls it overfitting."""
    torch.manual_seed(args.seed)
    everything = remedy == "all three"
    drop = 0.5 if remedy == "dropout" or everything else 0.0
    decay = 0.3 if remedy == "weight decay" or everything else 0.0
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(data.x[0].numel(), 256), nn.ReLU(), nn.Dropout(drop),
        nn.Linear(256, 256), nn.ReLU(), nn.Dropout(drop),
        nn.Linear(256, int(data.y.max()) + 1),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=decay)
    curve = []
    with torchbp.watch(
        model, optimizer, log_dir=args.log_dir / remedy.replace(" ", "-")
    ) as monitor:
        for step, rows in enumerate(batches(len(data.x), 50, steps), 1):
            loss = F.cross_entropy(model(data.x[rows]), data.y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.log_loss(train=loss)
            if step % 20 == 0:
                model.eval()
                with torch.no_grad():
                    value = F.cross_entropy(model(data.test_x), data.test_y)
                model.train()
                monitor.log_loss(val=value)
                curve.append((float(step), value.item()))
                verdicts = [v for v in monitor.verdicts if v.kind == "overfitting"]
                if verdicts and (remedy == "early stopping" or everything):
                    break
        since = next((v.step for v in monitor.verdicts if v.kind == "overfitting"), None)
    return curve, since


def main() -> int:
    """Train with each remedy; print the table and draw the validation losses."""
    options = parser(__doc__, "overfitting")
    options.add_argument("--pictures", type=int, default=1000)
    options.add_argument("--steps", type=int, default=600)
    options.add_argument("--lr", type=float, default=1e-3)
    args = options.parse_args()
    data = fashion(limit=300 if args.small else None)
    data = Labelled(
        data.name,
        data.x[: args.pictures],
        data.y[: args.pictures],
        data.test_x[:2000],
        data.test_y[:2000],
    )
    steps = 40 if args.small else args.steps
    found = {
        r: train(data, r, args, steps)
        for r in track(REMEDIES, len(REMEDIES), f"{len(data.x)} pictures of {data.name}")
    }
    print("  remedy          lowest  last   overfits since step  stopped at")
    for remedy, (curve, since) in found.items():
        lowest = min(v for _, v in curve)
        told = "never" if since is None else since
        print(
            f"  {remedy:14} {lowest:6.3f} {curve[-1][1]:6.3f}  {told:>18}  {int(curve[-1][0]):10}"
        )
    draw_lines(
        args.log_dir / "overfitting.png",
        {"step": {r: c for r, (c, _) in found.items()}},
        "validation loss",
    )
    last = {remedy: curve[-1][1] for remedy, (curve, _) in found.items()}
    return finish(
        args,
        {f"validation loss, {remedy}": value for remedy, value in last.items()},
        promised={
            "without a remedy it overfits, and the monitor says so": found["none"][1] is not None,
            "each remedy ends better than none": all(last[r] < last["none"] for r in REMEDIES[1:]),
        },
    )


if __name__ == "__main__":
    sys.exit(main())
