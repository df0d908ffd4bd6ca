"""Hybrid: a classifier of digits learns, without their labels, to read digits in another style (GradientReversal).

A second head tells the two styles apart; its gradient reaches the features reversed, so that they lose what tells the
styles apart (domain-adversarial training: Ganin et al. 2016, arXiv:1505.07818). The target digits are moved by a
pixel, blurred and inverted in brightness.
"""

import argparse
import sys

import torch
from _data import Labelled, digits
from _program import batches, finish, parser, track
from torch import Tensor

import torchbp
import torchbp.functional as F
from torchbp import nn
from torchbp.monitor import Monitor


def restyled(x: Tensor) -> Tensor:
    """Return the pictures moved down by a pixel, blurred, with less contrast and more light."""
    return 0.35 + 0.5 * F.avg_pool2d(x, 3, stride=1, padding=1).roll(1, dims=2)


class Network(nn.Module):
    """Features, a head for the digit, and a head for the style behind the reversal."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(),
        )  # fmt: skip
        self.digit = nn.Linear(64, 10)
        self.reversal = nn.GradientReversal()
        self.style = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))


def train(
    data: Labelled, args: argparse.Namespace, steps: int, *, adapt: bool
) -> tuple[float, Monitor]:
    """Return the accuracy on the target's test digits, and what the monitor saw."""
    torch.manual_seed(args.seed)
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=1e-2)
    half = (
        len(data.x) // 2
    )  # labelled ones in the source's style, others without labels in the target's
    source, target = data.x[:half], restyled(data.x[half:])
    name = "adapted" if adapt else "source only"
    with torchbp.watch(model, optimizer, log_dir=args.log_dir / name.replace(" ", "-")) as monitor:
        for rows in track(batches(half, 64, steps), steps, name):
            h = model.features(source[rows])
            loss = F.cross_entropy(model.digit(h), data.y[rows])
            if adapt:
                other = model.features(target[rows])
                style = model.style(model.reversal(torch.cat([h, other])))[:, 0]
                truth = torch.cat([torch.zeros(len(h)), torch.ones(len(other))])
                loss = loss + args.weight * F.binary_cross_entropy_with_logits(style, truth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.log_loss(train=loss)
    if adapt:  # the normalization's statistics too are the target's
        with torch.no_grad():
            for _ in range(20):
                model.features(target)
    model.eval()
    with torch.no_grad():
        guesses = model.digit(model.features(restyled(data.test_x))).argmax(1)
    return (guesses == data.test_y).float().mean().item(), monitor


def main() -> int:
    """Train with and without adaptation; compare on the other style."""
    options = parser(__doc__, "domain_adaptation")
    options.add_argument("--steps", type=int, default=500)
    options.add_argument(
        "--weight", type=float, default=0.3, help="of the style's loss (%(default)s)"
    )
    options.add_argument("--lr", type=float, default=2e-3)
    args = options.parse_args()
    data, steps = digits(), 5 if args.small else args.steps
    before, _ = train(data, args, steps, adapt=False)
    after, monitor = train(data, args, steps, adapt=True)
    return finish(
        args,
        {"target accuracy, source only": before, "target accuracy, adapted": after},
        promised={"adaptation adds ten points": after > before + 0.1},
        monitor=monitor,
    )


if __name__ == "__main__":
    sys.exit(main())
