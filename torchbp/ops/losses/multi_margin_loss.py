r"""Multi-class margin: ℓ = w_y / C Σ_{i ≠ y} max(0, m - x_y + x_i)^p, y being the class, p 1 or 2, then reduced.

Derivation, with s the gradient of each ℓ (grad for "none" and "sum", grad / N for "mean"), z_i = m - x_y + x_i:
    g_i = s w_y / C · p · z_i^(p-1) where z_i > 0 and i ≠ y, else 0
    grad_x_i = g_i for i ≠ y                                                                  (1)
    grad_x_y = -Σ_{i ≠ y} g_i                                                                 (2)
    tangent_ℓ = Σ_i gradient_i · tangent_i, with s = 1                                        (3)

Saves:
    x, y and w, which are inputs.

Edge values:
    z = 0: slope 0, as in torch.   No rows: the mean is NaN.

Sources:
    Weston, Watkins, "Support Vector Machines for Multi-Class Pattern Recognition", ESANN 1999, pages 219-224
    (the margin of the class over each other one).
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _nn  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd.function import Function

from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import (
    Context,
    entry,
    fused,
    in_autocast_float32,
    in_float32,
    kernel,
    public,
    visible,
)
from torchbp.ops._one_kernel import in_one_kernel
from torchbp.ops._op import Op, rounded_once
from torchbp.ops._reduction import REDUCTIONS, named, reduce, spread
from torchbp.ops._samples import Make, Sample, against_classes, stored
from torchbp.ops.kernels import many

__all__ = ["MultiMarginLoss", "MultiMarginLossFunction", "multi_margin_loss"]

_NAME = "multi_margin_loss"
_FEW = (
    1 << 10
)  # elements; up to these torch's kernel, slow by the element, is faster than ten calls
_backward = kernel("multi_margin_loss_backward")


class MultiMarginLossFunction(Function):
    """Multi-class margin with a hand-written gradient. Call it through :func:`multi_margin_loss`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, target: Tensor, w: Tensor | None, p: int, margin: float, reduction: str
    ) -> Tensor:  # (N, C), (N,), (C,) -> () or (N,)
        if _suits_kernel(x, w, x):  # it looks at the indices, too
            return _nn.multi_margin_loss(x, target, p, margin, w, REDUCTIONS[reduction])
        return reduce(in_float32(lambda x: _values(x, target, w, p, margin), x), reduction)

    @staticmethod
    def setup_context(
        ctx: Context,
        inputs: tuple[Tensor, Tensor, Tensor | None, int, float, str],
        output: Tensor,
    ) -> None:
        x, target, w, ctx.p, ctx.margin, ctx.reduction = inputs
        ctx.save_for_backward(x, target, w)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        x, target, w = ctx.saved_tensors
        if _suits_kernel(x, w, grad):
            how = REDUCTIONS[ctx.reduction]
            grad_x = _backward(grad, x, target, ctx.p, ctx.margin, w, how)  # (1), (2)
            return grad_x, None, None, None, None, None
        s = spread(grad, ctx.reduction, x.shape[0])
        grad_x = in_float32(lambda x, s: _gradient(x, s, target, w, ctx.p, ctx.margin), x, s)
        return grad_x, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, *_: None) -> Tensor:
        x, target, w = ctx.saved_tensors
        gradient = _gradient(x, x.new_ones(()), target, w, ctx.p, ctx.margin)
        return reduce((gradient * tangent_x).sum(1), ctx.reduction)  # (3)


def _suits_kernel(x: Tensor, w: Tensor | None, grad: Tensor) -> bool:
    return fused(grad, x) and x.numel() <= _FEW and (w is None or w.dtype == x.dtype)


def _excess(x: Tensor, target: Tensor, margin: float) -> Tensor:
    """Return max(0, z), 0 for the class itself."""
    z = x + (margin - x.gather(1, target[:, None]))
    if fused(x):
        return z.clamp_min_(0).scatter_(1, target[:, None], 0)
    return z.clamp(min=0).scatter(1, target[:, None], 0)


def _per_class(s: Tensor, x: Tensor, target: Tensor, w: Tensor | None) -> Tensor:
    """Return s · w_t / C, divided, so that without weights it is rounded once."""
    return (s if w is None else s * w[target].to(x.dtype)) / max(1, x.shape[1])


def _values(x: Tensor, target: Tensor, w: Tensor | None, p: int, margin: float) -> Tensor:
    z = _at_once(_power, x, target, p, margin)
    if z is None:
        z = _excess(x, target, margin)
        z = z if p == 1 else z.square()
    return _per_class(z.sum(1), x, target, w)


def _at_once(
    formula: Callable[..., Tensor], x: Tensor, target: Tensor, p: int, margin: float
) -> Tensor | None:
    """Return ``formula`` of x_i and m - x_y, 0 for the class itself, in one kernel of a GPU; ``None`` elsewhere."""
    if not x.is_cuda:
        return None
    own = target[:, None]
    made = in_one_kernel(partial(formula, p=p), x, margin - x.gather(1, own))
    return None if made is None else made.scatter_(1, own, 0)


def _power(x: Tensor, rest: Tensor, *, p: int) -> Tensor:
    z = (x + rest).clamp(min=0)
    return z if p == 1 else z.square()


def _slope(x: Tensor, rest: Tensor, *, p: int) -> Tensor:
    z = (x + rest).clamp(min=0)
    return z.sign() if p == 1 else 2 * z


def _gradient(
    x: Tensor, s: Tensor, target: Tensor, w: Tensor | None, p: int, margin: float
) -> Tensor:
    slopes, in_place = _at_once(_slope, x, target, p, margin), fused(x, s)
    z = _excess(x, target, margin) if slopes is None else slopes
    if slopes is None and in_place:
        slopes = z.sign_() if p == 1 else z.mul_(2)
    elif slopes is None:
        slopes = z.sign() if p == 1 else 2 * z
    factor = _per_class(s, x, target, w).expand_as(target)[:, None]
    if in_place:
        own = slopes.sum(1, keepdim=True).mul_(factor).neg_()  # for p = 1 the sum is exact
        return slopes.mul_(factor).scatter_(1, target[:, None], own)  # (1), (2)
    own = -slopes.sum(1, keepdim=True) * factor
    return (slopes * factor).scatter(1, target[:, None], own)


_multi_margin_loss = entry(MultiMarginLossFunction)


@public
def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Multi-class margin: :math:`\ell = w_y / C \sum_{i \neq y} \max(0, m - x_y + x_i)^p`, reduced.

    Args:
        input: Scores ``(N, C)`` or ``(C,)``, floating point.
        target: Class indices ``(N,)`` or ``()``, int64.
        p: The exponent, 1 or 2.
        margin: The lead m of the class from which on the loss is 0.
        weight: A factor of each class, ``(C,)``.
        size_average: Deprecated in torch; see ``reduction``.
        reduce: Deprecated in torch; see ``reduction``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        The loss: a scalar, or the shape of ``target`` for ``"none"``.

    Raises:
        ValueError: An unknown reduction, another ``p``, a ``weight`` that is not one-dimensional.
        RuntimeError: Shapes that do not fit; a ``weight`` that requires grad; a class index outside ``[0, C)`` (looked
            for on the CPU only).

    Example:
        >>> import torch
        >>> from torchbp.functional import multi_margin_loss
        >>> multi_margin_loss(torch.tensor([[0.5, 0.25, 0.75]]), torch.tensor([0]))
        tensor(0.6667)
    """
    reduction = named(_NAME, reduction, size_average, reduce)
    if p not in (1, 2):
        raise ValueError(wrong(_NAME, "p to be 1 or 2", p, "pass one of them"))
    _check(input, target, weight)
    (input,) = in_autocast_float32(input)
    rows = input if input.dim() == 2 else torch.atleast_2d(input)
    index = target if target.dim() == 1 else target.reshape(-1)
    try:
        loss = _multi_margin_loss(rows, index, weight, p, margin, reduction)
    except RuntimeError:  # torch's kernel for few elements has looked at the indices
        _check_indices(index, rows.shape[1])
        raise
    return loss.squeeze(0) if target.dim() == 0 and loss.dim() else loss


def _check(input: Tensor, target: Tensor, weight: Tensor | None) -> None:
    if not input.is_floating_point():
        raise NotImplementedError(wrong(_NAME, "floating-point input", input.dtype, "cast it"))
    if input.dim() > 2:
        raise RuntimeError(wrong(_NAME, "input (N, C) or (C,)", shape(input), "reshape it"))
    rows, classes = (1,) * (2 - input.dim()) + tuple(input.shape)
    if weight is not None and weight.dim() != 1:
        raise ValueError(wrong(_NAME, f"weight ({classes},)", shape(weight), "flatten it"))
    if target.numel() != rows or target.dim() > 1 or target.dtype != torch.int64:
        rule, got = f"{rows} int64 class indices", f"{target.dtype} {shape(target)}"
        raise RuntimeError(wrong(_NAME, rule, got, "one for each row of scores"))
    if weight is not None:
        if weight.numel() != classes:
            raise RuntimeError(wrong(_NAME, f"weight ({classes},)", shape(weight), "one a class"))
        if weight.requires_grad and torch.is_grad_enabled():
            rule = "a weight without requires_grad, as in torch"
            raise RuntimeError(wrong(_NAME, rule, "one that requires it", "detach it"))
    if many(input, _FEW + 1):
        _check_indices(target, classes)


def _check_indices(target: Tensor, classes: int) -> None:
    if visible(target) and target.numel():
        least, greatest = torch.aminmax(target)
        if least.item() < 0 or greatest.item() >= classes:
            rule = f"class indices in [0, {classes})"
            raise RuntimeError(wrong(_NAME, rule, target.tolist(), "correct them"))


class MultiMarginLoss(nn.MultiMarginLoss):
    """Module form of :func:`multi_margin_loss`; the weight is a buffer."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return multi_margin_loss(
            input,
            target,
            p=self.p,
            margin=self.margin,
            weight=self.weight,
            reduction=self.reduction,
        )


def _samples(make: Make) -> Iterator[Sample]:
    for reduction in ("mean", "sum", "none"):
        args = (make.normal(5, 4), make.labels(5, classes=4))
        yield Sample(args, {"reduction": reduction}, reduction)
    kwargs = {"p": 2, "margin": 0.7, "weight": make.uniform(4), "reduction": "none"}
    yield Sample((make.normal(5, 4), make.labels(5, classes=4)), kwargs, "squared-weight")
    yield Sample((make.normal(13), make.labels(classes=13)), {"reduction": "none"}, "1d")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    args = (make.normal(5, 4), make.labels(5, classes=4))
    yield MultiMarginLoss, Sample(), Sample(args)
    kwargs = {"p": 2, "margin": 0.3, "weight": make.uniform(4), "reduction": "sum"}
    yield MultiMarginLoss, Sample((), kwargs), Sample(args, name="all-arguments")


def _errors(make: Make) -> Iterator[Sample]:
    x, target = make.normal(5, 4), make.labels(5, classes=4)
    yield Sample((x, target), {"reduction": "average"}, name="reduction")
    yield Sample((x, target), {"p": 3}, name="p")
    yield Sample((x, target + 4), name="index")
    yield Sample((x, target[:3]), name="batch")
    yield Sample((x[None], target), name="dimensions")
    yield Sample((x, target), {"weight": make.uniform(3)}, name="weight")
    yield Sample((x, target), {"weight": make.uniform(4, 1)}, name="weight-dimensions")
    yield Sample((x, target), {"weight": make.uniform(4, requires_grad=True)}, name="weight-grad")


OP = Op(
    function=multi_margin_loss,
    modules=(MultiMarginLoss,),
    reference=rounded_once(F.multi_margin_loss),
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=lambda *args, **kwargs: stored(*args, kwargs.get("weight")),
    benchmark=against_classes,
)
