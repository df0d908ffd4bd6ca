"""Alternative: a network whose weights are -1 or 1, trained straight through the sign.

The float weights behind them gather the gradient, which passes where they are within ±1 (BinaryConnect: Courbariaux
et al. 2015, arXiv:1511.00363). Stored, the binary weights take a 32nd of the float ones.
"""

import argparse
import itertools
import sys

import torch
from _data import Labelled, fashion
from _program import batches, finish, parser, track
from torch import Tensor

import torchbp
import torchbp.functional as F
from torchbp import nn
from torchbp.monitor import Monitor


class BinaryLinear(nn.Linear):
    """Linear layer with weights ±1, scaled by one factor for the layer: 1/√I."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``(*, O)`` for ``(*, I)``."""
        signs = F.straight_through(self.weight, "sign", window=(-1.0, 1.0))
        return F.linear(input, signs, None) / self.in_features**0.5


def train(
    kind: type[nn.Linear], data: Labelled, args: argparse.Namespace, steps: int
) -> tuple[float, int, Monitor]:
    """Return the test accuracy, the bits of the weight matrices, and what the monitor saw."""
    torch.manual_seed(args.seed)
    sizes = [data.x[0].numel(), args.width, args.width, int(data.y.max()) + 1]
    layers: list[nn.Module] = [nn.Flatten()]
    for i, o in itertools.pairwise(sizes):
        layers += [kind(i, o, bias=False), nn.BatchNorm1d(o), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    weights = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    with torchbp.watch(model, optimizer, log_dir=args.log_dir / kind.__name__) as monitor:
        for rows in track(batches(len(data.x), 64, steps), steps, kind.__name__):
            loss = F.cross_entropy(model(data.x[rows]), data.y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            monitor.log_loss(train=loss)
    model.eval()
    with torch.no_grad():
        accuracy = (model(data.test_x).argmax(1) == data.test_y).float().mean().item()
    return accuracy, sum(w.numel() for w in weights) * (1 if kind is BinaryLinear else 32), monitor


def main() -> int:
    """Train with float and with binary weights; compare."""
    options = parser(__doc__, "binary_weights")
    options.add_argument("--steps", type=int, default=900)
    options.add_argument("--width", type=int, default=256)
    options.add_argument("--lr", type=float, default=2e-3)
    args = options.parse_args()
    data = fashion(limit=600 if args.small else 30_000)
    steps = 10 if args.small else args.steps
    floats, float_bits, _ = train(nn.Linear, data, args, steps)
    binary, bits, monitor = train(BinaryLinear, data, args, steps)
    return finish(
        args,
        {
            "test accuracy, float weights": floats, "kilobytes of float weights": float_bits / 8000,
            "test accuracy, binary weights": binary, "kilobytes of binary weights": bits / 8000,
        },
        promised={"binary weights lose at most six points": binary > floats - 0.06},
        monitor=monitor,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
