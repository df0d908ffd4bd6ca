"""Unsupervised: pictures are told apart without labels (InfoNCE), then a linear probe reads the classes off.

Two cut-outs of the same picture should have similar codes, those of different pictures not (SimCLR: Chen et al. 2020,
arXiv:2002.05709). With few labels, a linear classifier on the codes beats the same on the pixels.
"""

import sys

import torch
from _data import fashion
from _program import batches, finish, parser, track
from torch import Tensor

import torchbp
import torchbp.functional as F
from torchbp import nn


class Encoder(nn.Module):
    """Three convolutions to a code; a projection for the contrastive loss alone."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((1, 32, 2), (32, 64, 2), (64, 128, 1)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride, padding=1),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.projection = nn.Sequential(nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 64))

    def forward(self, x: Tensor) -> Tensor:
        """Return projected codes ``(N, 64)``."""
        return self.projection(self.body(x))


def varied(x: Tensor) -> Tensor:
    """Return each picture moved, mirrored, zoomed, brightened and partly covered, at random."""
    n, _, height, width = x.shape
    zoom = 0.7 + 0.4 * torch.rand(n, 2)
    zoom[:, 0] *= torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = zoom[:, 0], zoom[:, 1]
    theta[:, :, 2] = 0.4 * torch.rand(n, 2) - 0.2
    y = F.grid_sample(
        x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False
    )
    y = y * (0.6 + 0.8 * torch.rand(n, 1, 1, 1))
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    top, left = (
        torch.rand(2, n, 1, 1, 1) * torch.tensor([height, width])[:, None, None, None, None]
    ).unbind()
    hole = ((rows - top).abs() < height / 8) & ((columns - left).abs() < width / 8)
    return y.masked_fill(hole, 0.0)


def probe(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Return the test accuracy of a linear classifier on standardized features."""
    mean, deviation = x.mean(0), x.std(0) + 1e-3
    x, test_x = (x - mean) / deviation, (test_x - mean) / deviation
    layer = nn.Linear(x.shape[1], int(y.max()) + 1)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(x), y) + 3e-3 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (layer(test_x).argmax(1) == test_y).float().mean().item()


def main() -> int:
    """Train without labels; then compare two linear probes that see the same few labels."""
    options = parser(__doc__, "contrastive")
    options.add_argument("--steps", type=int, default=600)
    options.add_argument("--labels", type=int, default=500, help="labelled pictures for the probes")
    options.add_argument("--lr", type=float, default=2e-3)
    args = options.parse_args()
    torch.manual_seed(args.seed)
    data = fashion(limit=600 if args.small else None)
    steps = 3 if args.small else args.steps

    model = Encoder()
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps + 1)
    with torchbp.watch(model, optimizer, log_dir=args.log_dir) as monitor:
        for rows in track(batches(len(data.x), 256, steps), steps, f"telling {data.name} apart"):
            one, other = model(varied(data.x[rows])), model(varied(data.x[rows]))
            loss = (
                F.info_nce_loss(one, other, temperature=0.2)
                + F.info_nce_loss(other, one, temperature=0.2)
            ) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            monitor.log_loss(train=loss)
    model.eval()
    few, y = data.x[: args.labels], data.y[: args.labels]
    with torch.no_grad():
        codes = model.body(few), torch.cat([model.body(x) for x in data.test_x.split(500)])
    on_codes = probe(codes[0], y, codes[1], data.test_y)
    on_pixels = probe(few.flatten(1), y, data.test_x.flatten(1), data.test_y)
    return finish(
        args,
        {"probe on the codes": on_codes, "probe on the pixels": on_pixels, "labels": float(len(y))},
        promised={"the probe on the codes is better by a point": on_codes > on_pixels + 0.01},
        monitor=monitor,
    )


if __name__ == "__main__":
    sys.exit(main())
