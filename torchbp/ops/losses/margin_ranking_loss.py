r"""Margin ranking: ℓ = max(0, m - t (x₁ - x₂)), t = 1 where x₁ shall be the larger, -1 where x₂, then reduced.

Derivation, with s the gradient of each ℓ (grad for "none" and "sum", grad / N for "mean"), a = [m - t (x₁ - x₂) > 0]:
    grad_x₁ = -s · a · t                                                                      (1)
    grad_x₂ = -grad_x₁                                                                        (2)
    grad_t  = -s · a · (x₁ - x₂)                                                              (3)
    tangent_ℓ = Σ gradient · tangent over the inputs, with s = 1                              (4)

Saves:
    a, a bool (1 byte an element), and t; x₁ and x₂ only where the target's gradient is asked for. a is constant between
    the kinks, so that nothing is lost for second derivatives.

Edge values:
    m - t (x₁ - x₂) = 0: a is torch's, 1 until torch 2.13, then 0 (_clamp.py).   x₁ = x₂ = ±∞: NaN.   No elements:
    the mean is NaN.

Sources:
    torch.nn.MarginRankingLoss, whose values, gradients and reductions these are.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._clamp import above
from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import (
    Context,
    as_dtype,
    directional,
    entry,
    in_place,
    public,
)
from torchbp.ops._numbers import constant, number
from torchbp.ops._op import Op, rounded_once
from torchbp.ops._pieces import in_pieces, is_few
from torchbp.ops._reduction import (
    broadcast,
    in_common_dtype,
    laid_out,
    named,
    reduce,
    reduced_in_one_loop,
    spread,
)
from torchbp.ops._samples import Make, Sample, square, stored
from torchbp.ops.kernels import in_one_loop, many

__all__ = ["MarginRankingLoss", "MarginRankingLossFunction", "margin_ranking_loss"]

_NAME = "margin_ranking_loss"


class MarginRankingLossFunction(Function):
    """Margin ranking with hand-written gradients. Call it through :func:`margin_ranking_loss`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x1: Tensor, x2: Tensor, target: Tensor, margin: float, reduction: str
    ) -> tuple[Tensor, Tensor]:  # (*), (*), (*) -> () or (*), (*) bool
        if many(x1):
            formula = lambda a, b, t: _value_and_active(a, b, t, margin)  # noqa: E731
            made = reduced_in_one_loop(formula, reduction, x1, x2, target, beside=(torch.bool,))
            if made is not None:
                return made
        left = in_pieces(lambda a, b, t: _left(a, b, t, margin), x1, x2, target)
        active = above(left, number(0.0, left))
        return reduce(left.relu_() if in_place(left) else left.relu(), reduction), active

    @staticmethod
    def setup_context(
        ctx: Context,
        inputs: tuple[Tensor, Tensor, Tensor, float, str],
        output: tuple[Tensor, Tensor],
    ) -> None:
        x1, x2, target, _, ctx.reduction = inputs
        _, active = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(active)
        kept = (x1, x2) if ctx.needs_input_grad[2] else (None, None)
        ctx.save_for_backward(active, target, *kept)
        ctx.save_for_forward(active, target, x1, x2)

    @staticmethod
    def backward(ctx: Context, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        active, target, x1, x2 = ctx.saved_tensors
        need_1, need_2, need_target, *_others = ctx.needs_input_grad
        s = spread(grad, ctx.reduction, active.numel())
        grad_1 = grad_target = None
        if need_1 and need_2 and not need_target and target.dtype == grad.dtype:
            made = in_one_loop(_both_gradients, target, active, s, outputs=(None, None))
            if made is not None:
                return *made, None, None, None
        if need_1 or need_2:
            grad_1 = as_dtype(_gradient(active, target, s), grad.dtype)
        if need_target:
            grad_target = -s * active * (x1 - x2)  # (3)
        grad_2 = -grad_1 if need_2 and grad_1 is not None else None  # (2)
        return grad_1 if need_1 else None, grad_2, grad_target, None, None

    @staticmethod
    def jvp(
        ctx: Context,
        tangent_1: Tensor | None,
        tangent_2: Tensor | None,
        tangent_target: Tensor | None,
        *_: None,
    ) -> tuple[Tensor, None]:
        active, target, x1, x2 = ctx.saved_tensors
        slope = active * target
        along = ((tangent_1, -slope), (tangent_2, slope), (tangent_target, active * (x2 - x1)))
        return reduce(directional(*along), ctx.reduction), None  # (4)


def _left(x1: Tensor, x2: Tensor, target: Tensor, margin: float) -> Tensor:
    d = x1 - x2
    if not (in_place(d, target) and d.is_floating_point()):
        return margin - target * d if d.is_floating_point() else -target * d + margin  # bytes wrap
    if is_few(d) and d.is_cpu:
        return torch.addcmul(constant(margin, d.dtype), target, d, value=-1)
    return d.mul_(target).neg_().add_(margin)


def _value_and_active(
    x1: Tensor, x2: Tensor, target: Tensor, margin: float
) -> tuple[Tensor, Tensor]:
    left = margin - target * (x1 - x2)
    return torch.relu(left), above(left, 0.0)


def _both_gradients(target: Tensor, active: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    slope = target * active * s
    return -slope, slope  # (1), (2)


def _gradient(active: Tensor, target: Tensor, s: Tensor) -> Tensor:
    if not in_place(target, s):
        return -s * (active * target)  # (1)
    return active.to(s.dtype).mul_(target).mul_(-s)


_margin_ranking_loss = entry(MarginRankingLossFunction)


@public
def margin_ranking_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Margin ranking: :math:`\ell = \max(0, m - t (x_1 - x_2))`, reduced.

    Args:
        input1: Scores :math:`x_1`, any shape ``(*)``, floating point.
        input2: Scores :math:`x_2`, of a shape that can be broadcast with ``(*)``, with as many dimensions.
        target: 1 where :math:`x_1` shall be the larger, -1 where :math:`x_2`; the same of its shape.
        margin: The lead m from which on the loss is 0.
        size_average: Deprecated in torch; see ``reduction``.
        reduce: Deprecated in torch; see ``reduction``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        The loss in the unit of the scores: a scalar, or ``(*)`` for ``"none"``.

    Raises:
        ValueError: An unknown reduction.
        RuntimeError: Numbers of dimensions that differ, or shapes that cannot be broadcast.

    Example:
        >>> import torch
        >>> from torchbp.functional import margin_ranking_loss
        >>> one, two = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0])
        >>> margin_ranking_loss(one, two, torch.tensor([1.0, 1.0]), margin=0.5)
        tensor(0.7500)
    """
    reduction = named(_NAME, reduction, size_average, reduce)
    if not input1.dim() == input2.dim() == target.dim():
        got = f"{shape(input1)}, {shape(input2)} and {shape(target)}"
        raise RuntimeError(wrong(_NAME, "as many dimensions in all three", got, "unsqueeze first"))
    tensors = broadcast(*in_common_dtype(input1, input2, target))
    return laid_out(_margin_ranking_loss(*tensors, margin, reduction)[0], tensors[2])


class MarginRankingLoss(nn.MarginRankingLoss):
    """Module form of :func:`margin_ranking_loss`."""

    __module__ = "torchbp.nn"

    def forward(self, input1: Tensor, input2: Tensor, target: Tensor) -> Tensor:
        return margin_ranking_loss(
            input1, input2, target, margin=self.margin, reduction=self.reduction
        )


def _triple(make: Make, *dims: int, target: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    sign = make.normal(*dims, requires_grad=False).sign()
    return make.normal(*dims), make.normal(*dims), sign.requires_grad_(target)


def _samples(make: Make) -> Iterator[Sample]:
    for reduction in ("mean", "sum", "none"):
        yield Sample(_triple(make, 3, 4), {"reduction": reduction, "margin": 0.3}, reduction)
    yield Sample(_triple(make, 3, 4, target=True), {"margin": 0.2}, "target")
    x1, _, t = _triple(make, 3, 4)
    yield Sample((x1, make.normal(3, 1), t[:1].clone()), {"margin": 0.3}, name="broadcast")
    yield Sample(_triple(make), {"margin": 0.3}, name="scalar")
    yield Sample(_triple(make, 0, 3), {"reduction": "sum"}, name="empty")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    args = _triple(make, 3, 4)
    yield MarginRankingLoss, Sample(), Sample(args)
    kwargs = {"margin": 0.3, "reduction": "sum"}
    yield MarginRankingLoss, Sample((), kwargs), Sample(args, name="margin")


def _errors(make: Make) -> Iterator[Sample]:
    x1, x2, t = _triple(make, 3, 4)
    yield Sample((x1, x2, t), {"reduction": "average"}, name="reduction")
    yield Sample((x1, x2, t[0]), name="dimensions")
    yield Sample((x1, x2, t[:, :3]), name="shape")


def _benchmark(make: Make, n: int) -> Sample:
    return Sample(_triple(make, *square(make, n).args[0].shape), {"margin": 0.3})


def _saved_bytes(x1: Tensor, x2: Tensor, target: Tensor, **_: object) -> int:
    active = torch.broadcast_shapes(x1.shape, x2.shape).numel()
    return active + stored(target, *((x1, x2) if target.requires_grad else ()))


OP = Op(
    function=margin_ranking_loss,
    modules=(MarginRankingLoss,),
    reference=rounded_once(F.margin_ranking_loss),
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=_saved_bytes,
    benchmark=_benchmark,
)
