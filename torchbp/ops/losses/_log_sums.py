"""Σ log(1 + exp(-|z|)), the part of a softplus that is not linear, with a sixteenth or a fourth of the logarithms.

    log(1 + a) + log(1 + b) = log(1 + (a + b + a b)),   a, b ≥ 0                              (1)
    log(1 - p) + log(1 - q) = log(1 - (p + q - p q)),   p, q ≤ 1/2                            (2)

Pairs are put together before the logarithm is taken, as what they have above 1: all terms are positive, so that
nothing cancels, and a small one is not lost beside the 1. Of 16 elements, each at most 1, that is below 2¹⁶.
By (2) from p = σ(-|z|), as 1 + exp(-|z|) = 1 / (1 - p): of 4 elements 1 - p is at least 1/16; of 16 it had lost 16 of
its 24 digits.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from torchbp.ops._numbers import constant
from torchbp.ops._pieces import length_written, pieces

__all__ = ["FEW", "log1p_exp_sum", "minus_log1p_sum", "reduced_softplus"]

FEW = 1 << 14  # elements, of which as many calls as here cost more than logarithms
_FOLDS = 4
_LOG2_E = math.log2(math.e)


def log1p_exp_sum(z: Tensor) -> Tensor:  # (n,) -> ()
    """Return Σ log(1 + exp(-z)), z ≥ 0; ``z`` is written over."""
    e = z.mul_(-_LOG2_E).exp2_()  # a third of exp's time; a small e is off by z roundings
    for _ in range(_FOLDS):
        if e.numel() % 2:
            break
        a, b = e.chunk(2)
        e = torch.addcmul(a, a, b, out=a).add_(b)  # (1)
    return e.log1p_().sum()


def minus_log1p_sum(p: Tensor, spare: Tensor) -> Tensor:  # (n,), (n/2,) -> ()
    """Return -Σ log(1 - p), 0 ≤ p ≤ 1/2, on the CPU; only ``spare`` is written to."""
    if p.numel() % 4:
        return p.neg().log1p_().sum().neg_()
    one = constant(1.0, p.dtype)
    first, second = p.chunk(2)
    torch.lerp(first, one, second, out=spare)  # (2): p + q · (1 - p), in one pass
    first, second = spare.chunk(2)
    return torch.lerp(first, one, second, out=first).neg_().log1p_().sum().neg_()


def reduced_softplus(
    parts: Callable[[Tensor, Tensor, Tensor, Tensor], object],
    reduction: str,
    x: Tensor,
    target: Tensor,
) -> Tensor:
    """Return the mean or sum of linear + log(1 + exp(-z)), z ≥ 0, piece by piece.

    Args:
        parts: ``parts(linear, z, x, target)`` writes the first two.
        reduction: ``"mean"`` or ``"sum"``.
        x: Float32 or wider.
        target: Alike.
    """
    length = min(x.numel(), 2 * length_written(x))  # many calls a piece
    linear, z = x.new_empty(length), x.new_empty(length)
    sums = []
    for x_part, t_part in pieces(x.view(-1), target.view(-1), length=length):
        n = x_part.numel()
        parts(linear[:n], z[:n], x_part, t_part)
        sums += [linear[:n].sum(), log1p_exp_sum(z[:n])]
    total = torch.stack(sums).sum()
    return total / x.numel() if reduction == "mean" else total
