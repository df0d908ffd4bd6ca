"""Alternative learning: the error goes back through random matrices, and the network learns all the same.

Backpropagation sends the error down through the transposed weights. Feedback alignment sends it through fixed random
matrices (Lillicrap et al. 2016), direct feedback alignment straight from the output to each layer (Nøkland 2016,
arXiv:1609.01596). The angle between their update and backpropagation's, at the same weights, is logged: random
directions stand at 90 degrees; below it, both go downhill, and the angle falls as the weights come to resemble B.
"""

import argparse
import copy
import itertools
import math
import sys

import torch
from _data import Labelled, fashion
from _program import batches, draw_lines, finish, parser, track
from torch import Tensor

import torchbp
import torchbp.functional as F
from torchbp import nn

WAYS = ("backpropagation", "feedback alignment", "direct feedback alignment")


def network(way: str, pixels: int, width: int, classes: int) -> nn.Module:
    """Return three tanh layers and an output whose error goes back in that way; the same weights for all three."""
    torch.manual_seed(0)
    kinds = {
        "backpropagation": nn.Linear,
        "feedback alignment": nn.FeedbackAlignmentLinear,
        "direct feedback alignment": lambda i, o: nn.DirectFeedbackAlignmentLinear(
            i, o, error_features=classes
        ),
    }
    sizes = [pixels, width, width, width, classes]
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(inputs, outputs) if i == 0 else kinds[way](inputs, outputs))
        layers.append(nn.Tanh() if i < len(sizes) - 2 else nn.Identity())
    model = nn.Sequential(*layers)
    return nn.DirectFeedbackAlignment(model) if way.startswith("direct") else model


def angle(model: nn.Module, plain: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the degrees between the gradient of the hidden weights and the one that backpropagation gives."""
    weights = [w for w in model.parameters() if w.ndim == 2]
    plain_weights = [w for w in plain.parameters() if w.ndim == 2]
    with torch.no_grad():
        for theirs, ours in zip(plain.parameters(), model.parameters(), strict=True):
            theirs.copy_(ours)
    true = torch.autograd.grad(F.cross_entropy(plain(x), y), plain_weights[:-1])
    taken = torch.autograd.grad(F.cross_entropy(model(x), y), weights[:-1])
    a, b = (torch.cat([g.flatten() for g in gradients]) for gradients in (true, taken))
    return math.degrees(math.acos(F.cosine_similarity(a, b, dim=0).clamp(-1, 1).item()))


def train(
    way: str, data: Labelled, args: argparse.Namespace, steps: int
) -> tuple[float, list[tuple[float, float]]]:
    """Return the test accuracy, and the angle over the steps."""
    sizes = data.x[0].numel(), args.width, int(data.y.max()) + 1
    model, plain = network(way, *sizes), network("backpropagation", *sizes)
    # The angle is measured on a copy, which the monitor does not count.
    watched = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    torch.manual_seed(args.seed)
    angles = []
    with torchbp.watch(model, optimizer, log_dir=args.log_dir / way.replace(" ", "-")) as monitor:
        for step, rows in enumerate(track(batches(len(data.x), 64, steps), steps, way)):
            x, y = data.x[rows], data.y[rows]
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.log_loss(train=loss)
            if step % max(steps // 25, 1) == 0:
                watched.load_state_dict(model.state_dict())
                angles.append((float(step), angle(watched, plain, x, y)))
                monitor.log("angle/degrees", angles[-1][1])
        with torch.no_grad():
            accuracy = (model(data.test_x).argmax(1) == data.test_y).float().mean().item()
        monitor.log("test/accuracy", accuracy)
    return accuracy, angles


def main() -> int:
    """Train in three ways, compare accuracies and angles."""
    options = parser(__doc__, "feedback_alignment")
    options.add_argument("--steps", type=int, default=1500)
    options.add_argument("--width", type=int, default=128)
    options.add_argument("--lr", type=float, default=5e-4)
    args = options.parse_args()
    data = fashion(limit=600 if args.small else 30_000)
    steps = 10 if args.small else args.steps
    found = {way: train(way, data, args, steps) for way in WAYS}
    draw_lines(
        args.log_dir / "angles.png",
        {"step": {w: found[w][1] for w in WAYS[1:]}},
        "degrees to backpropagation",
    )
    last = {way: sum(a for _, a in found[way][1][-3:]) / 3 for way in WAYS}
    return finish(
        args,
        {f"test accuracy, {way}": accuracy for way, (accuracy, _) in found.items()}
        | {f"degrees at last, {way}": last[way] for way in WAYS},
        promised={
            "backpropagation's angle to itself is 0": last[WAYS[0]] < 0.1,
            "both alternatives go downhill: below 85 degrees": max(last[w] for w in WAYS[1:]) < 85,
            "both come within ten points of backpropagation": all(
                found[w][0] > found[WAYS[0]][0] - 0.1 for w in WAYS
            ),
        },
    )


if __name__ == "__main__":
    sys.exit(main())
