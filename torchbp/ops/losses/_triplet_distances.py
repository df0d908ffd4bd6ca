"""The distances of triplet margin loss and their gradients; the numbers of lines are those of its derivation."""

import math
from functools import partial

import torch
from torch import Tensor

from torchbp.ops._clamp import above
from torchbp.ops._function import as_dtype, fused, is_half
from torchbp.ops._numbers import number
from torchbp.ops._reduction import FEW
from torchbp.ops.kernels import ROWS, in_one_loop, looped

__all__ = ["euclidean_gradients", "slopes", "with_norms"]


def with_norms(
    a: Tensor, p: Tensor, n: Tensor, power: float, eps: float, swap: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Return a - p + ε, a - n + ε and, with swap, p - n + ε, and their norms, of half precision in float32."""
    if power == 2:
        count = 3 if swap else 2
        formula = partial(_with_squares, eps=eps, swap=swap)
        made = in_one_loop(formula, a, p, n, outputs=(None,) * count + (ROWS,) * count)
        if made is not None:
            return list(made[:count]), [square.sqrt_() for square in made[count:]]
    vs = _differences(a, p, n, eps, swap)
    return [as_dtype(v, a.dtype) for v in vs], [_norm(v, power) for v in vs]


def _with_squares(a: Tensor, p: Tensor, n: Tensor, eps: float, *, swap: bool) -> tuple[Tensor, ...]:
    vs = _differences(a, p, n, eps, swap)
    return *vs, *(v * v for v in vs)


def _differences(a: Tensor, p: Tensor, n: Tensor, eps: float, swap: bool) -> list[Tensor]:
    """Return a - p + ε, a - n + ε and, with swap, p - n + ε; in float32 for half precision."""
    if is_half(a):
        a, p, n = a.float(), p.float(), n.float()
    pairs = ((a, p), (a, n), (p, n)) if swap else ((a, p), (a, n))
    if not fused(a, p, n):
        return [u - v + eps for u, v in pairs]
    return [(u - v).add_(number(eps, a)) for u, v in pairs]


def _norm(v: Tensor, power: float) -> Tensor:
    return torch.linalg.vector_norm(v, power, dim=-1)


def euclidean_gradients(
    ap: Tensor, an: Tensor, ds: Tensor | None, s: Tensor, margin: float, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...] | None:
    """Return (3) for p = 2 without swap, in one loop or three passes; ``None`` where only :func:`slopes` will do.

    Args:
        ap: a - p + ε.
        an: a - n + ε.
        ds: Their norms; ``None`` in half precision, where they are made again.
        s: The gradient of each loss.
        margin: m.
        needs: Which of the three are needed; the loop makes all.
    """
    if looped(ap, an):
        by_near, by_far = _shares(_norms(ap, an) if ds is None else ds, s, margin)
        made = in_one_loop(_all_three, ap, an, by_near, by_far, outputs=(None,) * 3)
        if made is not None:
            return made
    if ds is None or not fused(s, ap, an):
        return None
    if ap.numel() <= FEW:  # in short rows the rounding of s / d is seen, a third of the error
        of_near, of_far = ds.masked_fill(ds == number(0, ds), math.inf).unsqueeze(-1)
        s = _scale(ds, s, margin).unsqueeze(-1)
        grad_p, grad_n = (ap / of_near).mul_(-s), (an / of_far).mul_(s)
    else:
        by_near, by_far = _shares(ds, s, margin)
        grad_p, grad_n = torch.mul(ap, -by_near), torch.mul(an, by_far)
    need_a, need_p, need_n = needs
    grad_a = torch.add(grad_p, grad_n).neg_() if need_a else None
    return grad_a, grad_p if need_p else None, grad_n if need_n else None


def _norms(ap: Tensor, an: Tensor) -> Tensor:
    made = in_one_loop(_squares, ap, an, outputs=(ROWS, ROWS))
    if made is None:
        return torch.stack([_norm(v.float(), 2) for v in (ap, an)])
    return torch.stack(made).sqrt_()


def _squares(ap: Tensor, an: Tensor) -> tuple[Tensor, Tensor]:
    return ap * ap, an * an


def _scale(ds: Tensor, s: Tensor, margin: float) -> Tensor:
    """Return s δ."""
    near, far = ds
    return s * above(near - far + number(margin, near), number(0, near)).to(near.dtype)


def _shares(ds: Tensor, s: Tensor, margin: float) -> Tensor:
    """Return s δ / ‖v‖, 0 where v is 0: (2, *, 1)."""
    share = _scale(ds, s, margin) / ds
    return share.masked_fill_(ds == number(0, ds), 0).unsqueeze(-1)


def _all_three(
    ap: Tensor, an: Tensor, by_near: Tensor, by_far: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_p, grad_n = -(ap * by_near), an * by_far
    return -(grad_p + grad_n), grad_p, grad_n


def slopes(
    ap: Tensor, an: Tensor, pn: Tensor | None, s: Tensor, margin: float, power: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (2) from the differences, in float32 for half precision."""
    if is_half(ap):
        ap, an, pn = ap.float(), an.float(), None if pn is None else pn.float()
    near, far = _norm(ap, power), _norm(an, power)
    if pn is None:
        s = s * above(near - far + margin, 0).to(near.dtype)
        return _slope(ap, near, power, s), _slope(an, far, power, -s), None
    across = _norm(pn, power)
    share = 0.5 * ((across < far).to(s.dtype) + (across <= far).to(s.dtype))
    s = s * above(near - torch.minimum(far, across) + margin, 0).to(near.dtype)
    of_an = _slope(an, far, power, -s * (1 - share))
    return _slope(ap, near, power, s), of_an, _slope(pn, across, power, -s * share)


def _slope(v: Tensor, d: Tensor, power: float, s: Tensor) -> Tensor:
    """Return s · D(v), (1)."""
    zero = d == 0
    d, s = d.masked_fill(zero, 1), s.masked_fill(zero, 0)
    if power == 2:
        return v * (s / d).unsqueeze(-1)
    if power == 1:
        return v.sgn() * s.unsqueeze(-1)
    if power == 0:  # the number of elements that are not 0
        return torch.zeros_like(v)
    if power == math.inf:
        largest = (v.abs() == d.unsqueeze(-1)).to(v.dtype)
        return v.sgn() * largest * (s / largest.sum(-1).clamp(min=1)).unsqueeze(-1)
    share = v.abs() / d.unsqueeze(-1)
    if power < 1:
        share = share.masked_fill(
            v == 0, 1
        )  # the slope is infinite there; sgn(v) makes it 0, as in torch
    return v.sgn() * share.pow(power - 1) * s.unsqueeze(-1)
