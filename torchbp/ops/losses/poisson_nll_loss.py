r"""Poisson negative log likelihood of counts t: ℓ = exp(x) - t x, x being the logarithm of the rate, then reduced.

Without "log_input", x is the rate itself: ℓ = x - t log(x + ε). "full" adds Stirling's approximation of log t!,
    S(t) = t log t - t + log(2πt)/2 where t > 1, else 0.

Derivation, with s the gradient of each ℓ (grad for "none" and "sum", grad / N for "mean"):
    of the logarithm:  grad_x = s · (exp(x) - t),             grad_t = -s · x                 (1)
    of the rate:       grad_x = s · (1 - t / (x + ε)),        grad_t = -s · log(x + ε)        (2)
    full:              S'(t) = log t + 1/(2t) where t > 1, else 0, is added to ∂ℓ/∂t          (3)
    tangent_ℓ = Σ gradient · tangent over both inputs, with s = 1                             (4)

Saves:
    Of the logarithm, exp(x), as torch does, and t; x only for the gradient of t. A second derivative goes through
    exp(x), which is an output that no caller sees. Half precision, and of the rate: x and t, which are inputs.

Edge values:
    x → -∞: grad_x → -s · t.   x = +∞: both are +∞.   No elements: the mean is NaN.

Sources:
    torch.nn.PoissonNLLLoss, whose values, gradients and reductions these are.
"""

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._function import (
    Context,
    directional,
    entry,
    in_place,
    is_half,
    public,
    scale_fresh,
)
from torchbp.ops._op import Op, rounded_once
from torchbp.ops._pieces import alike, in_pieces, length_written
from torchbp.ops._reduction import (
    FEW,
    broadcast,
    in_common_dtype,
    named,
    reduce,
    reduced,
    reduced_in_one_kernel,
    reduced_in_one_loop,
    spread,
)
from torchbp.ops._samples import Make, Sample, pairs, pairs_errors, square, stored
from torchbp.ops.kernels import many
from torchbp.ops.losses._exp import exponential
from torchbp.ops.losses._limits import product, with_limits

__all__ = ["PoissonNLLLoss", "PoissonNLLLossFunction", "poisson_nll_loss"]

_NAME = "poisson_nll_loss"


class PoissonNLLLossFunction(Function):
    """Poisson likelihood with hand-written gradients. Call it through :func:`poisson_nll_loss`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, target: Tensor, log_input: bool, full: bool, eps: float, reduction: str
    ) -> tuple[Tensor, Tensor | None]:  # (*), (*) -> () or (*), rate (*)
        limits = partial(_values_with_limits, log_input=log_input, full=full, eps=eps)
        if many(x) and log_input and not is_half(x):
            formula = lambda x, t: _with_rate(x, t, full)  # noqa: E731
            made = reduced_in_one_loop(formula, reduction, x, target, beside=(None,))
            if made is not None:
                return made
        elif many(x):
            loss = reduced_in_one_kernel(limits, reduction, x, target)
            if loss is not None:
                return loss, None
        if x.is_cuda:  # nobody looks at the plain one
            rate = x.exp() if log_input and not is_half(x) else None
            return reduced(limits, reduction, x, target), rate
        loss, rate = PoissonNLLLossFunction._plain(x, target, log_input, full, eps, reduction)
        return with_limits(lambda: loss, lambda: reduced(limits, reduction, x, target), x), rate

    @staticmethod
    def _plain(
        x: Tensor, target: Tensor, log_input: bool, full: bool, eps: float, reduction: str
    ) -> tuple[Tensor, Tensor | None]:
        if not log_input or is_half(x):
            return reduced(
                lambda x, t: _values(x, t, log_input, full, eps), reduction, x, target
            ), None
        if reduction != "none" and not full and many(x, FEW + 1) and alike(x, target):
            return _by_pieces(x, target, reduction)
        rate = x.exp()
        loss = reduced(
            lambda rate, x, t: _values_of_rate(rate, x, t, full),
            reduction,
            rate,
            x,
            target,
            into=None if full else _values_of_rate_into,
        )
        return loss, rate

    @staticmethod
    def setup_context(
        ctx: Context,
        inputs: tuple[Tensor, Tensor, bool, bool, float, str],
        output: tuple[Tensor, Tensor | None],
    ) -> None:
        x, target, ctx.log_input, ctx.full, ctx.eps, ctx.reduction = inputs
        _, rate = output
        ctx.set_materialize_grads(False)
        of_target = ctx.needs_input_grad[1]
        ctx.save_for_backward(x if rate is None or of_target else None, target, rate)
        ctx.save_for_forward(x, target, rate)

    @staticmethod
    def backward(
        ctx: Context, grad: Tensor | None, grad_rate: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, target, rate = ctx.saved_tensors
        need_x, need_target, *_ = ctx.needs_input_grad
        grad_x = grad_target = None
        if grad is not None:
            s = spread(grad, ctx.reduction, target.numel())
            log_input, full, eps = ctx.log_input, ctx.full, ctx.eps
            if need_x and rate is not None:
                grad_x = in_pieces(_gradient_of_rate, rate, target, s, into=_gradient_into)  # (1)
            elif need_x:
                grad_x = in_pieces(
                    lambda x, t, s: _gradient_x(x, t, s, log_input, eps), x, target, s
                )
            if need_target:
                grad_target = in_pieces(
                    lambda t, x, s: s * _slope_target(x, t, log_input, full, eps),
                    target,
                    x,
                    s,
                )
        if grad_rate is not None and need_x:
            of_rate = grad_rate * rate
            grad_x = of_rate if grad_x is None else grad_x + of_rate
        return grad_x, grad_target, None, None, None, None

    @staticmethod
    def jvp(
        ctx: Context, tangent_x: Tensor | None, tangent_target: Tensor | None, *_: None
    ) -> tuple[Tensor, Tensor | None]:
        x, target, rate = ctx.saved_tensors
        along_x = (tangent_x, _gradient_x(x, target, x.new_ones(()), ctx.log_input, ctx.eps))
        slope = _slope_target(x, target, ctx.log_input, ctx.full, ctx.eps)
        tangent = reduce(directional(along_x, (tangent_target, slope)), ctx.reduction)  # (4)
        if rate is None:
            return tangent, None
        return tangent, torch.zeros_like(rate) if tangent_x is None else tangent_x * rate


def _values_of_rate(rate: Tensor, x: Tensor, t: Tensor, full: bool) -> Tensor:
    values = rate - t * x
    return values + _stirling(t) if full else values


def _values_of_rate_into(values: Tensor, rate: Tensor, x: Tensor, t: Tensor) -> None:
    torch.addcmul(rate, t, x, value=-1, out=values)


def _by_pieces(x: Tensor, target: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Return the reduced loss and the rate, each piece of which is used while it is in the cache."""
    rate = torch.empty_like(x)
    length = length_written(x)
    rates = iter(rate.view(-1).split(length))
    exp_into = exponential(min(length, x.numel()), x)

    def into(values: Tensor, x: Tensor, t: Tensor) -> None:
        part = exp_into(next(rates).view(x.shape), x)
        _values_of_rate_into(values, part, x, t)

    return reduced(torch.mul, reduction, x, target, into=into), rate


def _gradient_of_rate(rate: Tensor, t: Tensor, s: Tensor) -> Tensor:
    return (rate - t) * s


def _gradient_into(grad_x: Tensor, rate: Tensor, t: Tensor, s: Tensor) -> None:
    torch.sub(rate, t, out=grad_x).mul_(s)


def _stirling(t: Tensor) -> Tensor:
    stirling = t * t.log() - t + 0.5 * (2 * math.pi * t).log()
    return stirling.masked_fill(t <= 1, 0)


def _values(x: Tensor, t: Tensor, log_input: bool, full: bool, eps: float) -> Tensor:
    if log_input:
        values = x.exp() - t * x
    else:
        log = (x + eps).log()
        values = torch.sub(x, log.mul_(t), out=log) if in_place(log, x, t) else x - t * log
    return values + _stirling(t) if full else values


def _values_with_limits(x: Tensor, t: Tensor, *, log_input: bool, full: bool, eps: float) -> Tensor:
    values = x.exp() - product(t, x) if log_input else x - product(t, (x + eps).log())
    values = torch.where(x == torch.inf, x, values)  # e^x, and x, outgrow the other term
    return values + _stirling(t) if full else values


def _with_rate(x: Tensor, t: Tensor, full: bool) -> tuple[Tensor, Tensor]:
    rate = x.exp()
    values = torch.where(x == torch.inf, x, rate - product(t, x))
    return values + _stirling(t) if full else values, rate


def _gradient_x(x: Tensor, t: Tensor, s: Tensor, log_input: bool, eps: float) -> Tensor:
    if log_input:
        return scale_fresh(x.exp() - t, s)  # (1)
    return scale_fresh(1 - t / (x + eps), s)  # (2)


def _slope_target(x: Tensor, t: Tensor, log_input: bool, full: bool, eps: float) -> Tensor:
    slope = -x if log_input else -(x + eps).log()  # (1), (2)
    if not full:
        return slope
    wide = t.clamp(min=1)  # where the rest is masked, nothing may be infinite on the way
    return slope + (wide.log() + 0.5 / wide).masked_fill(t <= 1, 0)  # (3)


_poisson_nll_loss = entry(PoissonNLLLossFunction)


@public
def poisson_nll_loss(
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: float = 1e-8,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Poisson negative log likelihood: :math:`\ell = e^x - t x`, reduced.

    Args:
        input: The logarithm of the rate, any shape ``(*)``, floating point; the rate itself without ``log_input``.
        target: Counts, of a shape that can be broadcast with ``(*)``.
        log_input: Whether ``input`` is a logarithm; otherwise :math:`\ell = x - t \log(x + \epsilon)`.
        full: Whether to add Stirling's approximation of :math:`\log t!`.
        size_average: Deprecated in torch; see ``reduction``.
        eps: :math:`\epsilon`, which keeps the logarithm of a rate of 0 finite.
        reduce: Deprecated in torch; see ``reduction``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        The loss in nats: a scalar, or ``(*)`` for ``"none"``.

    Raises:
        ValueError: An unknown reduction.
        RuntimeError: Shapes that cannot be broadcast.

    Example:
        >>> import torch
        >>> from torchbp.functional import poisson_nll_loss
        >>> poisson_nll_loss(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0]))
        tensor(1.3591)
    """
    reduction = named(_NAME, reduction, size_average, reduce)
    if input.is_complex() or target.is_complex():  # nothing that a rate could mean: torch's own
        return F.poisson_nll_loss(input, target, log_input, full, eps=eps, reduction=reduction)
    if target.is_floating_point() and not input.is_floating_point():
        input = input.to(target.dtype)
    elif target.dtype == torch.bool:
        target = target.to(input.dtype)
    input, target = broadcast(*in_common_dtype(input, target))
    loss, _ = _poisson_nll_loss(input, target, log_input, full, eps, reduction)
    return loss


class PoissonNLLLoss(nn.PoissonNLLLoss):
    """Module form of :func:`poisson_nll_loss`."""

    __module__ = "torchbp.nn"

    def forward(self, log_input: Tensor, target: Tensor) -> Tensor:
        return poisson_nll_loss(
            log_input,
            target,
            log_input=self.log_input,
            full=self.full,
            eps=self.eps,
            reduction=self.reduction,
        )


def _samples(make: Make) -> Iterator[Sample]:
    def counts(*dims: int) -> Tensor:
        return make.uniform(*dims, low=0.2, high=3.0, requires_grad=True)

    yield from pairs(make.normal, counts)
    for log_input, full in ((True, True), (False, False), (False, True)):
        kwargs = {"log_input": log_input, "full": full, "reduction": "none", "eps": 1e-3}
        yield Sample((counts(3, 4), counts(3, 4)), kwargs, f"log-{log_input}-full-{full}")
    yield Sample((make.normal(3, 4), counts(4)), name="broadcast")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    args = (make.normal(3, 4), make.uniform(3, 4, low=0.5, high=4))
    yield PoissonNLLLoss, Sample(), Sample(args)
    kwargs = {"log_input": False, "full": True, "eps": 1e-3, "reduction": "sum"}
    yield PoissonNLLLoss, Sample((), kwargs), Sample((args[1], args[1]), name="rate")


def _benchmark(make: Make, n: int) -> Sample:
    (x,) = square(make, n).args
    return Sample((x, make.uniform(*x.shape, high=4.0)))


def _saved_bytes(x: Tensor, target: Tensor, log_input: bool = True, **_: object) -> int:
    both = log_input and not is_half(x) and target.requires_grad  # exp(x) and x
    return stored(x, target) + (stored(x) if both else 0)


OP = Op(
    function=poisson_nll_loss,
    modules=(PoissonNLLLoss,),
    reference=rounded_once(F.poisson_nll_loss),
    samples=_samples,
    module_samples=_module_samples,
    errors=pairs_errors,
    saved_bytes=_saved_bytes,
    benchmark=_benchmark,
)
