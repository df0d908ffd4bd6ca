"""For Hugging Face's Trainer: ``Trainer(..., callbacks=[Watch()])``.

It watches from the first step on, takes the losses from what the Trainer logs, and closes at the end of
training. Give the Trainer ``logging_steps`` as small as losses are wanted.
"""

from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from torchbp.monitor._monitor import Monitor
from torchbp.monitor._watch import watch

__all__ = ["Watch"]


class Watch(TrainerCallback):
    """Watches the model that is trained.

    Args:
        log_dir: Folder for TensorBoard; ``watch`` in the Trainer's output folder by default.
        options: What else :func:`torchbp.watch` takes.

    Attributes:
        monitor: The monitor; None before training.
    """

    def __init__(self, log_dir: str | Path | None = None, **options: Any) -> None:
        self.monitor: Monitor | None = None
        self._log_dir, self._options = log_dir, options

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **_: Any,
    ) -> None:
        """Attach, now that the optimizer exists."""
        if model is not None:
            folder = self._log_dir or Path(args.output_dir or ".") / "watch"
            self.monitor = watch(model, optimizer, log_dir=folder, **self._options)
            self.monitor.step = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Log the losses."""
        if self.monitor is not None and logs:
            self.monitor.log_loss(train=logs.get("loss"), val=logs.get("eval_loss"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Close, and say what was found."""
        if self.monitor is not None:
            self.monitor.close()
            logging.get_logger(__name__).info(self.monitor.summary())
