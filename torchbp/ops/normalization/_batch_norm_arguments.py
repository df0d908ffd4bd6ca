"""What ``batch_norm`` refuses."""

import math

from torch import Tensor

from torchbp.ops._errors import shape, wrong

__all__ = ["check"]


def check(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
) -> None:
    """Raise for shapes and settings that do not fit, as torch does."""
    if training and math.prod((*input.shape[:1], *input.shape[2:])) == 1:
        rule = "more than 1 value per channel when training"
        raise ValueError(wrong("batch_norm", rule, shape(input), "the variance of one value is 0"))
    if eps < 0 or (training and eps == 0):
        raise ValueError(wrong("batch_norm", "eps >= 0, > 0 in training", eps, "use 1e-5"))
    if (running_mean is None) != (running_var is None) and training:
        advice = "pass both or neither"
        raise ValueError(wrong("batch_norm", "two running statistics", "one", advice))
    if (running_mean is None or running_var is None) and not training:
        advice = "pass running_mean and running_var, or training=True"
        raise RuntimeError(wrong("batch_norm", "running statistics in evaluation", None, advice))
    channels = input.shape[1] if input.dim() > 1 else 0
    for name, t in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if t is not None and t.numel() != channels:
            rule = f"{name} of {channels} elements for an input of shape {shape(input)}"
            raise RuntimeError(wrong("batch_norm", rule, shape(t), "one a channel"))
