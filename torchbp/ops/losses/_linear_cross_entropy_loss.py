"""Torch's LinearCrossEntropyLoss, which is new in torch 2.13; before, a layer of the same arguments and parameters."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _WeightedLoss

from torchbp.ops._errors import shape, wrong

__all__ = ["LinearCrossEntropyLoss"]


class _Loss(_WeightedLoss):
    """The constructor, the attributes, the parameters and the repr of torch 2.13's."""

    __constants__ = ("num_classes", "out_features", "reduction", "ignore_index", "label_smoothing")

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ) -> None:
        name = "LinearCrossEntropyLoss"
        if weight is not None and weight.shape != (num_classes,):
            rule = f"a weight of shape ({num_classes},)"
            raise RuntimeError(wrong(name, rule, shape(weight), "pass a factor of each class"))
        if not 0 <= label_smoothing <= 1:
            rule = "label_smoothing in [0, 1]"
            raise RuntimeError(wrong(name, rule, label_smoothing, "0 does not smooth"))
        super().__init__(weight, None, None, reduction)
        self.num_classes, self.out_features = num_classes, out_features
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        outputs = math.prod(out_features, start=num_classes)
        self.linear = nn.Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)
        self.options = options

    def extra_repr(self) -> str:
        """Return torch's line."""
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes},"
            f" out_features={self.out_features}, bias={self.linear.bias is not None},"
            f" reduction={self.reduction}, ignore_index={self.ignore_index},"
            f" label_smoothing={self.label_smoothing}, options={self.options}"
        )


_Loss.__name__ = _Loss.__qualname__ = "LinearCrossEntropyLoss"
LinearCrossEntropyLoss: Any = getattr(nn, "LinearCrossEntropyLoss", _Loss)
