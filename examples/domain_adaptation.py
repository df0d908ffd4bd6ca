"""Hybrid: a classifier of digits learns, without their labels, to read digits in another style (GradientReversal).

A second head tells the two styles apart; its gradient reaches the features reversed, so that they lose what tells the
styles apart (domain-adversarial training: Ganin et al. 2016, arXiv:1505.07818). The target digits are lit from one
side: less contrast, and a brightness that grows from left to right.
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
    """Return the pictures lit from the right."""
    return 0.4 * x + 0.6 * torch.linspace(0, 1, x.shape[-1])


class Network(nn.Module):
    """Features, a head for the digit, and a head for the style behind the reversal."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU()
        )
        self.digit = nn.Linear(64, 10)
        self.style = nn.Sequential(
            nn.GradientReversal(strength), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
        )


def train(
    data: Labelled, args: argparse.Namespace, steps: int, *, adapt: bool
) -> tuple[float, Monitor]:
    """Return the accuracy on the target's test digits, and what the monitor saw."""
    torch.manual_seed(args.seed)
    model = Network(args.strength)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=1e-3)
    # Labelled ones in the source's style, others without labels in the target's.
    half = len(data.x) // 2
    source, target = data.x[:half], restyled(data.x[half:])
    name = "adapted" if adapt else "source only"
    with torchbp.watch(model, optimizer, log_dir=args.log_dir / name.replace(" ", "-")) as monitor:
        for rows in track(batches(half, 64, steps), steps, name):
            h = model.features(source[rows])
            # Smoothed labels: a loss that goes on teaching, so that the reversed gradient does not take over.
            loss = F.cross_entropy(model.digit(h), data.y[rows], label_smoothing=0.1)
            if adapt:
                style = model.style(torch.cat([h, model.features(target[rows])]))[:, 0]
                truth = torch.cat([torch.zeros(len(rows)), torch.ones(len(rows))])
                loss = loss + F.binary_cross_entropy_with_logits(style, truth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.log_loss(train=loss)
    model.eval()
    with torch.no_grad():
        guesses = model.digit(model.features(restyled(data.test_x))).argmax(1)
    return (guesses == data.test_y).float().mean().item(), monitor


def main() -> int:
    """Train with and without adaptation; compare on the other style."""
    options = parser(__doc__, "domain_adaptation")
    options.add_argument("--steps", type=int, default=500)
    options.add_argument(
        "--strength", type=float, default=0.03, help="of the reversal (%(default)s)"
    )
    options.add_argument("--lr", type=float, default=0.05)
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
