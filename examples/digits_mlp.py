"""A classifier of handwritten digits, every backward pass in it written by hand, watched while it trains.

Everything but the two marked lines is an ordinary PyTorch script.
"""

import sys

import torch
from _data import digits
from _program import finish, parser, track

import torchbp
from torchbp import nn  # (1) torch.nn's names


def main() -> int:
    """Train, and tell how it went."""
    options = parser(__doc__, "digits_mlp")
    options.add_argument("--epochs", type=int, default=30)
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--lr", type=float, default=1e-3)
    args = options.parse_args()
    torch.manual_seed(args.seed)
    data = digits()
    x, y, test_x = data.x.flatten(1), data.y, data.test_x.flatten(1)
    epochs = 2 if args.small else args.epochs

    model = nn.Sequential(
        nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(128, 128), nn.LayerNorm(128), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(128, 10),
    )  # fmt: skip
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr)

    with torchbp.watch(model, optimizer, log_dir=args.log_dir) as monitor:  # (2)
        for _ in track(range(epochs), epochs, f"training on {data.name}"):
            model.train()
            for rows in torch.randperm(len(x)).split(args.batch):
                loss = criterion(model(x[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                monitor.log_loss(train=loss)
            model.eval()
            with torch.no_grad():
                monitor.log_loss(val=criterion(model(test_x), data.test_y))

    accuracy = (model(test_x).argmax(1) == data.test_y).float().mean().item()
    return finish(
        args,
        {"test accuracy": accuracy},
        promised={"test accuracy is at least 96 %": accuracy >= 0.96},
        monitor=monitor,
    )


if __name__ == "__main__":
    sys.exit(main())
