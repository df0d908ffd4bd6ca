"""Image recognition: a convolutional network on Fashion-MNIST.

Convolution and pooling are torch's; normalization, activation, dropout, linear layer and loss have torchbp's backward.
"""

import sys

import torch
from _data import fashion
from _program import batches, finish, parser, track

import torchbp
from torchbp import nn


def network(classes: int) -> nn.Sequential:
    """Return four 3×3 convolutions, each with BatchNorm and ReLU, halving the picture twice; then a linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(4 * 64, classes)
    )


def main() -> int:
    """Train with one cycle of the learning rate, and test."""
    options = parser(__doc__, "fashion_cnn")
    options.add_argument("--epochs", type=float, default=2.5)
    options.add_argument("--batch", type=int, default=128)
    options.add_argument("--lr", type=float, default=5e-3)
    args = options.parse_args()
    torch.manual_seed(args.seed)
    data = fashion(limit=600 if args.small else None)
    steps = max(int(args.epochs * len(data.x)) // args.batch, 1)

    model = network(classes=int(data.y.max()) + 1)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps)
    with torchbp.watch(model, optimizer, log_dir=args.log_dir) as monitor:
        for rows in track(
            batches(len(data.x), args.batch, steps), steps, f"training on {data.name}"
        ):
            loss = criterion(model(data.x[rows]), data.y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            monitor.log_loss(train=loss)
        model.eval()
        with torch.no_grad():
            guesses = torch.cat([model(x).argmax(1) for x in data.test_x.split(500)])
        accuracy = (guesses == data.test_y).float().mean().item()
        monitor.log("test/accuracy", accuracy)
    return finish(
        args,
        {"test accuracy": accuracy},
        promised={"test accuracy is at least 88 %": accuracy >= 0.88},
        monitor=monitor,
    )


if __name__ == "__main__":
    sys.exit(main())
