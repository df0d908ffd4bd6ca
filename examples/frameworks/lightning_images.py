"""Lightning: a converted network on Fashion-MNIST, lean and watched, in Lightning's own loop."""

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from _data import fashion
from _program import finish, parser

import torchbp
import torchbp.functional as F
from torchbp.monitor.callbacks.lightning import Watch


class Classifier(pl.LightningModule):
    """Built from torch.nn as it is found everywhere; torchbp comes by a line."""

    def __init__(self, pixels: int, rate: float) -> None:
        super().__init__()
        nn = torch.nn
        self.rate = rate
        self.net = torchbp.lean(
            nn.Sequential(
                nn.Flatten(),
                nn.Linear(pixels, 256), nn.LayerNorm(256), nn.GELU(), nn.Dropout(0.1),
                nn.Linear(256, 128), nn.LayerNorm(128), nn.GELU(),
                nn.Linear(128, 10),
            )
        )  # fmt: skip

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """Log loss and accuracy."""
        logits = self.net(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))
        self.log("accuracy", (logits.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), self.rate)


def main() -> int:
    """Fit, and tell."""
    options = parser(__doc__, "lightning_images")
    options.add_argument("--epochs", type=int, default=1)
    options.add_argument("--lr", type=float, default=1e-3)
    args = options.parse_args()
    pl.seed_everything(args.seed)
    data = fashion(limit=1200 if args.small else None)
    train, test = (
        torch.utils.data.TensorDataset(*part)
        for part in ((data.x, data.y), (data.test_x, data.test_y))
    )
    watch = Watch(args.log_dir)
    trainer = pl.Trainer(
        max_epochs=args.epochs, accelerator="auto", callbacks=[watch], default_root_dir=args.log_dir,
        logger=False, enable_checkpointing=False, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(
        Classifier(data.x[0].numel(), args.lr),
        torch.utils.data.DataLoader(train, batch_size=64, shuffle=True),
        torch.utils.data.DataLoader(test, batch_size=500),
    )
    accuracy = float(trainer.callback_metrics["accuracy"])
    return finish(
        args,
        {"test accuracy": accuracy},
        promised={"test accuracy is at least 83 %": accuracy >= 0.83},
        monitor=watch.monitor,
    )


if __name__ == "__main__":
    sys.exit(main())
