r"""Soft margin: ℓ = log(1 + exp(-t x)), t being 1 or -1, then reduced.

Derivation, with s the gradient of each ℓ (grad for "none" and "sum", grad / N for "mean"):
    ℓ = -log σ(t x)
    grad_x = -s · t · σ(-t x)                                                                 (1)
    grad_t = -s · x · σ(-t x)                                                                 (2)
    tangent_ℓ = -σ(-t x) · (t · tangent_x + x · tangent_t)                                    (3)
    Of many elements (_kept_gradient.py), with z = t x:
    ℓ = max(-z, 0) + log(1 + exp(-|z|))                                                       (4)
    grad_x = -s · g,  g = t · σ(-z)                                                           (5)
    ∂g/∂x = -t² · σ(-z) σ(z) = -g · (t - g)                                                   (6)

Saves:
    x and t, which are inputs. Of 2¹⁴ to 2²³ float32 or float64 scores, with a gradient for x alone, the mean
    and the sum keep g instead of x.

Edge values:
    t x → -∞: ℓ → -t x, where torch overflows to ∞ from 89 on in float32; grad_x → -s · t.   t x → +∞: both → 0.

Sources:
    torch.nn.SoftMarginLoss, whose values, gradients and reductions these are.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._function import (
    Context,
    as_dtype,
    directional,
    entry,
    in_autocast_float32,
    is_half,
    kernel,
    public,
)
from torchbp.ops._op import Op, rounded_once
from torchbp.ops._pieces import alike, in_pieces, length_written, pieces
from torchbp.ops._reduction import (
    broadcast,
    in_common_dtype,
    laid_out,
    named,
    reduce,
    reduced,
    spread,
)
from torchbp.ops._samples import Make, Sample, against_signs, pairs, pairs_errors, stored
from torchbp.ops.kernels import many
from torchbp.ops.losses._kept_gradient import Formula, suits_kept_gradient, with_kept_gradient
from torchbp.ops.losses._log_sums import FEW, log1p_exp_sum, reduced_softplus

__all__ = ["SoftMarginLoss", "SoftMarginLossFunction", "soft_margin_loss"]

_softplus_into = kernel("softplus", "out")
_softplus_backward_into = kernel("softplus_backward", "grad_input")


class SoftMarginLossFunction(Function):
    """Soft margin with hand-written gradients. Call it through :func:`soft_margin_loss`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, target: Tensor, reduction: str) -> Tensor:  # (*), (*) -> () or (*)
        if reduction != "none" and not is_half(x) and many(x, FEW + 1) and alike(x, target):
            return reduced_softplus(_parts, reduction, x, target)
        return reduced(_log_sigmoid, reduction, x, target, into=_log_sigmoid_into, negative=True)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
        x, target, ctx.reduction = inputs
        ctx.save_for_backward(x, target)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, target = ctx.saved_tensors
        need_x, need_target, _ = ctx.needs_input_grad
        minus_s = spread(grad, ctx.reduction, x.numel(), negative=True)
        # (2) is (1) with the roles of x and t exchanged
        grad_x = in_pieces(_gradient, x, target, minus_s, into=_gradient_into) if need_x else None
        grad_target = None
        if need_target:
            grad_target = in_pieces(_gradient, target, x, minus_s, into=_gradient_into)
        return grad_x, grad_target, None

    @staticmethod
    def jvp(
        ctx: Context, tangent_x: Tensor | None, tangent_target: Tensor | None, _: None
    ) -> Tensor:
        x, target = ctx.saved_tensors
        minus_one = x.new_full((), -1)
        along_target = (tangent_target, _gradient(target, x, minus_one))
        along_x = (tangent_x, _gradient(x, target, minus_one))
        return reduce(directional(along_x, along_target), ctx.reduction)  # (3)


def _log_sigmoid(x: Tensor, t: Tensor) -> Tensor:
    return F.softplus(t * x, -1, 40)  # in one pass and one tensor; F.logsigmoid makes two


def _log_sigmoid_into(value: Tensor, x: Tensor, t: Tensor) -> None:
    _softplus_into(torch.mul(x, t, out=value), -1, 40, out=value)


def _parts(linear: Tensor, z: Tensor, x: Tensor, t: Tensor) -> None:
    """Write max(-t x, 0), and |t x|: softplus(-t x) = max(-t x, 0) + log(1 + exp(-|t x|))."""
    torch.clamp(torch.mul(x, t, out=z), max=0, out=linear).neg_()
    z.abs_()


def _gradient(x: Tensor, t: Tensor, minus_s: Tensor) -> Tensor:
    return minus_s * t * torch.sigmoid(-t * x)  # (1)


def _gradient_into(grad_x: Tensor, x: Tensor, t: Tensor, minus_s: Tensor) -> None:
    tx = torch.mul(x, t, out=grad_x)
    # t · σ(-t x) in one pass
    _softplus_backward_into(t, tx, -1, 40, grad_input=grad_x).mul_(minus_s)


def _with_gradient(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    z = t * x
    size = z.abs()
    e = (-size).exp()
    value = torch.relu(-z) + F.softplus(-size)  # (4)
    return value, t * torch.where(z > 0, e, 1.0) / (1 + e)  # (5)


def _write_gradient(gradient: Tensor, x: Tensor, target: Tensor) -> list[Tensor]:
    """Write g, and return the parts of Σ ℓ: both while z is in the cache."""
    length = min(x.numel(), 2 * length_written(x))
    of_z, of_linear = x.new_empty(length), x.new_empty(length)
    sums = []
    for g, x_part, t_part in pieces(gradient, x, target, length=length):
        n = g.numel()
        z = torch.mul(x_part, t_part, out=of_z[:n])
        _softplus_backward_into(t_part, z, -1, 40, grad_input=g)  # (5)
        linear = torch.clamp(z, max=0, out=of_linear[:n])
        sums += [linear.sum().neg_(), log1p_exp_sum(z.abs_())]  # (4)
    return sums


def _curvature(g: Tensor, target: Tensor) -> Tensor:
    return -g * (target - g)  # (6)


_keeping_gradient = Formula(
    _with_gradient, _write_gradient, _curvature, SoftMarginLossFunction.forward, negative=True
)
_soft_margin_loss = entry(SoftMarginLossFunction)


@public
def soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Soft margin, the logistic loss: :math:`\ell = \log(1 + e^{-t x})`, reduced.

    Args:
        input: Scores, any shape ``(*)``, floating point.
        target: 1 or -1, of a shape that can be broadcast with ``(*)``.
        size_average: Deprecated in torch; see ``reduction``.
        reduce: Deprecated in torch; see ``reduction``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        The loss in nats: a scalar, or ``(*)`` for ``"none"``.

    Raises:
        ValueError: An unknown reduction.
        RuntimeError: Shapes that cannot be broadcast; integer ``input``.

    Example:
        >>> import torch
        >>> from torchbp.functional import soft_margin_loss
        >>> soft_margin_loss(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]))
        tensor(0.4100)
    """
    reduction = named("soft_margin_loss", reduction, size_average, reduce)
    if not input.is_floating_point():  # nothing that a margin could mean: torch's own
        return F.soft_margin_loss(input, target, reduction=reduction)
    input, target = in_autocast_float32(input, target)
    dtype = input.dtype  # of the result, as in torch
    input, target = broadcast(*in_common_dtype(input, target))
    if suits_kept_gradient(input, target, reduction):
        return with_kept_gradient(input, target, reduction, _keeping_gradient)
    return laid_out(as_dtype(_soft_margin_loss(input, target, reduction), dtype), target)


class SoftMarginLoss(nn.SoftMarginLoss):
    """Module form of :func:`soft_margin_loss`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return soft_margin_loss(input, target, reduction=self.reduction)


def _samples(make: Make) -> Iterator[Sample]:
    yield from pairs(make.normal, lambda *dims: make.normal(*dims, requires_grad=False).sign())
    yield Sample((make.normal(3, 4), make.normal(4, requires_grad=False)), name="broadcast")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    args = (make.normal(3, 4), make.normal(3, 4, requires_grad=False).sign())
    yield SoftMarginLoss, Sample(), Sample(args)
    yield SoftMarginLoss, Sample((), {"reduction": "sum"}), Sample(args, name="sum")


def _reference(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Torch's, composed: its own backward has no forward mode."""
    if not input.is_floating_point():
        return F.soft_margin_loss(input, target, reduction=reduction)
    named("soft_margin_loss", reduction, None, None)
    return reduce(torch.logaddexp(-target * input, input.new_zeros(())), reduction)


OP = Op(
    function=soft_margin_loss,
    modules=(SoftMarginLoss,),
    reference=rounded_once(_reference),
    samples=_samples,
    module_samples=_module_samples,
    errors=pairs_errors,
    saved_bytes=lambda x, target, **_: stored(x, target),
    benchmark=against_signs,
)
