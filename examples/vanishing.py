"""The levers of depth: how much of the gradient reaches the first layer, by depth, activation, initialisation and more.

Each network trains for a while on digits; the share of the output's error signal that reaches the first layer is the
monitor's measurement, drawn as a heat map.
"""

import argparse
import itertools
import math
import sys

import torch
from _data import digits
from _program import batches, draw_heat_map, finish, parser, track
from torch import Tensor

import torchbp
import torchbp.functional as F
from torchbp import nn
from torchbp.tensorboard import read

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
}
SETTINGS = ("default", "xavier", "he", "normalized", "residual")
DEPTHS = (4, 12, 36)


class Layer(nn.Module):
    """Linear, perhaps a normalization before it, an activation, perhaps a residual connection around all."""

    def __init__(self, width: int, activation: type[nn.Module], setting: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if setting in ("normalized", "residual") else nn.Identity()
        self.linear, self.activation = nn.Linear(width, width), activation()
        self.residual = setting == "residual"
        if setting in ("xavier", "he"):
            gain = math.sqrt(2) if setting == "he" else 1.0
            nn.init.normal_(self.linear.weight, std=gain / math.sqrt(width))
            nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the next layer's input ``(N, D)``."""
        y = self.activation(self.linear(self.norm(x)))
        return x + y if self.residual else y


def train(
    depth: int, activation: str, setting: str, args: argparse.Namespace, steps: int
) -> tuple[float, float, str]:
    """Return the share of the error signal that arrives, the test accuracy, and the verdict."""
    torch.manual_seed(args.seed)
    data = digits()
    layers = [Layer(64, ACTIVATIONS[activation], setting) for _ in range(depth)]
    model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    folder = args.log_dir / f"{activation}-{setting}-{depth:02}"
    with torchbp.watch(model, optimizer, log_dir=folder) as monitor:
        for rows in batches(len(data.x), 64, steps):
            loss = F.cross_entropy(model(data.x[rows]), data.y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.log_loss(train=loss)
    with torch.no_grad():
        accuracy = (model.eval()(data.test_x).argmax(1) == data.test_y).float().mean().item()
    signal = read(folder).vectors["error_signal"]
    linear = [i for i, kind in enumerate(signal.kinds) if kind == "Linear"]
    share = float((signal.values[:, linear[0]] / signal.values[:, linear[-1]].clip(1e-45)).mean())
    depthwise = [v.kind for v in monitor.verdicts if v.kind in ("vanishing", "exploding")]
    return share, accuracy, depthwise[0] if depthwise else ""


def main() -> int:
    """Train one small network for each combination; print the table and draw it."""
    options = parser(__doc__, "vanishing")
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--lr", type=float, default=1e-3)
    args = options.parse_args()
    depths, settings = (DEPTHS[:1], SETTINGS[:2]) if args.small else (DEPTHS, SETTINGS)
    steps = 12 if args.small else args.steps
    cases = list(itertools.product(ACTIVATIONS, settings, depths))
    found = {
        case: train(case[2], case[0], case[1], args, steps)
        for case in track(cases, len(cases), "training")
    }

    print(
        "share of the output's error signal that reaches the first layer, by depth (test accuracy)"
    )
    print(f"{'':20}" + "".join(f"{depth:>22}" for depth in depths))
    for activation, setting in itertools.product(ACTIVATIONS, settings):
        cells = (found[activation, setting, depth] for depth in depths)
        row = "".join(
            f"{share:>9.0e} {accuracy:4.0%} {kind.removesuffix('ing')[:7]:7}"
            for share, accuracy, kind in cells
        )
        print(f"{activation:8} {setting:11}{row}")
    rows = [
        f"{activation}, {setting}"
        for activation, setting in itertools.product(ACTIVATIONS, settings)
    ]
    values = [
        [found[a, s, d][0] for d in depths] for a, s in itertools.product(ACTIVATIONS, settings)
    ]
    draw_heat_map(
        args.log_dir / "vanishing.png",
        values,
        rows,
        [f"{d} layers" for d in depths],
        "error signal at the first layer, share of the last layer's",
    )
    if args.small:
        return finish(args, {"networks": float(len(found))}, promised={})
    deep = {(a, s): found[a, s, DEPTHS[-1]] for a in ACTIVATIONS for s in SETTINGS}
    return finish(
        args,
        {
            "networks": float(len(found)),
            "deepest sigmoid network's share": deep["sigmoid", "default"][0],
        },
        promised={
            "36 sigmoid layers vanish, and the monitor says so": deep["sigmoid", "default"][2]
            == "vanishing",
            "a residual stream with normalization never vanishes": all(
                found[a, "residual", d][2] == "" for a in ACTIVATIONS for d in DEPTHS
            ),
            "through 36 ReLU layers He initialisation carries it, the default loses it": (
                deep["relu", "he"][0] > 0.1 and deep["relu", "default"][0] < 1e-10
            ),
            "36 layers with residual streams read over 90 % of the digits": all(
                deep[a, "residual"][1] > 0.9 for a in ACTIVATIONS
            ),
        },
    )


if __name__ == "__main__":
    sys.exit(main())
