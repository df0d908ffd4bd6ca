r"""Kullback-Leibler divergence: ℓ = t · (log t - x), x being log probabilities and t probabilities, then reduced.

With "log_target", t is given as its logarithm u: ℓ = exp(u) · (u - x). Where t = 0, t log t is 0.

Derivation, with s the gradient of each ℓ (grad for "none" and "sum", grad / N for "mean"):
    grad_x = -s · t                                                                           (1)
    grad_t = s · (log t + 1 - x)                                                              (2)
    grad_u = s · exp(u) · (u - x + 1)                                                         (3)
    tangent_ℓ = Σ gradient · tangent over both inputs, with s = 1                             (4)
    "batchmean" is the sum divided by the first dimension: s is grad / its size.

Saves:
    The target. x only where the target's gradient is asked for: with log_target torch keeps both.

Edge values:
    t = 0: ℓ = 0 and grad_x = 0 for finite x; grad_t = -∞, the limit, where torch gives NaN.

Sources:
    Kullback, Leibler, "On Information and Sufficiency", 1951, doi:10.1214/aoms/1177729694.
"""

import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._errors import wrong
from torchbp.ops._function import Context, directional, entry, public
from torchbp.ops._numbers import number
from torchbp.ops._op import Op, rounded_once
from torchbp.ops._pieces import in_pieces
from torchbp.ops._reduction import (
    broadcast,
    in_common_dtype,
    named,
    reduce,
    spread,
)
from torchbp.ops._samples import Make, Sample, pairs, square, stored
from torchbp.ops.losses._limits import product, reduced_with_limits

__all__ = ["KLDivLoss", "KLDivLossFunction", "kl_div"]


class KLDivLossFunction(Function):
    """Kullback-Leibler divergence with hand-written gradients. Call it through :func:`kl_div`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, target: Tensor, log_target: bool, reduction: str, by_rows: bool
    ) -> Tensor:  # by_rows: whether the sum is divided by their number, which is "batchmean"
        if log_target:
            plain, limits, into = _of_logarithms, _of_logarithms_with_limits, _of_logarithms_into
        else:
            plain, limits = _of_probabilities, _of_probabilities_with_limits
            into = _of_probabilities_into
        spare = 1 if log_target else 0
        # the target first, whose layout the values have in torch
        loss = reduced_with_limits(plain, limits, reduction, target, x, into=into, spare=spare)
        return loss / number(x.shape[0], loss) if by_rows else loss

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, Tensor, bool, str, bool], output: Tensor
    ) -> None:
        x, target, ctx.log_target, ctx.reduction, ctx.by_rows = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, target)
        ctx.save_for_forward(x, target)

    @staticmethod
    def backward(
        ctx: Context, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, target = ctx.saved_tensors
        need_x, need_target, *_ = ctx.needs_input_grad
        how, count, log_target = ctx.reduction, target.numel(), ctx.log_target
        if ctx.by_rows:
            how, count = "mean", target.shape[0]
        grad_x = grad_target = None
        if need_x:
            minus_s = spread(grad, how, count, negative=True)
            grad_x = in_pieces(_times_exp if log_target else torch.mul, target, minus_s)  # (1)
        if need_target:
            gradient = _gradient_log_target if log_target else _gradient_target
            grad_target = in_pieces(gradient, target, x, spread(grad, how, count))
        return grad_x, grad_target, None, None, None

    @staticmethod
    def jvp(
        ctx: Context, tangent_x: Tensor | None, tangent_target: Tensor | None, *_: None
    ) -> Tensor:
        x, target = ctx.saved_tensors
        gradient = _gradient_log_target if ctx.log_target else _gradient_target
        along_target = (tangent_target, gradient(target, x, target.new_ones(())))
        along_x = (tangent_x, -_slope(target, ctx.log_target))
        tangent = reduce(directional(along_x, along_target), ctx.reduction)  # (4)
        return tangent / x.shape[0] if ctx.by_rows else tangent


def _of_probabilities(t: Tensor, x: Tensor) -> Tensor:
    # log 0 = -∞ becomes the lowest finite number, and t times it 0, in under half of xlogy's time.
    return t * (t.log().clamp(min=torch.finfo(t.dtype).min) - x)


def _of_probabilities_into(value: Tensor, t: Tensor, x: Tensor) -> None:
    torch.log(t, out=value).clamp_min_(torch.finfo(value.dtype).min).sub_(x).mul_(t)


def _of_logarithms(u: Tensor, x: Tensor) -> Tensor:
    return u.exp() * (u - x)


def _of_logarithms_into(value: Tensor, difference: Tensor, u: Tensor, x: Tensor) -> None:
    torch.exp(u, out=value).mul_(torch.sub(u, x, out=difference))


def _of_probabilities_with_limits(t: Tensor, x: Tensor) -> Tensor:
    return product(t, t.log().clamp(min=torch.finfo(t.dtype).min) - x)


def _of_logarithms_with_limits(u: Tensor, x: Tensor) -> Tensor:
    return product(u.exp(), u.clamp(min=torch.finfo(u.dtype).min) - x)


def _slope(target: Tensor, log_target: bool) -> Tensor:
    return target.exp() if log_target else target


def _times_exp(u: Tensor, s: Tensor) -> Tensor:
    return u.exp() * s


def _gradient_target(t: Tensor, x: Tensor, s: Tensor) -> Tensor:
    return s * (t.log() + 1 - x)  # (2)


def _gradient_log_target(u: Tensor, x: Tensor, s: Tensor) -> Tensor:
    u = u.clamp(min=torch.finfo(u.dtype).min)  # at -∞ the product is 0
    return s * u.exp() * (u - x + 1)  # (3)


_kl_div = entry(KLDivLossFunction)


@public
def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    r"""Kullback-Leibler divergence of the target from the input: :math:`\ell = t (\log t - x)`, reduced.

    Args:
        input: Log probabilities, any shape ``(*)``, floating point.
        target: Probabilities, or their logarithms with ``log_target``; of a shape that can be broadcast with ``(*)``.
        size_average: Deprecated in torch; see ``reduction``.
        reduce: Deprecated in torch; see ``reduction``.
        reduction: ``"batchmean"`` (the divergence by its definition, averaged over the first dimension), ``"mean"``
            (over all elements, with torch's warning), ``"sum"`` or ``"none"``.
        log_target: Whether ``target`` holds logarithms.

    Returns:
        The divergence in nats: a scalar, or ``(*)`` for ``"none"``.

    Raises:
        ValueError: An unknown reduction.
        RuntimeError: Shapes that cannot be broadcast; integers.

    Example:
        >>> import torch
        >>> from torchbp.functional import kl_div
        >>> kl_div(torch.tensor([[-1.0, -0.5]]), torch.tensor([[0.5, 0.5]]), reduction="batchmean")
        tensor(0.0569)
    """
    if reduction == "mean" and size_average is None and reduce is None:
        rule = "reduction 'batchmean', which is the divergence by its definition"
        advice = "'mean' divides by all elements; torch announces that it will change"
        warnings.warn(wrong("kl_div", rule, "'mean'", advice), UserWarning, stacklevel=3)
    batchmean = reduction == "batchmean"
    reduction = named("kl_div", "sum" if batchmean else reduction, size_average, reduce)
    for name, values in (("input", input), ("target", target)):
        if not values.is_floating_point():
            rule = f"floating-point {name}"
            raise RuntimeError(wrong("kl_div", rule, values.dtype, "cast it"))
    given = input.size()
    input, target = in_common_dtype(input, target)
    input, target = broadcast(input, target)
    by_rows = batchmean and len(given) > 0
    if by_rows and input.size() != given:  # torch divides by the rows of what it was given
        return _kl_div(input, target, log_target, reduction, False) / given[0]
    return _kl_div(input, target, log_target, reduction, by_rows)


class KLDivLoss(nn.KLDivLoss):
    """Module form of :func:`kl_div`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


def _samples(make: Make) -> Iterator[Sample]:
    def probabilities(*dims: int) -> Tensor:
        return make.uniform(*dims, low=0.05, requires_grad=True)

    for target, log_target in ((probabilities, False), (make.normal, True)):
        for sample in pairs(make.normal, target, log_target=log_target):
            if sample.kwargs.get("reduction", "mean") == "mean":  # it warns: a test of its own
                sample.kwargs["reduction"] = "batchmean"
            yield Sample(sample.args, sample.kwargs, f"{sample.name}-{log_target}")
    sample = Sample((make.normal(3, 4), probabilities(4)), {"reduction": "batchmean"}, "broadcast")
    yield sample


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    args = (make.normal(3, 4), make.probabilities(3, 4, dim=1))
    yield KLDivLoss, Sample((), {"reduction": "batchmean"}), Sample(args, name="batchmean")
    kwargs = {"reduction": "sum", "log_target": True}
    yield KLDivLoss, Sample((), kwargs), Sample(args, name="log-target")


def _errors(make: Make) -> Iterator[Sample]:
    x = make.normal(3, 4)
    yield Sample((x, x), {"reduction": "average"}, name="reduction")
    yield Sample((x, make.uniform(5)), {"reduction": "sum"}, name="shape")


def _benchmark(make: Make, n: int) -> Sample:
    (x,) = square(make, n).args
    return Sample((x, make.probabilities(*x.shape, dim=1)), {"reduction": "batchmean"})


def _saved_bytes(x: Tensor, target: Tensor, **kwargs: object) -> int:
    return stored(target, x if target.requires_grad else None)


OP = Op(
    function=kl_div,
    modules=(KLDivLoss,),
    reference=rounded_once(F.kl_div),
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=_saved_bytes,
    benchmark=_benchmark,
)
