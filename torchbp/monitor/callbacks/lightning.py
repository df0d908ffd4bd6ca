"""For Lightning: ``Trainer(callbacks=[Watch()])``.

It watches from the first training batch on, takes the training loss from every batch and the validation
loss from the metrics that were logged, and closes at the end or at an exception.
"""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from torchbp.monitor._monitor import Monitor
from torchbp.monitor._watch import watch

__all__ = ["Watch"]


class Watch(Callback):
    """Watches the module that is fitted.

    Args:
        log_dir: Folder for TensorBoard; ``watch`` in the logger's folder by default.
        val: The logged metric that is the validation loss.
        options: What else :func:`torchbp.watch` takes.

    Attributes:
        monitor: The monitor; None before training.
    """

    def __init__(
        self, log_dir: str | Path | None = None, *, val: str = "val_loss", **options: Any
    ) -> None:
        self.monitor: Monitor | None = None
        self._log_dir, self._val, self._options = log_dir, val, options

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, now that the optimizers exist."""
        model = trainer.model if trainer.model is not None else pl_module
        folder = self._log_dir
        if folder is None and trainer.log_dir is not None:
            folder = Path(trainer.log_dir) / "watch"
        self.monitor = watch(model, trainer.optimizers, log_dir=folder, **self._options)
        self.monitor.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the loss."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if self.monitor is not None and loss is not None:
            self.monitor.log_loss(train=loss)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the validation loss."""
        loss = trainer.callback_metrics.get(self._val)
        if self.monitor is not None and loss is not None and not trainer.sanity_checking:
            self.monitor.log_loss(val=loss)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close, and say what was found."""
        if self.monitor is not None:
            self.monitor.close()
            rank_zero_info(self.monitor.summary())

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Close without waiting for other ranks."""
        if self.monitor is not None:
            self.monitor.close(local=True)
