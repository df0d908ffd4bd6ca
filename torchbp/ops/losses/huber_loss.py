r"""Huber loss: ℓ = d²/2 where |d| ≤ δ, else δ · (|d| - δ/2), with d = x - t, then reduced.

Derivation, with s the gradient of each ℓ (grad for "none" and "sum", grad / N for "mean"):
    dℓ/dd = d where |d| ≤ δ, else δ · sign(d)
          = clamp(d, -δ, δ)
    grad_x = s · clamp(x - t, -δ, δ)                                                          (1)
    grad_t = -grad_x                                                                          (2)
    tangent_ℓ = clamp(x - t, -δ, δ) · (tangent_x - tangent_t)                                 (3)
    A weight is a factor of ℓ before the reduction; that product is autograd's own.

Saves:
    x and t, which are inputs.

Edge values:
    |d| = δ: both branches agree in value and slope; the second derivative is 0, as in torch.   d = ±∞: grad = ±s · δ.
    No elements: the mean is NaN.

Sources:
    Huber, "Robust Estimation of a Location Parameter", 1964, doi:10.1214/aoms/1177703732.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _nn  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd.function import Function

from torchbp.ops._clamp import clipped
from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import (
    Context,
    directional,
    entry,
    fused,
    is_half,
    kernel,
    public,
    scale_fresh,
    undifferentiated,
)
from torchbp.ops._op import Op
from torchbp.ops._pieces import in_pieces
from torchbp.ops._reduction import (
    FEW,
    REDUCTIONS,
    WIDE,
    in_common_dtype,
    matched,
    named,
    reduce,
    reduced,
    spread,
)
from torchbp.ops._samples import Make, Sample, against_values, pairs, stored
from torchbp.ops.kernels import in_one_loop, many

__all__ = ["HuberLoss", "HuberLossFunction", "huber_loss"]

_huber_loss_backward = kernel("huber_loss_backward")
_huber_loss_backward_into = kernel("huber_loss_backward", "out")


class HuberLossFunction(Function):
    """Huber loss with hand-written gradients. Call it through :func:`huber_loss`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, target: Tensor, delta: float, reduction: str) -> Tensor:
        if not (many(x, FEW + 1) or is_half(x)):
            return _nn.huber_loss(x, target, REDUCTIONS[reduction], delta)

        def values(x: Tensor, t: Tensor) -> Tensor:  # (*), (*) -> (*)
            return _nn.huber_loss(x, t, 0, delta)

        return reduced(values, reduction, x, target)

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, Tensor, float, str], output: Tensor
    ) -> None:
        x, target, ctx.delta, ctx.reduction = inputs
        ctx.save_for_backward(x, target)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, target = ctx.saved_tensors
        need_x, need_target, _, _ = ctx.needs_input_grad
        given = grad, x, target, REDUCTIONS[ctx.reduction], ctx.delta
        wide = grad.dtype is x.dtype is target.dtype in WIDE
        if wide and undifferentiated() and x.numel() <= FEW:
            gradient = _huber_loss_backward(*given)  # (1)
            return gradient if need_x else None, -gradient if need_target else None, None, None
        s, delta = spread(grad, ctx.reduction, x.numel()), ctx.delta
        formula = lambda x, t, s: _gradient(x - t, s, delta)  # noqa: E731
        gradient = in_one_loop(formula, x, target, s)
        if gradient is None and wide and fused(grad):
            into = torch.empty_like(x)  # else the kernel fills it with zeros first
            gradient = _huber_loss_backward_into(*given, grad_input=into)
        elif gradient is None:
            gradient = in_pieces(formula, x, target, s)
        return gradient if need_x else None, -gradient if need_target else None, None, None  # (2)

    @staticmethod
    def jvp(
        ctx: Context, tangent_x: Tensor | None, tangent_target: Tensor | None, *_: None
    ) -> Tensor:
        x, target = ctx.saved_tensors
        slope = clipped(x - target, -ctx.delta, ctx.delta)
        return reduce(
            directional((tangent_x, slope), (tangent_target, -slope)), ctx.reduction
        )  # (3)


def _gradient(d: Tensor, s: Tensor, delta: float) -> Tensor:
    return scale_fresh(clipped(d, -delta, delta), s)  # (1)


_huber_loss = entry(HuberLossFunction)


@public
def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    r"""Huber loss: :math:`d^2 / 2` where :math:`|d| \le \delta`, else :math:`\delta (|d| - \delta / 2)`, reduced.

    Args:
        input: Any shape ``(*)``, floating point.
        target: The shape of ``input``; other shapes that can be broadcast are, with a warning.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        delta: The error from which on the loss is linear; positive.
        weight: The shape of ``input``: a factor for each value; ``"mean"`` does not divide by its sum, as in torch.

    Returns:
        The loss in the squared unit of ``input``: a scalar, or ``(*)`` for ``"none"``.

    Raises:
        ValueError: An unknown reduction, or ``weight`` of another shape.
        RuntimeError: ``delta`` is not positive.
        NotImplementedError: Integer or complex ``input``.

    Example:
        >>> import torch
        >>> from torchbp.functional import huber_loss
        >>> huber_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0]))
        tensor(1.2500)
    """
    reduction = named("huber_loss", reduction, None, None)
    if not delta > 0:
        rule = "a positive delta"
        raise RuntimeError(wrong("huber_loss", rule, delta, "l1_loss is its limit at 0"))
    if weight is not None and weight.size() != input.size():
        rule = f"weight of the input's shape {shape(input)}"
        raise ValueError(wrong("huber_loss", rule, shape(weight), "expand it first"))
    input, target = in_common_dtype(*matched("huber_loss", input, target))
    if input.dtype != target.dtype and input.is_floating_point() and not target.is_floating_point():
        target = target.to(input.dtype)  # the kernel of backward wants both alike
    if weight is None:
        return _huber_loss(input, target, delta, reduction)
    return reduce(_huber_loss(input, target, delta, "none") * weight, reduction)


class HuberLoss(nn.HuberLoss):
    """Module form of :func:`huber_loss`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return huber_loss(input, target, reduction=self.reduction, delta=self.delta)


def _samples(make: Make) -> Iterator[Sample]:
    yield from pairs(make.normal, make.normal, delta=0.7)
    for reduction in ("mean", "none"):
        kwargs = {"weight": make.uniform(3, 4, requires_grad=True), "reduction": reduction}
        yield Sample((make.normal(3, 4), make.normal(3, 4)), kwargs, name=f"weight-{reduction}")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    sample = Sample((make.normal(3, 4), make.normal(3, 4)))
    yield HuberLoss, Sample(), sample
    kwargs = {"reduction": "sum", "delta": 0.3}
    yield HuberLoss, Sample((), kwargs), Sample(sample.args, name="sum")


def _errors(make: Make) -> Iterator[Sample]:
    x = make.normal(3, 4)
    yield Sample((x, x), {"reduction": "average"}, name="reduction")
    yield Sample((x, x), {"weight": make.normal(4)}, name="weight")
    yield Sample((x, x), {"delta": 0.0}, name="delta")
    integers = make.labels(3, classes=5)
    yield Sample((integers, integers), name="integers")


def _saved_bytes(x: Tensor, target: Tensor, **kwargs: object) -> int:
    weight = kwargs.get("weight")
    return stored(x, target) + (stored(weight, x) if weight is not None else 0)  # w and ℓ


OP = Op(
    function=huber_loss,
    modules=(HuberLoss,),
    reference=F.huber_loss,
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=_saved_bytes,
    benchmark=against_values,
    fused="aten::huber_loss_backward",
)
