"""The levers: batch size. What a larger batch buys, against steps and against samples, and the measured noise scale.

The gradient noise scale B = S/‖G‖² (McCandlish et al. 2018, arXiv:1812.06162) predicts where a larger batch stops
saving steps: far below it, twice the batch halves the steps; far above it, it only costs samples. With batches of b,
steps are in proportion to 1 + B/b.
"""

import argparse
import sys

import numpy as np
import torch
from _data import Labelled, fashion
from _program import batches, draw_lines, finish, parser, track

import torchbp
import torchbp.functional as F
from torchbp import nn
from torchbp.tensorboard import read

TARGET = 0.55


def network() -> nn.Sequential:
    """Return a small network, the same for every batch size."""
    return nn.Sequential(
        nn.Flatten(), nn.LazyLinear(64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 10)
    )


def steps_needed(
    data: Labelled, batch: int, args: argparse.Namespace, limit: int
) -> tuple[int, list[float]]:
    """Return the steps of plain SGD, at its best rate, until the test loss is at the target; and the losses."""
    best, curve = limit, []
    for rate in args.rates:
        torch.manual_seed(args.seed)
        model = network()
        losses = []
        model(data.x[:1])
        optimizer = torch.optim.SGD(model.parameters(), rate)
        for step, rows in enumerate(batches(len(data.x), batch, best), 1):
            loss = F.cross_entropy(model(data.x[rows]), data.y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % args.check == 0 or step == best:
                with torch.no_grad():
                    losses.append(
                        F.cross_entropy(model(data.test_x[:2000]), data.test_y[:2000]).item()
                    )
                if not losses[-1] > TARGET:
                    best, curve = step, losses
                    break
        curve = curve or losses
    return best, curve


def measure_noise(
    data: Labelled, args: argparse.Namespace, steps: int
) -> tuple[float, float, float]:
    """Return the noise scale and its interval, from micro-batches of 16 accumulated to 128."""
    torch.manual_seed(args.seed)
    model = network()
    model(data.x[:1])
    optimizer = torch.optim.SGD(model.parameters(), args.rates[0])
    with torchbp.watch(model, optimizer, log_dir=args.log_dir / "noise", sample_every=2):
        for rows in batches(len(data.x), 128, steps):
            optimizer.zero_grad()
            for part in rows.split(16):
                (F.cross_entropy(model(data.x[part]), data.y[part]) / 8).backward()
            optimizer.step()
    noise = read(args.log_dir / "noise").vectors["noise_scale"].values
    later = noise[np.isfinite(noise).all(1)][-10:]
    value, low, high = np.median(later, 0).tolist()
    return value, low, high


def main() -> int:
    """Count the steps to a loss for several batch sizes; compare with the prediction."""
    options = parser(__doc__, "batch_size")
    options.add_argument("--batches", type=int, nargs="+", default=[16, 64, 256, 1024])
    options.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.3, 0.6])
    options.add_argument(
        "--check", type=int, default=10, help="look at the test loss every so many steps"
    )
    args = options.parse_args()
    data = fashion(limit=1200 if args.small else 20_000)
    sizes, limit, noisy = ([16, 64], 20, 60) if args.small else (args.batches, 1500, 120)
    found = {
        b: steps_needed(data, b, args, limit)
        for b in track(sizes, len(sizes), f"training on {data.name}")
    }
    noise, low, high = measure_noise(data, args, noisy)
    predicted = {b: 1 + noise / b for b in sizes}  # steps, of those with no noise
    print(f"noise scale {noise:.0f}, in [{low:.0f}, {high:.0f}]; steps to loss {TARGET}:")
    print("  batch  steps  of the largest batch's  predicted  samples")
    for batch, (steps, _) in found.items():
        share, expected = steps / found[sizes[-1]][0], predicted[batch] / predicted[sizes[-1]]
        print(f"  {batch:5}  {steps:5}  {share:22.1f}  {expected:9.1f}  {batch * steps:7}")
    curves = {
        b: [(float(s), n) for s, n in zip(range(args.check, 10**6, args.check), c, strict=False)]
        for b, (_, c) in found.items()
    }
    by_step = {f"batch {b}": curve for b, curve in curves.items()}
    by_sample = {f"batch {b}": [(s * b, n) for s, n in curve] for b, curve in curves.items()}
    panels = {"steps": by_step, "samples": by_sample}
    draw_lines(args.log_dir / "batch_size.png", panels, "test loss", log_x=True)
    first, second, last = sizes[0], sizes[1], sizes[-1]
    saved = found[first][0] / max(found[last][0], 1)
    fewer = found[second][0] / found[first][0]
    return finish(
        args,
        {
            "noise scale": noise, "its interval, from": low, "to": high,
            f"steps saved by {last // first} times the batch": saved,
            f"steps in batches of {second}, of those in {first}": fewer,
            "the noise scale predicts": predicted[second] / predicted[first],
        },
        promised={
            "the noise scale was measured": low <= noise <= high,
            "a larger batch needs fewer steps": saved > 1.5,
            "but more samples": saved < last / first,
            "as many as the noise scale predicts, to a third": (
                2 / 3 < fewer / (predicted[second] / predicted[first]) < 3 / 2
            ),
        },
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
