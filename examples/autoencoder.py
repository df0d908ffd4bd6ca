"""Unsupervised: an autoencoder squeezes pictures through 32 numbers; its reconstructions are drawn."""

import sys

import torch
from _data import fashion
from _program import batches, draw_pictures, finish, parser, track
from torch import Tensor

import torchbp
import torchbp.functional as F
from torchbp import nn


class Autoencoder(nn.Module):
    """Linear layers with GELU down to a code, and up again to a picture."""

    def __init__(self, pixels: int, code: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, 256), nn.GELU(), nn.Linear(256, code))
        self.decoder = nn.Sequential(
            nn.Linear(code, 256), nn.GELU(), nn.Linear(256, pixels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of pictures ``(N, 1, H, W)``."""
        return self.decoder(self.encoder(x.flatten(1))).view_as(x)


def main() -> int:
    """Train, compare with the mean picture, draw ten reconstructions."""
    options = parser(__doc__, "autoencoder")
    options.add_argument("--steps", type=int, default=2000)
    options.add_argument("--code", type=int, default=32)
    options.add_argument("--lr", type=float, default=2e-3)
    args = options.parse_args()
    torch.manual_seed(args.seed)
    data = fashion(limit=600 if args.small else None)
    steps = 20 if args.small else args.steps

    model = Autoencoder(data.x[0].numel(), args.code)
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torchbp.watch(model, optimizer, log_dir=args.log_dir) as monitor:
        for rows in track(batches(len(data.x), 128, steps), steps, f"training on {data.name}"):
            loss = F.mse_loss(model(data.x[rows]), data.x[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            monitor.log_loss(train=loss)
        with torch.no_grad():
            made = model(data.test_x)
            error = F.mse_loss(made, data.test_x)
        monitor.log_loss(val=error)
    variance = data.test_x.var(0, correction=0).mean().item()
    shown = {"test picture": data.test_x[:10], f"from {args.code} numbers": made[:10]}
    draw_pictures(args.log_dir / "reconstructions.png", shown)
    return finish(
        args,
        {"test mean squared error": error.item(), "of the mean picture": variance},
        promised={"the error is below a sixth of the mean picture's": error.item() < variance / 6},
        monitor=monitor,
    )


if __name__ == "__main__":
    sys.exit(main())
