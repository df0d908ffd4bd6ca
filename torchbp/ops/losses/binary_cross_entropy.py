r"""Binary cross entropy of probabilities: ℓ = -w · [t · log x + (1 - t) · log(1 - x)], then reduced.

Each logarithm is taken as at least -100, so that the loss is finite, as in torch.

Derivation, with s the gradient of each ℓ (grad for "none" and "sum", grad / N for "mean"), ε = 1e-12:
    grad_x = s · w · (x - t) / (x (1 - x))      where both x and 1 - x are at least ε          (1)
           = s · w · [(1 - t) / max(1 - x, ε) - t / max(x, ε)]      elsewhere                 (1')
           = s · w · [(x - t) / max(x (1 - x), ε) + min((1 - x)/ε, 1) - min(x/ε, 1)]
             to a part in 10¹², without a choice by element                                   (1")
    (1') is (1), but would cancel near x = t; (1) is 0/0 where x = t = 0 or 1.
    grad_t = s · w · [log(1 - x) - log x]                                                     (2)
    tangent_ℓ = (1) · tangent_x + (2) · tangent_t with s = 1                                  (3)

Saves:
    x and t, which are inputs, and w.

Edge values:
    x = t = 0 or x = t = 1: grad_x = ±s · w, the limit; torch gives 0, from (x - t) / max(x (1 - x), ε).
    x = 0, t = 1: the loss is 100, grad_x = -s · w / ε.   No elements: the mean is NaN.

Sources:
    Good, "Rational Decisions", 1952, doi:10.1111/j.2517-6161.1952.tb00104.x (the logarithmic score).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _nn  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd.function import Function

from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import (
    Context,
    directional,
    entry,
    fused,
    in_autocast_float32,
    kernel,
    public,
    scale_fresh,
    visible,
)
from torchbp.ops._op import Op
from torchbp.ops._pieces import in_pieces
from torchbp.ops._reduction import FEW, REDUCTIONS, WIDE, named, reduce, reduced, spread
from torchbp.ops._samples import Make, Sample, pairs, square, stored

__all__ = ["BCELoss", "BCELossFunction", "binary_cross_entropy"]

_NAME = "binary_cross_entropy"
_EPS = 1e-12  # torch's
_LOWEST = -100.0  # torch's, of a logarithm
_backward = kernel("binary_cross_entropy_backward")


class BCELossFunction(Function):
    """Binary cross entropy with hand-written gradients. Call it through :func:`binary_cross_entropy`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, target: Tensor, weight: Tensor | None, reduction: str, inside: bool | None
    ) -> Tensor:  # (*), (*) -> () or (*)
        if inside is None:  # it looks whether values are in [0, 1], too
            return _nn.binary_cross_entropy(x, target, None, REDUCTIONS[reduction])
        if weight is None:
            return reduced(_values, reduction, x, target)
        return reduce(scale_fresh(in_pieces(_values, x, target), weight), reduction)

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, Tensor, Tensor | None, str, bool | None], output: Tensor
    ) -> None:
        x, target, weight, ctx.reduction, ctx.inside = inputs
        ctx.save_for_backward(x, target, weight)

    @staticmethod
    def backward(
        ctx: Context, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, target, weight = ctx.saved_tensors
        need_x, need_target, _, _, _ = ctx.needs_input_grad
        if ctx.inside is None and not need_target and fused(grad):
            low, high = torch.aminmax(x)
            if _inside(low.item(), high.item()):
                grad_x = _backward(grad, x, target, None, REDUCTIONS[ctx.reduction])  # (1)
                return grad_x, None, None, None, None
        s = spread(grad, ctx.reduction, x.numel())
        s = s if weight is None else s * weight
        grad_x = None
        if need_x and ctx.inside:
            grad_x = in_pieces(_gradient_inside, x, target, s)
        elif need_x:
            grad_x = in_pieces(_gradient_x, x, target, s, into=_gradient_x_into, spare=2)
        grad_target = in_pieces(_gradient_target, x, s) if need_target else None
        return grad_x, grad_target, None, None, None

    @staticmethod
    def jvp(
        ctx: Context, tangent_x: Tensor | None, tangent_target: Tensor | None, *_: None
    ) -> Tensor:
        x, target, weight = ctx.saved_tensors
        w = x.new_ones(()) if weight is None else weight
        along_x = (tangent_x, in_pieces(_gradient_x, x, target, w))
        along_target = (tangent_target, in_pieces(_gradient_target, x, w))
        return reduce(directional(along_x, along_target), ctx.reduction)  # (3)


def _logarithms(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return log x and log(1 - x), each at least -100."""
    return x.log().clamp(min=_LOWEST), torch.log1p(-x).clamp(min=_LOWEST)


def _values(x: Tensor, target: Tensor) -> Tensor:
    positive, negative = _logarithms(x)
    if not fused(x, target):
        return -(target * positive + (1 - target) * negative)
    return positive.mul_(target).add_(negative.mul_(1 - target)).neg_()


def _gradient_inside(x: Tensor, target: Tensor, s: Tensor) -> Tensor:
    """Return (1) where all of ``x`` is known to be inside: torch's kernel."""
    if fused(x, target, s) and x.dtype == target.dtype == s.dtype:
        return _backward(s.expand_as(x), x, target, None, 0)
    return _gradient_x(x, target, s)


def _gradient_x(x: Tensor, target: Tensor, s: Tensor) -> Tensor:
    to_one, to_zero = (1 - x).clamp(min=_EPS), x.clamp(min=_EPS)
    at_ends = (1 - target) / to_one - target / to_zero
    inside = (x - target) / (to_one * to_zero)
    return s * torch.where((x < _EPS) | (1 - x < _EPS), at_ends, inside)  # (1'), (1)


def _gradient_x_into(
    grad_x: Tensor, product: Tensor, ends: Tensor, x: Tensor, target: Tensor, s: Tensor
) -> None:
    # (1"): choices by element would take four times as long as all of it
    torch.sub(x, 1, out=product)
    torch.clamp(product, min=-_EPS, out=ends)
    torch.sub(target, x, out=grad_x).div_(product.mul_(x).clamp_(max=-_EPS))
    ends.add_(torch.clamp(x, max=_EPS, out=product))  # exactly 0, but for the ends
    grad_x.add_(ends, alpha=-1 / _EPS).mul_(s)


def _gradient_target(x: Tensor, s: Tensor) -> Tensor:
    positive, negative = _logarithms(x)
    return s * (negative - positive)  # (2)


_binary_cross_entropy = entry(BCELossFunction)


@public
def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Binary cross entropy of probabilities: :math:`\ell = -[t \log x + (1 - t) \log(1 - x)]`, reduced.

    Args:
        input: Probabilities in ``[0, 1]``, any shape ``(*)``, floating point.
        target: Probabilities in ``[0, 1]``, the shape and dtype of ``input``.
        weight: A factor of each element, of a shape that can be broadcast to ``(*)``.
        size_average: Deprecated in torch; see ``reduction``.
        reduce: Deprecated in torch; see ``reduction``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        The loss in nats: a scalar, or ``(*)`` for ``"none"``.

    Raises:
        ValueError: ``target`` of another shape, or an unknown reduction.
        NotImplementedError: Integer or complex ``input``.
        RuntimeError: A value outside ``[0, 1]`` (looked for on the CPU only); integer ``target``; a ``weight`` that
            requires grad or has a wrong shape.

    Example:
        >>> import torch
        >>> from torchbp.functional import binary_cross_entropy
        >>> binary_cross_entropy(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]))
        tensor(0.6931)
    """
    reduction = named(_NAME, reduction, size_average, reduce)
    if target.size() != input.size():
        rule = f"target of the input's shape {shape(input)}"
        raise ValueError(wrong(_NAME, rule, shape(target), "reshape one of them"))
    inside = _check(input, target, weight)
    if inside is not None:  # else both are wide
        input, target = in_autocast_float32(input, target)
    try:
        return _binary_cross_entropy(input, target, weight, reduction, inside)
    except RuntimeError:
        if inside is None:
            _extremes("input", input)
            _extremes("target", target)
        raise


def _check(input: Tensor, target: Tensor, weight: Tensor | None) -> bool | None:
    """Check the arguments; return whether all of ``input`` is known to be so far inside that (1) holds.

    ``None`` for few elements, where torch's kernels check, and reduce, in one call.
    """
    if not input.is_floating_point():
        raise NotImplementedError(wrong(_NAME, "floating-point input", input.dtype, "cast it"))
    if not target.is_floating_point():
        raise RuntimeError(wrong(_NAME, "floating-point target", target.dtype, "cast it"))
    if weight is not None:
        if weight.requires_grad and torch.is_grad_enabled():
            rule = "weight without requires_grad, as in torch"
            raise RuntimeError(wrong(_NAME, rule, "one that requires it", "detach it"))
        if torch.broadcast_shapes(weight.shape, input.shape) != input.shape:
            rule = f"weight that can be broadcast to {shape(input)}"
            raise RuntimeError(wrong(_NAME, rule, shape(weight), "reshape it"))
    n = input.numel()
    if not (n and visible(input)):
        return False
    if weight is None and n <= FEW and input.dtype == target.dtype in WIDE:
        return None
    _extremes("target", target)
    low, high = _extremes("input", input)
    return _inside(low, high)


def _inside(low: float, high: float) -> bool:
    """Whether (1) holds for all values between these two."""
    return low >= _EPS and 1 - high >= _EPS


def _extremes(name: str, values: Tensor) -> tuple[float, float]:
    """Return the least and the greatest value, checked."""
    least, greatest = torch.aminmax(values.detach())
    low, high = least.item(), greatest.item()
    if not (low >= 0 and high <= 1):
        rule = f"{name} values between 0 and 1"
        advice = "use binary_cross_entropy_with_logits, or clamp"
        raise RuntimeError(wrong(_NAME, rule, f"[{low}, {high}]", advice))
    return low, high


class BCELoss(nn.BCELoss):
    """Module form of :func:`binary_cross_entropy`; the weight is a buffer."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return binary_cross_entropy(input, target, weight=self.weight, reduction=self.reduction)


def _samples(make: Make) -> Iterator[Sample]:
    def inside(*dims: int) -> Tensor:
        return make.uniform(*dims, low=0.05, high=0.95, requires_grad=True)

    yield from pairs(inside, inside)
    args = (inside(3, 4), make.uniform(3, 4).round())
    yield Sample(args, {"weight": make.uniform(3, 1)}, "hard-weight")
    yield Sample(args, {"weight": make.uniform(3, 4), "reduction": "none"}, "weight-none")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    sample = Sample((make.uniform(3, 4, low=0.1, high=0.9), make.uniform(3, 4)))
    yield BCELoss, Sample(), sample
    kwargs = {"weight": make.uniform(4), "reduction": "sum"}
    yield BCELoss, Sample((), kwargs), Sample(sample.args, name="weight")


def _errors(make: Make) -> Iterator[Sample]:
    x, target = make.uniform(3, 4), make.uniform(3, 4)
    yield Sample((x, target[0]), name="shape")
    yield Sample((x + 1, target), name="input-above")
    yield Sample((x, target - 1), name="target-below")
    yield Sample((x * float("nan"), target), name="nan")
    yield Sample((x, target), {"reduction": "average"}, name="reduction")
    yield Sample((x.requires_grad_(), target), {"weight": make.uniform(5)}, name="weight")
    yield Sample((x, target), {"weight": make.uniform(4, requires_grad=True)}, name="grad")
    yield Sample((x, target.round().long()), name="integers")


def _benchmark(make: Make, n: int) -> Sample:
    dims = square(make, n).args[0].shape
    return Sample((make.uniform(*dims, requires_grad=True), make.uniform(*dims)))


def _saved_bytes(x: Tensor, target: Tensor, **kwargs: object) -> int:
    return stored(x, target, kwargs.get("weight"))


OP = Op(
    function=binary_cross_entropy,
    modules=(BCELoss,),
    reference=F.binary_cross_entropy,
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=_saved_bytes,
    benchmark=_benchmark,
    fused="aten::binary_cross_entropy_backward",
)
