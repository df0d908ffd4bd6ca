r"""Log-cosh: ℓ = log cosh d, d = x - t: d²/2 near 0 and |d| - log 2 far away, smooth throughout; then reduced.

Derivation, with s the gradient of each ℓ (grad for "none" and "sum", grad / N for "mean"):
    cosh d = e^|d| · (1 + e^(-2|d|)) / 2
    ℓ = |d| + log(1 + e^(-2|d|)) - log 2       which does not overflow                        (1)
    grad_d = s · tanh d                                                                       (2)
    tangent_ℓ = tanh d · tangent_d                                                            (3)
    x - t is autograd's own: grad_x = grad_d, grad_t = -grad_d.

Saves:
    d (4 bytes per float32 element); autograd through (1) would keep twice that and more.

Edge values:
    d → ±∞: ℓ → |d| - log 2, grad → ±s.   |d| small: (1) loses digits, absolutely at most one rounding of log 2; the
    gradient does not.   No elements: the mean is NaN.

Sources:
    Green, "Bayesian reconstructions from emission tomography data using a modified EM algorithm", 1990,
    doi:10.1109/42.52985 (log cosh as a potential).
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._errors import wrong
from torchbp.ops._function import Context, entry, fused, public, scale_fresh
from torchbp.ops._op import Op, rounded_once
from torchbp.ops._pieces import in_pieces
from torchbp.ops._reduction import in_common_dtype, matched, named, reduce, reduced, spread
from torchbp.ops._samples import Make, Sample, against_values, pairs, stored
from torchbp.ops.activations._tanh import tanh

__all__ = ["LogCoshLoss", "LogCoshLossFunction", "log_cosh_loss"]


class LogCoshLossFunction(Function):
    """Log-cosh with a hand-written derivative. Call it through :func:`log_cosh_loss`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(d: Tensor, reduction: str) -> Tensor:  # (*) -> () or (*)
        return reduced(_values, reduction, d)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, str], output: Tensor) -> None:
        d, ctx.reduction = inputs
        ctx.save_for_backward(d)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None]:
        (d,) = ctx.saved_tensors
        s = spread(grad, ctx.reduction, d.numel())
        return in_pieces(lambda d, s: scale_fresh(tanh(d), s), d, s), None  # (2)

    @staticmethod
    def jvp(ctx: Context, tangent_d: Tensor, _: None) -> Tensor:
        (d,) = ctx.saved_tensors
        return reduce(d.tanh() * tangent_d, ctx.reduction)  # (3)


def _values(d: Tensor) -> Tensor:  # (1)
    size = d.abs()
    if not fused(d):
        return size + F.softplus(-2 * size) - math.log(2)
    return size.mul(-2).exp_().log1p_().add_(size).sub_(math.log(2))


_log_cosh_loss = entry(LogCoshLossFunction)


@public
def log_cosh_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    r"""Log-cosh: :math:`\ell = \log \cosh(x - t)`, reduced.

    Args:
        input: Any shape ``(*)``, floating point.
        target: The shape of ``input``; other shapes that can be broadcast are, with a warning.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        The loss: a scalar, or ``(*)`` for ``"none"``.

    Raises:
        ValueError: An unknown reduction.
        NotImplementedError: Integers or complex numbers.
        RuntimeError: Shapes that cannot be broadcast.

    Example:
        >>> import torch
        >>> from torchbp.functional import log_cosh_loss
        >>> log_cosh_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        tensor(0.6625)
    """
    reduction = named("log_cosh_loss", reduction, None, None)
    _check(input, target)
    input, target = in_common_dtype(*matched("log_cosh_loss", input, target))
    return _log_cosh_loss(input - target, reduction)


def _check(*tensors: Tensor) -> None:
    for t in tensors:
        if not t.is_floating_point():
            rule = "floating-point tensors"
            raise NotImplementedError(wrong("log_cosh_loss", rule, t.dtype, "cast it"))


class LogCoshLoss(nn.Module):
    """Module form of :func:`log_cosh_loss`."""

    __module__ = "torchbp.nn"

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return log_cosh_loss(input, target, reduction=self.reduction)


def _samples(make: Make) -> Iterator[Sample]:
    yield from pairs(make.normal, make.normal)


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield LogCoshLoss, Sample(), Sample((make.normal(3, 4), make.normal(3, 4)))


def _errors(make: Make) -> Iterator[Sample]:
    yield Sample((make.normal(3), make.normal(3)), {"reduction": "average"}, name="reduction")


def _reference(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    _check(input, target)
    d = input - target
    return reduce(
        torch.logaddexp(d, -d) - math.log(2), named("log_cosh_loss", reduction, None, None)
    )


OP = Op(
    function=log_cosh_loss,
    modules=(LogCoshLoss,),
    reference=rounded_once(_reference),
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=lambda *args, **_: stored(args[0]),
    benchmark=against_values,
)
