r"""Normalize: y = x / m with m = max(n, ε), n = ‖x‖_p along one dimension.

Derivation, for one vector:
    ∂n/∂x = sgn(x) · (|x|/n)^(p-1)          p = 2: x/n;  p = 1: sgn(x);  p = ∞: sgn(x) where |x| = n, shared among ties;
                                            p = 0: 0                                          (1)
    grad_x = grad_y / m - (1) · Σ grad_y · x / m²    where n > ε, else the first term alone    (2)
    tangent_y = tangent_x / m - x · Σ (1) · tangent_x / m²    where n > ε                     (3)
    Complex: sgn(x) = x/|x|, and of the sums Re Σ grad_y · conj(x), Re Σ conj(1) · tangent_x.

Saves:
    x (4 bytes per float32 element, 2 in half precision); n is made again: one reading of x.

Edge values:
    x = 0: y = 0, grad_x = grad_y / ε, which is large, as in torch.   x² overflows: in float64.
    n = ε: as in torch, until torch 2.13 as where n > ε, then the first term alone (_clamp.py).

Sources:
    Salimans, Kingma, "Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep Neural
    Networks", 2016, arXiv:1602.07868 (the gradient of a direction, p = 2).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function

from torchbp.ops._clamp import above
from torchbp.ops._function import (
    Context,
    entry,
    fused,
    in_autocast_float32,
    is_half,
    public,
    widened,
)
from torchbp.ops._op import Op
from torchbp.ops._range import in_float64, in_range
from torchbp.ops._samples import Make, Sample, square
from torchbp.ops.kernels import ROWS, in_one_loop, looped, many

__all__ = ["NormalizeFunction", "normalize"]


class NormalizeFunction(Function):
    """Division by the norm with a hand-written gradient. Call it through :func:`normalize`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, p: float, dim: int, eps: float) -> Tensor:
        if _has_rows(x, p, dim) and looped(x):
            square = in_one_loop(torch.square, x, outputs=(ROWS,))
            n = _norm(x, p, dim) if square is None else square.sqrt_().unsqueeze(-1)
            y = in_one_loop(torch.div, x, n.clamp_min_(eps))
            if y is not None:
                return y
        return (x / _norm(x, p, dim).clamp_min(eps)).to(x.dtype)

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, float, int, float], output: Tensor
    ) -> None:
        x, ctx.p, ctx.dim, ctx.eps = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        if _has_rows(x, ctx.p, ctx.dim) and looped(grad_y, x):
            grad_x = _of_rows(grad_y, x, ctx.eps)
            if grad_x is not None:
                return grad_x, None, None, None  # (2)
        n = _norm(x, ctx.p, ctx.dim)
        m = n.clamp_min(ctx.eps)
        if ctx.p == 2 and fused(grad_y, x) and not x.is_complex():
            grad_x = grad_y * x
            along = grad_x.sum(ctx.dim, keepdim=True) / (m * m) / m
            along = along.masked_fill_(~above(n, ctx.eps), 0)
            torch.div(grad_y, m, out=grad_x)
            return grad_x.addcmul_(x, along, value=-1), None, None, None  # (2)
        g, x = widened(grad_y), widened(x)
        along = _real(g * x.conj()).sum(ctx.dim, keepdim=True) / m / m
        along = torch.where(above(n, ctx.eps), along, 0)
        grad_x = g / m - _norm_derivative(x, n, ctx.p, ctx.dim) * along  # (2)
        return grad_x.to(grad_y.dtype), None, None, None

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, *_: None) -> Tensor:
        (x,) = ctx.saved_tensors
        n = _norm(x, ctx.p, ctx.dim)
        m = n.clamp_min(ctx.eps)
        t, x = widened(tangent_x), widened(x)
        derivative = _norm_derivative(x, n, ctx.p, ctx.dim)
        along = _real(derivative.conj() * t).sum(ctx.dim, keepdim=True) / m / m
        return (t / m - x * torch.where(above(n, ctx.eps), along, 0)).to(tangent_x.dtype)  # (3)


def _has_rows(x: Tensor, p: float, dim: Any) -> bool:
    return p == 2 and many(x) and x.is_cpu and dim in (-1, x.dim() - 1)


def _products(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return g * x, x * x


def _projected(g: Tensor, x: Tensor, m: Tensor, along: Tensor) -> Tensor:
    return g / m - x * along


def _of_rows(g: Tensor, x: Tensor, eps: float) -> Tensor | None:
    """Return (2) for the last dimension and p = 2, in two loops: the sums of rows, then what is made of them."""
    sums = in_one_loop(_products, g, x, outputs=(ROWS, ROWS))
    if sums is None:
        wide = widened(x)
        sums = (widened(g) * wide).sum(-1), wide.square().sum(-1)
    along, square = (of.unsqueeze(-1).double() for of in sums)
    n = square.sqrt_()
    m = n.clamp_min(eps)
    along /= m * m * m
    along.masked_fill_(~above(n, eps), 0)
    return in_one_loop(_projected, g, x, m.float(), along.float())


def _norm(x: Tensor, p: float, dim: int) -> Tensor:
    return torch.linalg.vector_norm(
        x, p, dim, keepdim=True, dtype=torch.float32 if is_half(x) else None
    )


def _norm_derivative(x: Tensor, n: Tensor, p: float, dim: int) -> Tensor:
    """Return (1); 0 where n or x is 0."""
    safe = torch.where(n == 0, 1, n)
    if p == 2:
        return x / safe
    if p == 0:
        return torch.zeros_like(x)
    if abs(p) == math.inf:  # math.isinf cannot be traced
        extreme = (x.abs() == n).to(n.dtype)
        return x.sgn() * (extreme / extreme.sum(dim, keepdim=True))
    size = x.abs()
    return x.sgn() * (torch.where(size == 0, 1, size) / safe) ** (p - 1)


def _real(t: Tensor) -> Tensor:
    return t.real if t.is_complex() else t


_normalize = entry(NormalizeFunction, again=NormalizeFunction.forward)


@public
def normalize(
    input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Tensor:
    r"""Divide by the norm along one dimension: :math:`y = x / \max(\|x\|_p, \epsilon)`.

    Args:
        input: Any shape, floating point or complex.
        p: Exponent of the norm.
        dim: Dimension along which the norm is taken, or a tuple of them.
        eps: What the norm is raised to where it is smaller.
        out: Tensor to write the result into, without gradient.

    Returns:
        Tensor of the shape and dtype of ``input``.

    Raises:
        RuntimeError: ``input`` is of integers.
        IndexError: ``dim`` is out of range.

    Example:
        >>> import torch
        >>> from torchbp.functional import normalize
        >>> normalize(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """
    if out is not None:
        return torch.div(input, _norm(input, p, dim).clamp_min(eps), out=out)
    if not input.is_cpu:  # there the norm is one of autocast's float32 ops
        (input,) = in_autocast_float32(input)
    y = _normalize(input, p, dim, eps)
    return y if in_range(input) else in_float64(normalize, input, p, dim, eps)


def _samples(make: Make) -> Iterator[Sample]:
    yield Sample((make.normal(3, 4),), name="3x4")
    yield Sample((make.normal(2, 3, 2),), {"dim": -1}, name="last")
    yield Sample((make.normal(2, 3, 2),), {"dim": (0, 2)}, name="two-dims")
    for p in (1.0, 1.5, 3.0, math.inf, -math.inf, 0.5, -1.0):
        yield Sample((make.normal(3, 4), p), name=f"p{p}")
    yield Sample((make.normal(3, 4), 2.0, 1, 100.0), name="eps-above")
    yield Sample((make.normal(0, 4),), name="empty")


def _errors(make: Make) -> Iterator[Sample]:
    yield Sample((make.normal(4),), name="dim")
    yield Sample((make.labels(3, 4, classes=5),), name="integers")


OP = Op(
    function=normalize,
    modules=(),
    reference=F.normalize,
    samples=_samples,
    module_samples=lambda _: (),
    errors=_errors,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=square,
)
