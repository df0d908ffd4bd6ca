r"""Gaussian negative log likelihood: ℓ = (log v + d²/v) / 2, d = x - t, v = max(var, ε), then reduced.

"full" adds log(2π)/2.

Derivation, with s the gradient of each ℓ (grad for "none" and "sum", grad / N for "mean"):
    grad_d = s · d / v                                                                        (1)
    grad_v = s · (1 - d²/v) / (2v)                                                            (2)
    tangent_ℓ = Σ gradient · tangent over both, with s = 1                                    (3)
    x - t is autograd's own. The floor ε lets the gradient of var through, as in torch: a variance below it can grow.

Saves:
    d and var (8 bytes per float32 element). torch keeps d, d² and the floored variance.

Edge values:
    var = 0: v = ε.   d = ±∞: ℓ = +∞.   No elements: the mean is NaN.

Sources:
    Bishop, "Pattern Recognition and Machine Learning", 2006, section 1.2.4 (the Gaussian's likelihood);
    Nix, Weigend, "Estimating the mean and variance of the target probability distribution", 1994,
    doi:10.1109/ICNN.1994.374138.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import (
    Context,
    directional,
    eager,
    entry,
    in_place,
    is_half,
    public,
)
from torchbp.ops._op import Op, rounded_once
from torchbp.ops._pieces import in_pieces, length_written, pieces, writable
from torchbp.ops._reduction import (
    as_composed,
    broadcast,
    in_common_dtype,
    laid_out,
    named,
    reduce,
    reduced,
    spread,
)
from torchbp.ops._samples import Make, Sample, square, stored
from torchbp.ops.kernels import in_one_loop, many

__all__ = ["GaussianNLLLoss", "GaussianNLLLossFunction", "gaussian_nll_loss"]

_NAME = "gaussian_nll_loss"
_FEW = 1 << 14  # elements; up to these the gradients are made one by one


class GaussianNLLLossFunction(Function):
    """Gaussian likelihood with hand-written gradients. Call it through :func:`gaussian_nll_loss`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(d: Tensor, var: Tensor, full: bool, eps: float, reduction: str) -> Tensor:
        constant = 0.5 * math.log(2 * math.pi) if full else 0.0
        return reduced(
            lambda d, var: _values(d, var, eps, constant),
            reduction,
            d,
            var,
            into=lambda value, v, d, var: _values_into(value, v, d, var, eps, constant),
            spare=1,
        )

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, Tensor, bool, float, str], output: Tensor
    ) -> None:
        d, var, _, ctx.eps, ctx.reduction = inputs
        ctx.save_for_backward(d, var)

    @staticmethod
    def backward(
        ctx: Context, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        d, var = ctx.saved_tensors
        need_d, need_var, *_ = ctx.needs_input_grad
        s = spread(grad, ctx.reduction, d.numel())
        eps = ctx.eps
        if need_d and need_var and many(d):
            formula = lambda d, var, s: _each_gradient(d, var, s, eps)  # noqa: E731
            made = in_one_loop(formula, d, var, s, outputs=(None, None))
            if made is not None:
                return *made, None, None, None
        shared = need_d and need_var and not is_half(d) and many(d, _FEW + 1) and not d.is_cuda
        if shared and writable(d, var, s):
            d, var, s = (t.contiguous() for t in (d, var, s))
            return *_both_gradients(d, var, s, eps), None, None, None
        grad_d = grad_var = None
        if need_d:
            grad_d = in_pieces(lambda d, var, s: _gradient_d(d, var, s, eps), d, var, s)
        if need_var:
            grad_var = in_pieces(lambda var, d, s: _gradient_var(d, var, s, eps), var, d, s)
        return grad_d, grad_var, None, None, None

    @staticmethod
    def jvp(ctx: Context, tangent_d: Tensor | None, tangent_var: Tensor | None, *_: None) -> Tensor:
        d, var = ctx.saved_tensors
        one = d.new_ones(())
        along_d = (tangent_d, _gradient_d(d, var, one, ctx.eps))
        along_var = (tangent_var, _gradient_var(d, var, one, ctx.eps))
        return reduce(directional(along_d, along_var), ctx.reduction)  # (3)


def _floored(var: Tensor, eps: float) -> Tensor:
    """Return max(var, ε) with the derivative 1 throughout, for second derivatives."""
    if torch.is_grad_enabled():
        return var + (eps - var).clamp(min=0).detach()
    return var.clamp(min=eps)


def _values(d: Tensor, var: Tensor, eps: float, constant: float) -> Tensor:
    v = var.clamp(min=eps)
    return 0.5 * (v.log() + d * (d / v)) + constant


def _values_into(
    value: Tensor, v: Tensor, d: Tensor, var: Tensor, eps: float, constant: float
) -> None:
    torch.clamp(var, min=eps, out=v)
    torch.div(d, v, out=value).mul_(d).add_(v.log_()).mul_(0.5)
    if constant:
        value.add_(constant)


def _gradient_d(d: Tensor, var: Tensor, s: Tensor, eps: float) -> Tensor:
    v = _floored(var, eps)
    return torch.div(d, v, out=v).mul_(s) if in_place(d, var, s) else s * d / v  # (1)


def _gradient_var(d: Tensor, var: Tensor, s: Tensor, eps: float) -> Tensor:
    v = _floored(var, eps)
    if not in_place(d, var, s):
        return s * (1 - d * (d / v)) / (2 * v)  # (2)
    return d.div(v).mul_(d).neg_().add_(1).div_(v).mul_(s / 2)


def _each_gradient(d: Tensor, var: Tensor, s: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _gradient_d(d, var, s, eps), _gradient_var(d, var, s, eps)


def _both_gradients(d: Tensor, var: Tensor, s: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (1) and (2), which share a quotient, piece by piece."""
    grad_d, grad_var = torch.empty_like(d), torch.empty_like(var)
    spare = d.new_empty(min(d.numel(), length_written(d)))
    flat = (t.view(-1) for t in (grad_d, grad_var, d, var))
    flat_s = s.view(-1) if s.shape == d.shape else s
    for e, q, *given in pieces(*flat, flat_s, length=length_written(d)):
        part_d, part_var, part_s = given
        v = torch.clamp(part_var, min=eps, out=spare[: e.numel()])
        torch.div(part_d, v, out=e)
        torch.mul(e, part_d, out=q).sub_(1).div_(v).mul_(-0.5 * part_s)  # (2)
        e.mul_(part_s)  # (1)
    return grad_d, grad_var


_gaussian_nll_loss = entry(GaussianNLLLossFunction)


@public
def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    r"""Gaussian negative log likelihood: :math:`\ell = (\log v + (x - t)^2 / v) / 2`, reduced.

    Args:
        input: Means, any shape ``(*)``, floating point.
        target: Samples, of a shape that can be broadcast with ``(*)``.
        var: Variances, not negative: a number, the shape of ``input``, that without the last dimension, or that with
            a last dimension of 1.
        full: Whether to add the constant :math:`\log(2 \pi) / 2`.
        eps: The floor of the variance; its gradient passes through.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        The loss in nats: a scalar, or ``(*)`` for ``"none"``.

    Raises:
        ValueError: A negative variance (not looked for under ``torch.compile`` and ``torch.func``), one of a wrong
            shape, or an unknown reduction.
        RuntimeError: Integers or complex numbers.

    Example:
        >>> import torch
        >>> from torchbp.functional import gaussian_nll_loss
        >>> gaussian_nll_loss(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0]))
        tensor(1.)
    """
    reduction = named(_NAME, reduction, None, None)
    if isinstance(var, (int, float)):
        var = torch.full((), var, dtype=input.dtype, device=input.device).expand_as(input)
    if eager() and var.numel() and var.detach().amin() < 0:
        raise ValueError(wrong(_NAME, "var ≥ 0", var.min().item(), "pass a variance"))
    if var.size() != input.size():
        if input.size()[:-1] == var.size():
            var = var.unsqueeze(-1)
        elif not (
            var.dim() == input.dim()
            and [v for x, v in zip(input.size(), var.size(), strict=True) if x != v] == [1]
        ):
            rule = f"var of a shape that fits {shape(input)}"
            raise ValueError(wrong(_NAME, rule, shape(var), "see its documentation"))
    given = input, target, var
    input, target, var = in_common_dtype(*given)
    d, spread_var = broadcast(input - target, var)
    if not (d.is_floating_point() and spread_var.is_floating_point()):
        rule = "floating-point input and var"
        raise RuntimeError(wrong(_NAME, rule, f"{d.dtype}, {spread_var.dtype}", "cast them"))
    loss = as_composed(_gaussian_nll_loss(d, spread_var, full, eps, reduction), *given)
    return laid_out(loss, spread_var)


class GaussianNLLLoss(nn.GaussianNLLLoss):
    """Module form of :func:`gaussian_nll_loss`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor, target: Tensor, var: Tensor | float) -> Tensor:
        return gaussian_nll_loss(
            input, target, var, full=self.full, eps=self.eps, reduction=self.reduction
        )


def _samples(make: Make) -> Iterator[Sample]:
    def of(*dims: int, var: tuple[int, ...] | None = None) -> tuple[Tensor, ...]:
        dims_var = dims if var is None else var
        v = make.uniform(*dims_var, low=0.2, high=2, requires_grad=True)
        return make.normal(*dims), make.normal(*dims), v

    for reduction in ("mean", "sum", "none"):
        yield Sample(of(3, 4), {"reduction": reduction}, reduction)
    yield Sample(of(3, 4), {"full": True, "eps": 0.1}, "full")
    yield Sample(of(3, 4, var=(3, 1)), name="one-variance-a-row")
    yield Sample(of(3, 4, var=(3,)), name="variances-of-rows")
    yield Sample(of(), name="scalar")
    yield Sample(of(0, 3), {"reduction": "sum"}, name="empty")
    x, t, v = of(3, 4)
    yield Sample((x, t.detach(), v.detach()), name="data")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    args = (make.normal(3, 4), make.normal(3, 4), make.uniform(3, 4, low=0.1))
    yield GaussianNLLLoss, Sample(), Sample(args)
    kwargs = {"full": True, "eps": 0.5, "reduction": "sum"}
    yield GaussianNLLLoss, Sample((), kwargs), Sample(args, name="full")


def _errors(make: Make) -> Iterator[Sample]:
    x, var = make.normal(3, 4), make.uniform(3, 4)
    yield Sample((x, x, var), {"reduction": "average"}, name="reduction")
    yield Sample((x, x, -var), name="negative")
    yield Sample((x, x, -1.0), name="negative-number")
    yield Sample((x, x, var[:, :2]), name="shape")


def _benchmark(make: Make, n: int) -> Sample:
    (x,) = square(make, n).args
    target = make.normal(*x.shape, requires_grad=False)
    return Sample((x, target, make.uniform(*x.shape, low=0.1, requires_grad=True)))


def _reference(input: Tensor, target: Tensor, var: Tensor | float, **kwargs: Any) -> Tensor:
    """Torch's; in half precision with the difference rounded, as torch rounds it, and then once more at the end."""
    if not is_half(input):
        return F.gaussian_nll_loss(input, target, var, **kwargs)
    d = input - target
    return rounded_once(F.gaussian_nll_loss)(d, torch.zeros_like(d), var, **kwargs)


OP = Op(
    function=gaussian_nll_loss,
    modules=(GaussianNLLLoss,),
    reference=_reference,
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=lambda *args, **_: stored(args[0], args[2]),
    benchmark=_benchmark,
)
