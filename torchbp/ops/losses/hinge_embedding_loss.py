r"""Hinge embedding: ℓ = x where t = 1, max(0, m - x) where t = -1, x being a distance, then reduced.

Any other t counts as both: ℓ = [t ≠ -1] x + [t ≠ 1] max(0, m - x), as in torch.

Derivation, with s the gradient of each ℓ (grad for "none" and "sum", grad / N for "mean"):
    c = ∂ℓ/∂x = [t ≠ -1] - [t ≠ 1] [x < m], one of -1, 0, 1                                   (1)
    grad_x = s · c                                                                            (2)
    tangent_ℓ = c · tangent_x                                                                 (3)

Saves:
    c in int8 (1 byte an element); torch keeps two masks, and x for its third. It is constant between the kinks, so
    that nothing is lost for second derivatives.

Edge values:
    x = m, t = -1: the slope is torch's, -1 until torch 2.13, then 0 (_clamp.py).   x = ±∞: the limits.   No elements:
    the mean is NaN.

Sources:
    Hadsell, Chopra, LeCun, "Dimensionality Reduction by Learning an Invariant Mapping", 2006,
    doi:10.1109/CVPR.2006.100 (its square).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._clamp import below
from torchbp.ops._function import (
    Context,
    entry,
    in_autocast_float32,
    in_place,
    kernel,
    public,
)
from torchbp.ops._numbers import number
from torchbp.ops._op import Op
from torchbp.ops._pieces import is_few
from torchbp.ops._reduction import (
    broadcast,
    named,
    reduce,
    reduced_in_one_loop,
    scaled_signs,
    spread,
)
from torchbp.ops._samples import Make, Sample, against_signs, pairs, pairs_errors
from torchbp.ops.kernels import many

__all__ = ["HingeEmbeddingLoss", "HingeEmbeddingLossFunction", "hinge_embedding_loss"]

_threshold_backward = kernel("threshold_backward")


class HingeEmbeddingLossFunction(Function):
    """Hinge embedding with a hand-written gradient. Call it through :func:`hinge_embedding_loss`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, target: Tensor, margin: float, reduction: str
    ) -> tuple[Tensor, Tensor]:  # (*), (*) -> () or (*), (*) int8
        if many(x):
            formula = lambda x, t: _value_and_slope(x, t, margin)  # noqa: E731
            made = reduced_in_one_loop(formula, reduction, x, target, beside=(torch.int8,))
            if made is not None:
                return made
        m = number(margin, x)
        near, other = target != number(-1, x), target != number(1, x)
        slope = torch.add(near.to(torch.int8), other & below(x, m), alpha=-1)  # (1)
        if x.is_floating_point() and in_place(x, target) and not is_few(x):
            return reduce(_values_of_many(x, target, margin), reduction), slope
        zero = number(0, x)
        values = torch.where(near, x, zero) + torch.where(other, torch.relu(m - x), zero)
        return reduce(values, reduction), slope

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, Tensor, float, str], output: tuple[Tensor, Tensor]
    ) -> None:
        *_, ctx.reduction = inputs
        _, slope = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(slope)
        ctx.save_for_backward(slope)

    @staticmethod
    def backward(
        ctx: Context, grad: Tensor | None, _: None
    ) -> tuple[Tensor | None, None, None, None]:
        if grad is None:
            return None, None, None, None
        (slope,) = ctx.saved_tensors
        s = spread(grad, ctx.reduction, slope.numel())
        return scaled_signs(slope, s, grad.dtype), None, None, None  # (2)

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, *_: None) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return reduce(slope * tangent_x, ctx.reduction), None  # (3)


def _value_and_slope(x: Tensor, t: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    near, other = t != -1, t != 1
    value = torch.where(near, x, 0.0) + torch.where(other, torch.relu(margin - x), 0.0)
    lower = torch.where(other & below(x, margin), 1.0, 0.0)
    return value, torch.where(near, 1.0, 0.0) - lower  # (1)


def _values_of_many(x: Tensor, target: Tensor, margin: float) -> Tensor:
    # threshold_backward(v, u, 0) is v where u > 0, else 0: in float32 a sixth of masked_fill's time.
    near = _threshold_backward(x, (target + 1).abs_(), 0)
    far = _threshold_backward((margin - x).relu_(), (target - 1).abs_(), 0)
    return near.add_(far)


_hinge_embedding_loss = entry(HingeEmbeddingLossFunction)


@public
def hinge_embedding_loss(
    input: Tensor,
    target: Tensor,
    margin: float = 1.0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Hinge embedding: :math:`\ell = x` where :math:`t = 1`, :math:`\max(0, m - x)` where :math:`t = -1`, reduced.

    Args:
        input: Distances, any shape ``(*)``, floating point; or integers, for which m is cut to one.
        target: 1 or -1, of a shape that can be broadcast with ``(*)``.
        margin: The distance m from which on the loss of unlike pairs is 0.
        size_average: Deprecated in torch; see ``reduction``.
        reduce: Deprecated in torch; see ``reduction``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        The loss in the unit of ``input``: a scalar, or ``(*)`` for ``"none"``.

    Raises:
        ValueError: An unknown reduction.
        RuntimeError: Shapes that cannot be broadcast.

    Example:
        >>> import torch
        >>> from torchbp.functional import hinge_embedding_loss
        >>> hinge_embedding_loss(torch.tensor([0.5, 0.2]), torch.tensor([1.0, -1.0]))
        tensor(0.6500)
    """
    reduction = named("hinge_embedding_loss", reduction, size_average, reduce)
    input, target = broadcast(*in_autocast_float32(input, target))
    if not (input.is_floating_point() or input.is_complex()):
        margin = int(margin)  # as torch takes it from integers
    return _hinge_embedding_loss(input, target, margin, reduction)[0]


class HingeEmbeddingLoss(nn.HingeEmbeddingLoss):
    """Module form of :func:`hinge_embedding_loss`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return hinge_embedding_loss(input, target, margin=self.margin, reduction=self.reduction)


def _samples(make: Make) -> Iterator[Sample]:
    def signs(*dims: int) -> Tensor:
        return make.normal(*dims, requires_grad=False).sign()

    yield from pairs(make.normal, signs)
    args = (make.normal(3, 4), signs(4) * make.labels(4, classes=2))
    yield Sample(args, {"margin": 0.4, "reduction": "none"}, "margin-other-targets")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    args = (make.normal(3, 4), make.normal(3, 4, requires_grad=False).sign())
    yield HingeEmbeddingLoss, Sample(), Sample(args)
    kwargs = {"margin": 0.3, "reduction": "sum"}
    yield HingeEmbeddingLoss, Sample((), kwargs), Sample(args, name="margin")


OP = Op(
    function=hinge_embedding_loss,
    modules=(HingeEmbeddingLoss,),
    reference=F.hinge_embedding_loss,
    samples=_samples,
    module_samples=_module_samples,
    errors=pairs_errors,
    saved_bytes=lambda *args, **_: args[0].numel(),
    benchmark=against_signs,
)
