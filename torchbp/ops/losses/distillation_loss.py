r"""Distillation: ℓ = T² KL(q ‖ p), q = softmax(t / T) the teacher, p = softmax(x / T) the student, then reduced.

T² keeps the gradient's size independent of the temperature T.

Derivation, with D_c = log q_c - log p_c, KL = Σ_c q_c D_c, and s the gradient of each ℓ:
    grad_x_j = s · T · (p_j - q_j)                                                            (1)
    grad_t_j = s · T · q_j (D_j - KL)                                                         (2)
    tangent_ℓ = Σ gradient · tangent over both inputs, with s = 1                             (3)

Saves:
    x and t, which are inputs; autograd keeps log p and q, or more, beside them.

Edge values:
    T → ∞: half the squared distance of the centred logits, by C.   A logit of -∞ in t: q = 0, which adds nothing.

Sources:
    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import (
    Context,
    entry,
    in_float32,
    in_place,
    public,
    scale_fresh,
)
from torchbp.ops._op import Op, rounded_once
from torchbp.ops._reduction import in_common_dtype, named, reduce, spread
from torchbp.ops._samples import Make, Sample, square, stored
from torchbp.ops.losses._classes import class_dim, positions
from torchbp.ops.losses._limits import product as product_with_limit
from torchbp.ops.losses._limits import with_limits

__all__ = ["DistillationLoss", "DistillationLossFunction", "distillation_loss"]

_NAME = "distillation_loss"


class DistillationLossFunction(Function):
    """Distillation with hand-written gradients. Call it through :func:`distillation_loss`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, target: Tensor, temperature: float, reduction: str) -> Tensor:
        def values(x: Tensor, t: Tensor) -> Tensor:  # (N, C, *), (N, C, *) -> (N, *)
            q, difference = _terms(x, t, temperature)
            product = q.mul_(difference) if in_place(q, difference) else q * difference
            return product.sum(class_dim(x)) * temperature**2

        def values_with_limits(x: Tensor, t: Tensor) -> Tensor:
            q, difference = _terms(x, t, temperature)
            return product_with_limit(q, difference).sum(class_dim(x)) * temperature**2

        return with_limits(
            lambda: reduce(in_float32(values, x, target), reduction),
            lambda: reduce(in_float32(values_with_limits, x, target), reduction),
            x,
        )

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, Tensor, float, str], output: Tensor
    ) -> None:
        x, target, ctx.temperature, ctx.reduction = inputs
        ctx.save_for_backward(x, target)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, target = ctx.saved_tensors
        need_x, need_target, *_ = ctx.needs_input_grad
        s = spread(grad, ctx.reduction, positions(x)) * ctx.temperature
        s = s.unsqueeze(class_dim(x)) if ctx.reduction == "none" else s
        grad_x = grad_target = None
        if need_x:
            grad_x = in_float32(lambda x, t, s: _gradient_x(x, t, s, ctx.temperature), x, target, s)
        if need_target:
            grad_target = in_float32(
                lambda t, x, s: _gradient_target(x, t, s, ctx.temperature), target, x, s
            )
        return grad_x, grad_target, None, None

    @staticmethod
    def jvp(
        ctx: Context, tangent_x: Tensor | None, tangent_target: Tensor | None, *_: None
    ) -> Tensor:
        x, target = ctx.saved_tensors
        s, tangent = x.new_full((), ctx.temperature), torch.zeros_like(x)
        if tangent_x is not None:
            tangent = tangent + _gradient_x(x, target, s, ctx.temperature) * tangent_x
        if tangent_target is not None:
            tangent = tangent + _gradient_target(x, target, s, ctx.temperature) * tangent_target
        return reduce(tangent.sum(class_dim(x)), ctx.reduction)  # (3)


def _terms(x: Tensor, t: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return q and D; where q = 0, D is floored, so that q D is 0."""
    dim = class_dim(x)
    lowest = torch.finfo(t.dtype).min
    log_p, log_q = F.log_softmax(x / temperature, dim), F.log_softmax(t / temperature, dim)
    if in_place(log_p, log_q):
        return log_q.exp(), log_q.clamp_(min=lowest).sub_(log_p)
    log_q = log_q.clamp(min=lowest)
    return log_q.exp(), log_q - log_p


def _gradient_x(x: Tensor, t: Tensor, s: Tensor, temperature: float) -> Tensor:
    dim = class_dim(x)
    p, q = F.softmax(x / temperature, dim), F.softmax(t / temperature, dim)
    return scale_fresh(p.sub_(q) if in_place(p, q) else p - q, s)  # (1)


def _gradient_target(x: Tensor, t: Tensor, s: Tensor, temperature: float) -> Tensor:
    q, difference = _terms(x, t, temperature)
    return s * q * (difference - (q * difference).sum(class_dim(x), keepdim=True))  # (2)


_distillation_loss = entry(DistillationLossFunction)


@public
def distillation_loss(
    input: Tensor, target: Tensor, temperature: float = 1.0, reduction: str = "mean"
) -> Tensor:
    r"""Distillation: :math:`\ell = T^2 \, \mathrm{KL}(\mathrm{softmax}(t / T) \| \mathrm{softmax}(x / T))`, reduced.

    Args:
        input: The student's logits ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``, floating point.
        target: The teacher's logits, the shape of ``input``.
        temperature: T, positive.
        reduction: ``"mean"`` (over positions), ``"sum"`` or ``"none"``.

    Returns:
        The loss in nats, times T²: a scalar, or the shape of ``input`` without ``C`` for ``"none"``.

    Raises:
        NotImplementedError: Integer or complex logits.
        ValueError: ``target`` of another shape, an unknown reduction, or ``temperature`` not positive.

    Example:
        >>> import torch
        >>> from torchbp.functional import distillation_loss
        >>> distillation_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]]), temperature=2.0)
        tensor(0.4438)
    """
    reduction = named(_NAME, reduction, None, None)
    _check(input, target, temperature)
    input, target = in_common_dtype(input, target)
    return _distillation_loss(input, target, temperature, reduction)


def _check(input: Tensor, target: Tensor, temperature: float) -> None:
    if not (input.is_floating_point() and target.is_floating_point()):
        raise NotImplementedError(wrong(_NAME, "floating-point logits", input.dtype, "cast them"))
    if target.size() != input.size():
        rule = f"target of the input's shape {shape(input)}"
        raise ValueError(wrong(_NAME, rule, shape(target), "pass the teacher's logits"))
    if not temperature > 0:
        raise ValueError(wrong(_NAME, "a positive temperature", temperature, "1 softens nothing"))


class DistillationLoss(nn.Module):
    """Module form of :func:`distillation_loss`."""

    __module__ = "torchbp.nn"

    def __init__(self, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self.temperature, self.reduction = temperature, reduction

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return distillation_loss(input, target, self.temperature, self.reduction)


def _samples(make: Make) -> Iterator[Sample]:
    for reduction in ("mean", "sum", "none"):
        args = (make.normal(3, 4), make.normal(3, 4))
        yield Sample(args, {"reduction": reduction, "temperature": 2.0}, reduction)
    args = (make.normal(2, 3, 2), make.normal(2, 3, 2, requires_grad=False))
    yield Sample(args, {"reduction": "none"}, "data-target-3d")
    yield Sample((make.normal(4), make.normal(4)), name="1d")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    args = (make.normal(3, 4), make.normal(3, 4))
    yield DistillationLoss, Sample(), Sample(args)
    kwargs = {"temperature": 3.0, "reduction": "sum"}
    yield DistillationLoss, Sample((), kwargs), Sample(args, name="temperature")


def _errors(make: Make) -> Iterator[Sample]:
    x = make.normal(3, 4)
    yield Sample((x, x), {"reduction": "average"}, name="reduction")
    yield Sample((x, x[0]), name="shape")
    yield Sample((x, x), {"temperature": 0.0}, name="temperature")


def _benchmark(make: Make, n: int) -> Sample:
    (x,) = square(make, n).args
    return Sample((x, make.normal(*x.shape, requires_grad=False)), {"temperature": 2.0})


def _reference(
    input: Tensor, target: Tensor, temperature: float = 1.0, reduction: str = "mean"
) -> Tensor:
    """The definition, as it is usually written."""
    reduction = named(_NAME, reduction, None, None)
    _check(input, target, temperature)
    dim = class_dim(input)
    log_p, log_q = F.log_softmax(input / temperature, dim), F.log_softmax(target / temperature, dim)
    values = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim)
    return reduce(values * temperature**2, reduction)


OP = Op(
    function=distillation_loss,
    modules=(DistillationLoss,),
    reference=rounded_once(_reference),
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=lambda *args, **_: stored(*args),
    benchmark=_benchmark,
)
