r"""Binary focal loss of logits: ℓ = -α t q^γ log p - (1 - α) (1 - t) p^γ log q, p = σ(x), q = σ(-x), then reduced.

Without α both factors are 1; γ = 0 is then the binary cross entropy of logits.

Derivation, with s the gradient of each ℓ, and dp/dx = p q = -dq/dx:
    d(-q^γ log p)/dx = q^γ (γ p log p - q)
    d(-p^γ log q)/dx = p^γ (p - γ q log q)      by x → -x
    grad_x = s · [α t q^γ (γ p log p - q) + (1 - α) (1 - t) p^γ (p - γ q log q)]              (1)
    grad_t = s · [(1 - α) p^γ log q - α q^γ log p]                                            (2)
    tangent_ℓ = Σ gradient · tangent over both inputs, with s = 1                             (3)

Saves:
    x and t, which are inputs (8 bytes per float32 element); autograd through the definition keeps 28 and more.

Edge values:
    x → ±∞: the loss grows as |x| on the wrong side; the gradient tends to ±s α or to 0.   No elements: the mean is NaN.

Sources:
    Lin, Goyal, Girshick, He, Dollár, "Focal Loss for Dense Object Detection", 2017, arXiv:1708.02002.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import (
    Context,
    directional,
    entry,
    fused,
    in_place,
    public,
    scale_fresh,
)
from torchbp.ops._op import Op, rounded_once
from torchbp.ops._pieces import in_pieces
from torchbp.ops._reduction import (
    in_common_dtype,
    laid_out,
    named,
    reduce,
    spread,
)
from torchbp.ops._samples import Make, Sample, against_bits, pairs, stored
from torchbp.ops.losses._limits import product, reduced_with_limits

__all__ = ["SigmoidFocalLoss", "SigmoidFocalLossFunction", "sigmoid_focal_loss"]

_NAME = "sigmoid_focal_loss"


class SigmoidFocalLossFunction(Function):
    """Binary focal loss with hand-written gradients. Call it through :func:`sigmoid_focal_loss`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, target: Tensor, alpha: float | None, gamma: float, reduction: str
    ) -> Tensor:
        def values(x: Tensor, t: Tensor) -> Tensor:
            of_positive, of_negative = _terms(x, alpha, gamma)
            if in_place(x, t):
                return of_positive.mul_(t).add_(of_negative.mul_(1 - t))
            return t * of_positive + (1 - t) * of_negative

        def values_with_limits(x: Tensor, t: Tensor) -> Tensor:
            of_positive, of_negative = _terms(x, alpha, gamma)
            return product(t, of_positive) + product(1 - t, of_negative)

        return reduced_with_limits(values, values_with_limits, reduction, x, target)

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, Tensor, float | None, float, str], output: Tensor
    ) -> None:
        x, target, ctx.alpha, ctx.gamma, ctx.reduction = inputs
        ctx.save_for_backward(x, target)

    @staticmethod
    def backward(
        ctx: Context, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, target = ctx.saved_tensors
        need_x, need_target, *_ = ctx.needs_input_grad
        s, alpha, gamma = spread(grad, ctx.reduction, x.numel()), ctx.alpha, ctx.gamma
        grad_x = grad_target = None
        if need_x:
            grad_x = in_pieces(
                lambda x, t, s: scale_fresh(_slope_x(x, t, alpha, gamma), s), x, target, s
            )
        if need_target:
            grad_target = in_pieces(lambda x, s: s * _slope_target(x, alpha, gamma), x, s)
        return grad_x, grad_target, None, None, None

    @staticmethod
    def jvp(
        ctx: Context, tangent_x: Tensor | None, tangent_target: Tensor | None, *_: None
    ) -> Tensor:
        x, target = ctx.saved_tensors
        along_x = (tangent_x, _slope_x(x, target, ctx.alpha, ctx.gamma))
        along_target = (tangent_target, _slope_target(x, ctx.alpha, ctx.gamma))
        return reduce(directional(along_x, along_target), ctx.reduction)  # (3)


def _factors(alpha: float | None) -> tuple[float, float]:
    return (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)


def _terms(x: Tensor, alpha: float | None, gamma: float) -> tuple[Tensor, Tensor]:
    """Return -α q^γ log p and -(1 - α) p^γ log q."""
    positive, negative = _factors(alpha)
    q, p = torch.sigmoid(-x).pow(gamma), torch.sigmoid(x).pow(gamma)
    log_p, minus_log_q = F.softplus(x, -1, 40), F.softplus(x, 1, 40)
    if fused(x):
        return q.mul_(log_p).mul_(-positive), p.mul_(minus_log_q).mul_(negative)
    return -positive * q * log_p, negative * p * minus_log_q


def _one_sided(x: Tensor, gamma: float, weight: Tensor) -> Tensor:
    """Return q^γ (γ p log p - q), weighted; log p is floored, so that p log p is 0, not NaN, at x = -∞."""
    p, q = torch.sigmoid(x), torch.sigmoid(-x)
    log_p = F.softplus(x, -1, 40).clamp(min=torch.finfo(x.dtype).min)
    if in_place(x, weight):
        return log_p.mul_(p).mul_(gamma).sub_(q).mul_(q.pow_(gamma)).mul_(weight)
    return weight * q.pow(gamma) * (gamma * p * log_p - q)


def _slope_x(x: Tensor, t: Tensor, alpha: float | None, gamma: float) -> Tensor:  # (1)
    positive, negative = _factors(alpha)
    return _one_sided(x, gamma, positive * t) - _one_sided(-x, gamma, negative * (1 - t))


def _slope_target(x: Tensor, alpha: float | None, gamma: float) -> Tensor:  # (2)
    of_positive, of_negative = _terms(x, alpha, gamma)
    return of_positive - of_negative


_sigmoid_focal_loss = entry(SigmoidFocalLossFunction)


@public
def sigmoid_focal_loss(
    input: Tensor,
    target: Tensor,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Binary focal loss: :math:`\ell = -\alpha t q^\gamma \log p - (1-\alpha)(1-t) p^\gamma \log q`, reduced.

    Args:
        input: Logits, any shape ``(*)``, floating point; :math:`p = \sigma(x)`, :math:`q = 1 - p`.
        target: Probabilities in ``[0, 1]``, the shape of ``input``.
        alpha: The factor of positives, that of negatives being its complement; ``None`` weighs both with 1.
        gamma: The exponent, not negative, that takes weight from what is classified well.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        The loss in nats: a scalar, or ``(*)`` for ``"none"``.

    Raises:
        ValueError: ``target`` of another shape, an unknown reduction, or a negative ``gamma``.
        NotImplementedError: Integer or complex ``input``.

    Example:
        >>> import torch
        >>> from torchbp.functional import sigmoid_focal_loss
        >>> sigmoid_focal_loss(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]))
        tensor(0.0219)
    """
    reduction = named(_NAME, reduction, None, None)
    _check(input, target, gamma)
    input, target = in_common_dtype(input, target)
    return laid_out(_sigmoid_focal_loss(input, target, alpha, gamma, reduction), target)


def _check(input: Tensor, target: Tensor, gamma: float) -> None:
    if not input.is_floating_point() or target.is_complex():
        raise NotImplementedError(wrong(_NAME, "floating-point input", input.dtype, "cast it"))
    if target.size() != input.size():
        rule = f"target of the input's shape {shape(input)}"
        raise ValueError(wrong(_NAME, rule, shape(target), "reshape one of them"))
    if gamma < 0:
        raise ValueError(wrong(_NAME, "gamma ≥ 0", gamma, "0 gives the cross entropy"))


class SigmoidFocalLoss(nn.Module):
    """Module form of :func:`sigmoid_focal_loss`."""

    __module__ = "torchbp.nn"

    def __init__(
        self, alpha: float | None = 0.25, gamma: float = 2.0, reduction: str = "mean"
    ) -> None:
        super().__init__()
        self.alpha, self.gamma, self.reduction = alpha, gamma, reduction

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, gamma={self.gamma}"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return sigmoid_focal_loss(input, target, self.alpha, self.gamma, self.reduction)


def _samples(make: Make) -> Iterator[Sample]:
    yield from pairs(make.normal, lambda *dims: make.uniform(*dims).round())
    for alpha, gamma in ((None, 0.0), (0.7, 1.5)):
        args = (make.normal(3, 4), make.uniform(3, 4, requires_grad=True))
        yield Sample(args, {"alpha": alpha, "gamma": gamma}, f"soft-{alpha}-{gamma}")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    args = (make.normal(3, 4), make.uniform(3, 4).round())
    yield SigmoidFocalLoss, Sample(), Sample(args)
    kwargs = {"alpha": None, "gamma": 1.0, "reduction": "sum"}
    yield SigmoidFocalLoss, Sample((), kwargs), Sample(args, name="all-arguments")


def _errors(make: Make) -> Iterator[Sample]:
    x = make.normal(3, 4)
    yield Sample((x, x), {"reduction": "average"}, name="reduction")
    yield Sample((x, x[0]), name="shape")
    yield Sample((x, x), {"gamma": -1.0}, name="gamma")


def _reference(
    input: Tensor,
    target: Tensor,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    reduction: str = "mean",
) -> Tensor:
    """The definition, as it is usually written."""
    reduction = named(_NAME, reduction, None, None)
    _check(input, target, gamma)
    p = input.sigmoid()
    positive = -((1 - p) ** gamma) * F.logsigmoid(input)
    negative = -(p**gamma) * F.logsigmoid(-input)
    a, b = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
    return reduce(a * target * positive + b * (1 - target) * negative, reduction)


OP = Op(
    function=sigmoid_focal_loss,
    modules=(SigmoidFocalLoss,),
    reference=rounded_once(_reference),
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=lambda *args, **_: stored(*args),
    benchmark=against_bits,
)
