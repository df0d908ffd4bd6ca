"""Samples, wrong inputs and the reference of linear_cross_entropy."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchbp.ops._samples import Make, Sample, stored
from torchbp.ops.losses import cross_entropy

__all__ = ["benchmark", "errors", "reference", "samples", "saved_bytes"]


def samples(make: Make) -> Iterator[Sample]:
    """Yield right inputs: positions of several dimensions, both kinds of target, every option."""
    w = make.normal(4, 3)
    for reduction in ("mean", "sum", "none"):
        kwargs: dict[str, Any] = {"reduction": reduction}
        for shape in ((5, 3), (3,), (2, 3, 3), (1, 3)):
            name = f"{'x'.join(map(str, shape))}-{reduction}"
            target = make.labels(*shape[:-1], classes=4)
            bias = {"linear_bias": make.normal(4), **kwargs}
            yield Sample((make.normal(*shape), w, target), bias, name)
            q = make.probabilities(*shape[:-1], 4, dim=-1)
            yield Sample((make.normal(*shape), w, q), kwargs, f"{name}-probabilities")
        target = make.labels(5, classes=4)
        target[1] = 3
        weighted = {"weight": make.uniform(4, low=0.2), **kwargs}
        for smoothing in (0.0, 0.1, 1.0):
            smooth = {"label_smoothing": smoothing, "ignore_index": 3}
            name = f"{reduction}-smoothing{smoothing}"
            yield Sample((make.normal(5, 3), w, target), {**kwargs, **smooth}, f"{name}-ignored")
            yield Sample((make.normal(5, 3), w, target), {**weighted, **smooth}, f"{name}-weight")
            q = make.probabilities(5, 4, dim=1)
            both = {**weighted, "label_smoothing": smoothing}
            yield Sample((make.normal(5, 3), w, q), both, f"{name}-weight-probabilities")
        capped = {"softcap": 1.5, "z_loss": 0.1, "linear_bias": make.normal(4), **kwargs}
        yield Sample(
            (make.normal(5, 3), w, target), {**capped, "ignore_index": 3}, f"{reduction}-capped"
        )
        q = make.probabilities(5, 4, dim=1)
        yield Sample(
            (make.normal(5, 3), w, q), {**capped, **weighted}, f"{reduction}-capped-probabilities"
        )
        trained = make.probabilities(5, 4, dim=1, requires_grad=True)
        yield Sample((make.normal(5, 3), w, trained), kwargs, f"{reduction}-trained-probabilities")
        places = {"linear_bias": make.normal(4, 2), **weighted}
        target = make.labels(5, 2, classes=4)
        yield Sample(
            (make.normal(5, 3), make.normal(4, 2, 3), target), places, f"{reduction}-places"
        )
        if reduction != "mean":  # the mean of nothing is NaN: a test of its own
            ignored = torch.full((5,), -100, device=make.device)
            yield Sample((make.normal(5, 3), w, ignored), kwargs, f"{reduction}-all-ignored")
            yield Sample((make.normal(0, 3), w, ignored[:0]), kwargs, f"{reduction}-empty")
    frozen, data = make.normal(4, 3, requires_grad=False), make.normal(5, 3, requires_grad=False)
    yield Sample((make.normal(5, 3), frozen, make.labels(5, classes=4)), name="frozen-weight")
    yield Sample((data, w, make.labels(5, classes=4)), name="data-input")
    yield Sample((make.normal(5, 3), w, make.labels(5, classes=4).to(torch.uint8)), name="uint8")
    yield Sample((make.normal(3), w, make.labels(1, classes=4)), name="one-in-a-row")


def errors(make: Make) -> Iterator[Sample]:
    """Yield wrong inputs."""
    x, w, target = make.normal(5, 3), make.normal(4, 3), make.labels(5, classes=4)
    yield Sample((x, w, target + 4), name="index-above")
    yield Sample((x, w, target - 4), name="index-below")
    yield Sample((x, w, target[:3]), name="batch")
    yield Sample((x, w, target.double()), name="target-dtype")
    yield Sample((x, w, target), {"reduction": "average"}, name="reduction")
    yield Sample((x, w, target), {"label_smoothing": 2.0}, name="smoothing")
    yield Sample((x, w, target), {"weight": make.uniform(3)}, name="weight")
    yield Sample(
        (x, w, target), {"weight": make.uniform(4, requires_grad=True)}, name="weight-grad"
    )
    q = make.probabilities(5, 4, dim=1)
    yield Sample((x, w, q), {"ignore_index": 1}, name="ignored-probabilities")
    yield Sample((x, w, make.labels(5, 4, classes=2)), name="integer-probabilities")
    yield Sample((x, make.normal(4, 2), target), name="features")
    yield Sample((make.normal(), w, target), name="scalar")
    yield Sample((x, w, target), {"linear_bias": make.normal(3)}, name="bias")
    yield Sample((x, w.half(), target), name="dtypes")
    if hasattr(F, "linear_cross_entropy"):  # of these, the definition has other errors or none
        places, labels = make.normal(4, 2, 3), make.labels(2, classes=4)
        yield Sample((x, w, target.unsqueeze(1)), name="target-dims")
        yield Sample((x, make.normal(3), target), name="weight-1d")
        yield Sample((make.normal(3), places, labels), name="places-without-batch")


def benchmark(make: Make, n: int) -> Sample:
    """Return many positions of few features, and eight times as many classes."""
    width = max(8, min(256, math.isqrt(n) // 4))
    x = make.normal(max(1, n // width), width)
    weight = (make.normal(8 * width, width).detach() / math.sqrt(width)).requires_grad_()
    return Sample((x, weight, make.labels(x.shape[0], classes=8 * width)))


def saved_bytes(x: Tensor, linear_weight: Tensor, target: Tensor, **kwargs: Any) -> int:
    """Return what the samples keep: the inputs; those that go through the logits keep these instead of the bias."""
    kept = stored(x, linear_weight, target, kwargs.get("weight"))
    if linear_weight.dim() > 2 or target.requires_grad:
        places = math.prod(linear_weight.shape[:-1])
        return kept + math.prod(x.shape[:-1]) * places * x.element_size()
    return kept + stored(kwargs.get("linear_bias"))


def reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,  # torch's chunks: the values are the same
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Return the definition: torch's linear, then its cross entropy."""
    classes, *places = linear_weight.shape[:-1]
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = F.linear(input, linear_weight.flatten(0, -2), bias)
    positions = input.shape[:-1]
    soft = target.shape == (*positions, classes, *places)
    logits = logits.reshape(-1, classes, *places)
    loss = cross_entropy.OP.reference(  # pyright: ignore[reportOptionalCall]
        logits,
        target.reshape(logits.shape if soft else (-1, *places)),
        weight,
        reduction=reduction,
        ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
    )
    assert isinstance(loss, Tensor)
    return loss.reshape((*positions, *places)) if reduction == "none" else loss
