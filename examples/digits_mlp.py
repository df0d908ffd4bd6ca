"""A classifier of handwritten digits, every backward pass in it written by hand, watched while it trains.

Run it: ``python examples/digits_mlp.py``; then ``tensorboard --logdir runs``. Everything but the two marked lines is
an ordinary PyTorch script.
"""

import argparse
import time
from pathlib import Path

import torch
from rich.progress import track
from sklearn.datasets import load_digits

import torchbp
from torchbp import nn  # (1) torch.nn's names


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return training images and labels, then test images and labels; every fifth is for the test."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels).float() / 16, torch.from_numpy(labels)
    test = torch.arange(len(x)) % 5 == 0
    return x[~test], y[~test], x[test], y[test]


def main() -> None:
    """Train, and tell how it went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--log-dir", type=Path, default=Path("runs") / time.strftime("digits-%Y%m%d-%H%M%S")
    )
    args = parser.parse_args()

    torch.manual_seed(0)
    x, y, test_x, test_y = data()
    model = nn.Sequential(
        nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(128, 128), nn.LayerNorm(128), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(128, 10),
    )  # fmt: skip
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr)

    with torchbp.watch(model, optimizer, log_dir=args.log_dir) as monitor:  # (2)
        for _ in track(range(args.epochs), "training"):
            model.train()
            for rows in torch.randperm(len(x)).split(args.batch):
                loss = criterion(model(x[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                monitor.log_loss(train=loss)
            model.eval()
            with torch.no_grad():
                monitor.log_loss(val=criterion(model(test_x), test_y))

    accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    print(f"test accuracy {accuracy:.1%}")
    print(monitor.summary())
    print(f"tensorboard --logdir {args.log_dir}")


if __name__ == "__main__":
    main()
