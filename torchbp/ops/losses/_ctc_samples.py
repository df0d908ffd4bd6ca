"""What the record of ``ctc_loss`` reads: samples, and a reference that sums over all paths."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchbp.ops._reduction import reduce
from torchbp.ops._samples import Make, Sample, stored

__all__ = ["arguments", "benchmark", "errors", "reference", "samples", "saved_bytes"]


def arguments(make: Make, row: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x, the targets (padded, or in a row) and both lengths, of three sequences."""
    x = make.normal(5, 3, 4, requires_grad=False).double().log_softmax(2).to(make.dtype)
    targets = make.integers([[1, 1], [2, 3], [3, 1]])
    times, lengths = make.integers([5, 4, 3]), make.integers([2, 2, 1])
    targets = torch.cat([v[:n] for v, n in zip(targets, lengths, strict=True)]) if row else targets
    return x.requires_grad_(), targets, times, lengths


def samples(make: Make) -> Iterator[Sample]:
    """Yield every way to call it."""
    for reduction in ("mean", "sum", "none"):
        yield Sample(arguments(make), {"reduction": reduction}, reduction)
    yield Sample(arguments(make, row=True), name="row")
    x, targets, _, lengths = arguments(make)
    short = make.integers([2, 4, 1])  # two labels alike need three times
    yield Sample((x, targets, short, lengths), {"zero_infinity": True}, "zero-infinity")
    one = (
        x[:, 0].detach().clone().requires_grad_(),
        targets[1].clone(),
        make.integers(5),
        make.integers(2),
    )
    yield Sample(one, {"blank": 1, "reduction": "none"}, "1d")


def errors(make: Make) -> Iterator[Sample]:
    """Yield what it refuses."""
    x, targets, times, lengths = arguments(make)
    yield Sample((x, targets, times, lengths), {"reduction": "average"}, name="reduction")
    yield Sample((x, targets, times, lengths), {"blank": 4}, name="blank")
    yield Sample((x, targets, times[:2], lengths), name="lengths")
    yield Sample((x, targets, times + 5, lengths), name="too-long")
    yield Sample((x, targets, times.double(), lengths), name="float-input-lengths")
    yield Sample((x, targets, times, lengths.double()), name="float-target-lengths")
    row = targets.flatten()[: int(lengths.sum()) - 1]
    yield Sample((x, row, times, lengths), name="row-too-short")
    row = targets.flatten().repeat(2)[: int(lengths.sum()) + 1]
    yield Sample((x, row, times, lengths), name="row-too-long")


def benchmark(make: Make, n: int) -> Sample:
    """Return 16 sequences of 64 classes, ``n`` values in all."""
    steps = max(20, n // (16 * 64))
    x = make.normal(steps, 16, 64, requires_grad=False).log_softmax(2).requires_grad_()
    labels = 1 + make.labels(16, steps // 4, classes=63)
    times, lengths = make.integers([steps] * 16), make.integers([steps // 4] * 16)
    return Sample((x, labels, times, lengths))


def reference(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """The sum over all paths, one by one, since torch's gradient is not the derivative by ``log_probs``."""
    rest: tuple[Any, ...] = (input_lengths, target_lengths, blank, reduction, zero_infinity)
    F.ctc_loss(log_probs.detach(), targets, *rest)  # for its errors
    single = log_probs.dim() == 2
    x = log_probs.unsqueeze(1) if single else log_probs
    lengths, times = target_lengths.reshape(-1).tolist(), input_lengths.reshape(-1).tolist()
    values, start = [], 0
    for n, (length, time) in enumerate(zip(lengths, times, strict=True)):
        row = (
            targets.reshape(len(lengths), -1)[n]
            if single or targets.dim() == 2
            else targets[start:]
        )
        start += length
        values.append(-_of_paths(x[:time, n], row[:length].tolist(), blank))
    loss = torch.stack(values)
    if zero_infinity:
        loss = torch.where(loss.isinf(), 0.0, loss)
    if reduction == "mean":
        loss = loss / target_lengths.reshape(-1).clamp(min=1)
    loss = reduce(loss, reduction)
    return loss.squeeze(0) if single and loss.dim() else loss


def _of_paths(x: Tensor, labels: Sequence[int], blank: int) -> Tensor:
    paths = torch.cartesian_prod(*(torch.arange(x.shape[1]),) * x.shape[0]).view(-1, x.shape[0])
    spelt = []
    for path in paths.tolist():
        merged = [c for i, c in enumerate(path) if i == 0 or c != path[i - 1]]
        spelt.append([c for c in merged if c != blank] == list(labels))
    paths = paths[torch.tensor(spelt)]
    if not len(paths):
        return x.sum() * 0 - torch.inf
    return x.gather(1, paths.T.to(x.device)).sum(0).logsumexp(0)


def saved_bytes(x: Tensor, targets: Tensor, times: Tensor, lengths: Tensor, **_: object) -> int:
    """Return the bytes that backward keeps."""
    padded = lengths.numel() * int(lengths.max()) * targets.element_size()
    in_a_row = x.dim() == 3 and targets.dim() == 1
    return stored(x, times, lengths) + (padded if in_a_row else stored(targets))
