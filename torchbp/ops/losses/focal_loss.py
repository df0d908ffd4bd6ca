r"""Focal loss of logits: ℓ = -α_t (1 - p_t)^γ log p_t, p = softmax(x), t the class, then reduced.

α are class weights. ℓ = 0 where t is ignored; "mean" divides by the sum of α_t over the positions that are not, so that
γ = 0 is the cross entropy.

Derivation, with L = log p_t, u = 1 - p_t and s the gradient of each ℓ:
    -dℓ/dL = α_t [u^γ - γ p_t u^(γ-1) L]
           = α_t u^γ (1 - γ p_t L / u) = k, where L / u → -1 for u → 0                        (1)
    ∂L/∂x_j = [j = t] - p_j
    grad_x_j = s k p_j, but -s k u for j = t                                                  (2)
    tangent_ℓ = Σ_j gradient_j · tangent_j, with s = 1                                        (3)

Saves:
    x, the target and α, which are inputs (4 bytes per float32 element).

Edge values:
    All ignored, or N = 0: the mean is NaN, the gradient 0.   A logit of -∞: p = 0, grad 0.

Sources:
    Lin, Goyal, Girshick, He, Dollár, "Focal Loss for Dense Object Detection", 2017, arXiv:1708.02002.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._errors import wrong
from torchbp.ops._function import (
    Context,
    entry,
    fused,
    in_autocast_float32,
    public,
)
from torchbp.ops._op import Op, rounded_once
from torchbp.ops._reduction import named, reduce, spread
from torchbp.ops._samples import Make, Sample, against_classes, stored
from torchbp.ops.losses._classes import all_count, class_dim, counted
from torchbp.ops.losses._focal_gradient import (
    gradient,
    gradient_in_a_loop,
    gradient_in_place,
    loss_in_a_loop,
    of_values,
)

__all__ = ["FocalLoss", "FocalLossFunction", "focal_loss"]

_NAME = "focal_loss"
_NO_OTHERS = (None,) * 6


class FocalLossFunction(Function):
    """Focal loss with a hand-written gradient. Call it through :func:`focal_loss`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        target: Tensor,
        alpha: Tensor | None,
        gamma: float,
        ignored: int,
        simple: bool,
        reduction: str,
    ) -> Tensor:  # (N, C, *), (N, *) int64, (C,) -> () or (N, *)
        loss = loss_in_a_loop(x, target, alpha, gamma, ignored, reduction)
        if loss is not None:
            return loss
        dim = class_dim(x)
        if simple and fused(x):
            log_p = torch.log_softmax(x, dim).gather(dim, target.unsqueeze(dim)).squeeze(dim)
            return reduce(torch.expm1(log_p).neg_().pow_(gamma).mul_(log_p).neg_(), reduction)
        index, w, total = counted(x, target, alpha, ignored)
        log_p = torch.log_softmax(x, dim, dtype=w.dtype).gather(dim, index.unsqueeze(dim))
        log_p = log_p.squeeze(dim)
        values = -w * torch.expm1(log_p).neg().pow(gamma) * log_p
        values = values.masked_fill(w == 0, 0)  # ignored: 0 even where p_t is 0
        values = values if reduction == "none" else spread(values.sum(), reduction, total)
        return values.to(x.dtype)

    @staticmethod
    def setup_context(
        ctx: Context,
        inputs: tuple[Tensor, Tensor, Tensor | None, float, int, bool, str],
        output: Tensor,
    ) -> None:
        x, target, alpha, ctx.gamma, ctx.ignored, ctx.simple, ctx.reduction = inputs
        ctx.save_for_backward(x, target, alpha)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, target, alpha = ctx.saved_tensors
        grad_x = gradient_in_a_loop(x, grad, target, alpha, ctx)
        if grad_x is not None:
            return grad_x, *_NO_OTHERS
        if ctx.simple and fused(grad, x) and ctx.gamma >= 1:
            s = spread(grad, ctx.reduction, max(1, target.numel()))
            return gradient_in_place(x, s, target, ctx.gamma), *_NO_OTHERS
        s, index = of_values(x, grad, target, alpha, ctx)
        return gradient(x, s, index, ctx.gamma).to(x.dtype), *_NO_OTHERS

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, *_: None) -> Tensor:
        x, target, alpha = ctx.saved_tensors
        index, w, total = counted(x, target, alpha, ctx.ignored)
        values = (gradient(x, w, index, ctx.gamma) * tangent_x).sum(class_dim(x))  # (3)
        values = values if ctx.reduction == "none" else spread(values.sum(), ctx.reduction, total)
        return values.to(x.dtype)


_focal_loss = entry(FocalLossFunction)


@public
def focal_loss(
    input: Tensor,
    target: Tensor,
    alpha: Tensor | None = None,
    gamma: float = 2.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Focal loss of logits against class indices: :math:`\ell = -\alpha_t (1 - p_t)^\gamma \log p_t`, reduced.

    Args:
        input: Logits ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``, floating point.
        target: Class indices of the shape of ``input`` without ``C``, int64.
        alpha: A factor of each class, ``(C,)``.
        gamma: The exponent, not negative, that takes weight from what is classified well.
        ignore_index: The class index whose positions count for nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``; the mean is weighted with ``alpha``.

    Returns:
        The loss in nats: a scalar, or the shape of ``input`` without ``C`` for ``"none"``.

    Raises:
        NotImplementedError: Integer or complex ``input``.
        ValueError: Shapes that do not fit, an unknown reduction, or a negative ``gamma``.
        RuntimeError: A class index outside ``[0, C)``.

    Example:
        >>> import torch
        >>> from torchbp.functional import focal_loss
        >>> focal_loss(torch.tensor([[0.0, 2.0], [0.0, 0.0]]), torch.tensor([1, 0]))
        tensor(0.0875)
    """
    reduction = named(_NAME, reduction, None, None)
    _check(input, target, gamma)
    (input,) = in_autocast_float32(input)
    # neither weights nor ignored positions
    simple = alpha is None and target.dtype == torch.int64 and all_count(target, ignore_index)
    return _focal_loss(input, target, alpha, gamma, ignore_index, simple, reduction)


def _check(input: Tensor, target: Tensor, gamma: float) -> None:
    if not input.is_floating_point():
        raise NotImplementedError(wrong(_NAME, "floating-point input", input.dtype, "cast it"))
    dim = class_dim(input)
    positions = (*input.shape[:dim], *input.shape[dim + 1 :])
    if tuple(target.shape) != positions or target.is_floating_point():
        got = f"{target.dtype} {tuple(target.shape)}"
        raise ValueError(wrong(_NAME, f"class indices {positions}", got, "reshape the target"))
    if gamma < 0:
        raise ValueError(wrong(_NAME, "gamma ≥ 0", gamma, "0 gives the cross entropy"))


class FocalLoss(nn.Module):
    """Module form of :func:`focal_loss`; ``alpha`` is a buffer."""

    __module__ = "torchbp.nn"
    alpha: Tensor | None

    def __init__(
        self,
        alpha: Tensor | None = None,
        gamma: float = 2.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.register_buffer("alpha", alpha)
        self.gamma, self.ignore_index, self.reduction = gamma, ignore_index, reduction

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, ignore_index={self.ignore_index}"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return focal_loss(input, target, self.alpha, self.gamma, self.ignore_index, self.reduction)


def _samples(make: Make) -> Iterator[Sample]:
    for reduction in ("mean", "sum", "none"):
        args = (make.normal(5, 4), make.labels(5, classes=4))
        yield Sample(args, {"reduction": reduction}, reduction)
    args = (make.normal(2, 4, 3), make.labels(2, 3, classes=4))
    kwargs = {"alpha": make.uniform(4, low=0.2), "gamma": 0.5, "ignore_index": 1}
    yield Sample(args, kwargs, "alpha-ignored")
    yield Sample((make.normal(4), make.labels(classes=4)), {"gamma": 0.0}, "1d")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    args = (make.normal(5, 4), make.labels(5, classes=4))
    yield FocalLoss, Sample(), Sample(args)
    kwargs = {"alpha": make.uniform(4), "gamma": 1.0, "ignore_index": 2, "reduction": "sum"}
    yield FocalLoss, Sample((), kwargs), Sample(args, name="all-arguments")


def _errors(make: Make) -> Iterator[Sample]:
    x, target = make.normal(5, 4), make.labels(5, classes=4)
    yield Sample((x, target), {"reduction": "average"}, name="reduction")
    yield Sample((x, target[:3]), name="batch")
    yield Sample((x, target), {"gamma": -1.0}, name="gamma")
    yield Sample((x, target + 4), name="index")


def _reference(
    input: Tensor,
    target: Tensor,
    alpha: Tensor | None = None,
    gamma: float = 2.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The definition, as it is usually written."""
    reduction = named(_NAME, reduction, None, None)
    _check(input, target, gamma)
    dim, ignore = class_dim(input), target == ignore_index
    index = target.masked_fill(ignore, 0)
    log_p = F.log_softmax(input, dim).gather(dim, index.unsqueeze(dim)).squeeze(dim)
    weight = (torch.ones_like(log_p) if alpha is None else alpha[index]).masked_fill(ignore, 0)
    values = -weight * (1 - log_p.exp()) ** gamma * log_p
    if reduction == "none":
        return values
    return values.sum() / weight.sum() if reduction == "mean" else values.sum()


OP = Op(
    function=focal_loss,
    modules=(FocalLoss,),
    reference=rounded_once(_reference),
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=lambda *args, **kwargs: stored(*args, kwargs.get("alpha")),
    benchmark=against_classes,
)
