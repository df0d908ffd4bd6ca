"""The pairs of multi-label margin loss, one class of T at a time against all that are not in T, for a CPU.

Torch's kernel asks of each pair whether it counts, and a processor guesses wrong for every other: 3 to 4 ns a pair. A
comparison written as numbers takes 0.3.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torchbp.ops._function import visible
from torchbp.ops._pieces import PIECE

__all__ = ["pair_gradient", "pair_values", "pairs_at_hand"]


class _Some(NamedTuple):
    """Some rows, those with most classes in T first."""

    places: Tensor  # (M,)
    others: Tensor  # (M, C): x, and -∞ for the classes in T
    index: Tensor  # (M, K): the classes in T; where a row has no k-th, its first again
    bounds: Tensor  # (M, K): x_j - 1, below which another class costs nothing
    counts: list[int]  # of the first rows that have a k-th class


def pairs_at_hand(x: Tensor) -> bool:
    """Whether :func:`pair_values` takes ``x``: it has no infinities, of which a difference is NaN."""
    return visible(x) and x.numel() > 0 and all(math.isfinite(v) for v in torch.aminmax(x))


def pair_values(x: Tensor, target: Tensor) -> Tensor:
    """Return 1/C Σ max(0, 1 - x_j + x_i) of each row."""
    values = x.new_zeros(x.shape[0])
    for some in _rows(x, target):
        sums, room = some.others.new_zeros(len(some.places)), torch.empty_like(some.others)
        for bound, n in zip(some.bounds.split(1, 1), some.counts, strict=True):
            z = torch.sub(some.others[:n], bound[:n], out=room[:n])
            sums[:n] += z.relu_().sum(1)
        values[some.places] = sums
    return values / x.shape[1]


def pair_gradient(x: Tensor, s: Tensor, target: Tensor) -> Tensor:
    """Return (1) and (2) of the loss; s is (N,). What is counted is exact, and scaled once."""
    gradient = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for some in _rows(x, target):
        of_others, room = torch.zeros_like(some.others), torch.empty_like(some.others)
        of_members = torch.zeros_like(some.bounds)
        for k, (bound, n) in enumerate(zip(some.bounds.split(1, 1), some.counts, strict=True)):
            # the same pairs as z > 0, for a sum has the sign that it has before it is rounded
            active = torch.gt(some.others[:n], bound[:n], out=room[:n])
            of_others[:n] += active
            of_members[:n, k] = active.sum(1)
        of_others.scatter_add_(1, some.index, of_members.neg_())
        gradient[some.places] = of_others.mul_((s[some.places] / x.shape[1]).unsqueeze(1))
    return gradient


def _rows(x: Tensor, target: Tensor) -> Iterator[_Some]:
    """Yield all rows with classes in T, as many at a time as stay in the cache."""
    held = (target >= 0).any(0).nonzero()
    target = target[:, : int(held[-1]) + 1 if len(held) else 0]  # most is padding
    counts = (target < 0).cumsum(1) == 0
    length, order = counts.sum(1).sort(descending=True)
    order = order[: int(length.count_nonzero())]
    for places in order.split(max(1, PIECE // x.shape[1])):
        counted, classes = counts[places], target[places]
        index = torch.where(counted, classes, classes[:, :1])
        others = x[places]
        bounds = others.gather(1, index) - 1
        others.scatter_(1, index, -torch.inf)
        yield _Some(places, others, index, bounds, counted.sum(0).tolist())
