r"""Absolute error: ℓ = |d|, d = x - t, then the mean, the sum, or nothing ("reduction").

Derivation, with s the gradient of each ℓ (grad for "none" and "sum", grad / N for "mean"):
    grad_x = s · sign(d),   grad_t = -grad_x                                                  (1)
    tangent_ℓ = sign(d) · (tangent_x - tangent_t)                                             (2)
    The products with a weight are autograd's own.

Saves:
    sign(d) in int8 (1 byte an element), where torch keeps d (4 bytes per float32 element). It is constant between the
    kinks, so that nothing is lost for second derivatives. A weighted loss keeps |d| and w besides.

Edge values:
    d = 0 or NaN: the subgradient 0, as in torch.   d = ±∞: grad = ±s.   No elements: the mean is NaN.

Sources:
    torch.nn.L1Loss, whose values, gradients and reductions these are.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import (
    Context,
    as_dtype,
    directional,
    entry,
    fused,
    in_autocast_float32,
    public,
)
from torchbp.ops._op import Op
from torchbp.ops._pieces import alike, in_pieces, length_written
from torchbp.ops._reduction import (
    FEW,
    matched,
    named,
    reduce,
    reduced,
    reduced_in_one_loop,
    scaled_signs,
    spread,
)
from torchbp.ops._samples import Make, Sample, against_values, pairs, stored
from torchbp.ops.kernels import many

__all__ = ["L1Loss", "L1LossFunction", "l1_loss"]


class L1LossFunction(Function):
    """Absolute error, reduced, with hand-written gradients. Call it through :func:`l1_loss`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # (*), (*) -> () or (*), (*) int8
        x: Tensor, target: Tensor, reduction: str
    ) -> tuple[Tensor, Tensor]:
        if x.is_cuda and x.dtype == target.dtype:  # a kernel each
            sign = in_pieces(_sign, x, target).to(torch.int8)
            return reduced(_values, reduction, x, target), sign
        if many(x) and x.dtype == target.dtype:
            made = reduced_in_one_loop(_values_and_sign, reduction, x, target, beside=(torch.int8,))
            if made is not None:
                return made
        if reduction != "none" and many(x, FEW + 1) and alike(x, target):
            return _by_pieces(x, target, reduction)
        d = x - target
        sign = d.sign().to(torch.int8)
        return reduce(d.abs_() if fused(d) else d.abs(), reduction), sign

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, Tensor, str], output: tuple[Tensor, Tensor]
    ) -> None:
        x, target, ctx.reduction = inputs
        _, sign = output
        ctx.dtypes = x.dtype, target.dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(sign)
        ctx.save_for_backward(sign)

    @staticmethod
    def backward(
        ctx: Context, grad: Tensor | None, _sign: None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        if grad is None:
            return None, None, None
        (sign,) = ctx.saved_tensors
        need_x, need_target, *_ = ctx.needs_input_grad
        s = spread(grad, ctx.reduction, sign.numel())
        of_x, of_target = ctx.dtypes
        if sign.is_cuda and of_x == of_target:
            gradient = in_pieces(_times, sign.to(of_x), s)
            return gradient if need_x else None, -gradient if need_target else None, None
        gradient = scaled_signs(sign, s, of_x if of_x == of_target else s.dtype)  # (1)
        grad_x = as_dtype(gradient, of_x) if need_x else None
        grad_target = as_dtype(-gradient, of_target) if need_target else None
        return grad_x, grad_target, None

    @staticmethod
    def jvp(
        ctx: Context, tangent_x: Tensor | None, tangent_target: Tensor | None, _: None
    ) -> tuple[Tensor, None]:
        (sign,) = ctx.saved_tensors
        tangent = directional((tangent_x, sign), (tangent_target, -sign))
        return reduce(tangent, ctx.reduction), None  # (2)


def _values(x: Tensor, t: Tensor) -> Tensor:
    return (x - t).abs()


def _sign(x: Tensor, t: Tensor) -> Tensor:
    return (x - t).sign()


def _values_and_sign(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    d = x - t
    return d.abs(), d.sign()


def _times(sign: Tensor, s: Tensor) -> Tensor:
    return sign * s  # (1)


def _by_pieces(x: Tensor, target: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Return the reduced loss and the signs, without a difference of the whole length."""
    sign = torch.empty_like(x, dtype=torch.int8)
    signs = iter(sign.view(-1).split(length_written(x)))

    def into(d: Tensor, of_d: Tensor, x: Tensor, t: Tensor) -> None:
        torch.sub(x, t, out=d)
        next(signs).view(d.shape).copy_(torch.sign(d, out=of_d))
        d.abs_()

    return reduced(torch.sub, reduction, x, target, into=into, spare=1), sign


_l1_loss = entry(L1LossFunction)


@public
def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Absolute error: :math:`\ell = |x - t|`, reduced.

    Args:
        input: Any shape ``(*)``, floating point or complex.
        target: The shape of ``input``; other shapes that can be broadcast are, with a warning.
        size_average: Deprecated in torch; see ``reduction``.
        reduce: Deprecated in torch; see ``reduction``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: The shape of ``input``: a factor for each error; ``"mean"`` then divides by its sum.

    Returns:
        The loss in the unit of ``input``: a scalar, or ``(*)`` for ``"none"``.

    Raises:
        ValueError: An unknown reduction, or ``weight`` of another shape.
        RuntimeError: The mean of integers.

    Example:
        >>> import torch
        >>> from torchbp.functional import l1_loss
        >>> l1_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0]))
        tensor(1.5000)
    """
    reduction = named("l1_loss", reduction, size_average, reduce)
    if weight is not None and weight.size() != input.size():
        rule = f"weight of the input's shape {shape(input)}"
        raise ValueError(wrong("l1_loss", rule, shape(weight), "expand it first"))
    if input.is_complex() or target.is_complex():  # the sign of a complex number is no integer
        own: Any = F.l1_loss
        return own(input, target, reduction=reduction, weight=weight)
    input, target = matched("l1_loss", input, target)
    if weight is None:
        input, target = in_autocast_float32(input, target)
        return _l1_loss(input, target, reduction)[0]
    weighted = _l1_loss(input, target, "none")[0] * weight
    if reduction == "none":
        return weighted
    return weighted.sum() / weight.sum() if reduction == "mean" else weighted.sum()


class L1Loss(nn.L1Loss):
    """Module form of :func:`l1_loss`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return l1_loss(input, target, reduction=self.reduction)


def _samples(make: Make) -> Iterator[Sample]:
    yield from pairs(make.normal, make.normal)
    for reduction in ("mean", "sum", "none"):
        kwargs = {"weight": make.uniform(3, 4, requires_grad=True), "reduction": reduction}
        yield Sample((make.normal(3, 4), make.normal(3, 4)), kwargs, name=f"weight-{reduction}")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    for reduction in ("mean", "none"):
        sample = Sample((make.normal(3, 4), make.normal(3, 4)), name=reduction)
        yield L1Loss, Sample((), {"reduction": reduction}), sample


def _errors(make: Make) -> Iterator[Sample]:
    x = make.normal(3, 4)
    yield Sample((x, x), {"reduction": "average"}, name="reduction")
    yield Sample((x, x), {"weight": make.normal(4)}, name="weight")
    integers = make.labels(3, classes=5)
    yield Sample((integers, integers), name="integers")


def _saved_bytes(x: Tensor, target: Tensor, **kwargs: object) -> int:
    weight = kwargs.get("weight")
    if weight is None:
        return x.numel()
    quotient = 2 if kwargs["reduction"] == "mean" else 0  # Σ w · ℓ and Σ w
    return x.numel() + stored(x, weight) + quotient * x.element_size()  # sign, |d|, w


OP = Op(
    function=l1_loss,
    modules=(L1Loss,),
    reference=F.l1_loss,
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=_saved_bytes,
    benchmark=against_values,
)
