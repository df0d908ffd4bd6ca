r"""Absolute error: ℓ = |d|, d = x - t, then the mean, the sum, or nothing ("reduction").

Derivation, with s the gradient of each ℓ (grad for "none" and "sum", grad / N for "mean"):
    grad_d = s · sign(d)                                                                      (1)
    tangent_ℓ = sign(d) · tangent_d                                                           (2)
    x - t is autograd's own: grad_x = grad_d, grad_t = -grad_d. So are the products with a weight.

Saves:
    d (4 bytes per float32 element), as torch does, instead of both x and t. Its sign would do, in a quarter of a byte;
    but in int8 it has no NaN, and in bfloat16 (2 bytes) the two casts cost half of the whole time again.

Edge values:
    d = 0: the subgradient 0, as in torch.   d = ±∞: grad = ±s.   No elements: the mean is NaN, the gradient empty.

Sources:
    torch.nn.L1Loss, whose values, gradients and reductions these are.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import Context, entry, in_autocast_float32, public, scale_fresh
from torchbp.ops._op import Op
from torchbp.ops._reduction import matched, named, reduce, spread
from torchbp.ops._samples import Make, Sample, pairs, square, stored

__all__ = ["L1Loss", "L1LossFunction", "l1_loss"]


class L1LossFunction(Function):
    """Absolute value, reduced, with a hand-written derivative. Call it through :func:`l1_loss`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(d: Tensor, reduction: str) -> Tensor:  # (*) -> () or (*)
        return reduce(d.abs(), reduction)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, str], output: Tensor) -> None:
        d, ctx.reduction = inputs
        ctx.save_for_backward(d)
        ctx.save_for_forward(d)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None]:
        (d,) = ctx.saved_tensors
        s = spread(grad, ctx.reduction, d.numel())
        return scale_fresh(torch.sgn(d), s).to(d.dtype), None  # (1)

    @staticmethod
    def jvp(ctx: Context, tangent_d: Tensor, _: None) -> Tensor:
        (d,) = ctx.saved_tensors
        return reduce((torch.sgn(d).conj() * tangent_d).real, ctx.reduction)  # (2)


_l1_loss = entry(L1LossFunction)


@public
def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Absolute error: :math:`\ell = |x - t|`, reduced.

    Args:
        input: Any shape ``(*)``, floating point or complex.
        target: The shape of ``input``; other shapes that can be broadcast are, with a warning.
        size_average: Deprecated in torch; see ``reduction``.
        reduce: Deprecated in torch; see ``reduction``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: The shape of ``input``: a factor for each error; ``"mean"`` then divides by its sum.

    Returns:
        The loss in the unit of ``input``: a scalar, or ``(*)`` for ``"none"``.

    Raises:
        ValueError: An unknown reduction, or ``weight`` of another shape.
        RuntimeError: The mean of integers.

    Example:
        >>> import torch
        >>> from torchbp.functional import l1_loss
        >>> l1_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0]))
        tensor(1.5000)
    """
    reduction = named("l1_loss", reduction, size_average, reduce)
    if weight is not None and weight.size() != input.size():
        rule = f"weight of the input's shape {shape(input)}"
        raise ValueError(wrong("l1_loss", rule, shape(weight), "expand it first"))
    input, target = matched("l1_loss", input, target)
    if weight is None:
        input, target = in_autocast_float32(input, target)
        return _l1_loss(input - target, reduction)
    weighted = _l1_loss(input - target, "none") * weight
    if reduction == "none":
        return weighted
    return weighted.sum() / weight.sum() if reduction == "mean" else weighted.sum()


class L1Loss(nn.L1Loss):
    """Module form of :func:`l1_loss`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return l1_loss(input, target, reduction=self.reduction)


def _samples(make: Make) -> Iterator[Sample]:
    yield from pairs(make.normal, make.normal)
    for reduction in ("mean", "sum", "none"):
        kwargs = {"weight": make.uniform(3, 4, requires_grad=True), "reduction": reduction}
        yield Sample((make.normal(3, 4), make.normal(3, 4)), kwargs, name=f"weight-{reduction}")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    for reduction in ("mean", "none"):
        sample = Sample((make.normal(3, 4), make.normal(3, 4)), name=reduction)
        yield L1Loss, Sample((), {"reduction": reduction}), sample


def _errors(make: Make) -> Iterator[Sample]:
    x = make.normal(3, 4)
    yield Sample((x, x), {"reduction": "average"}, name="reduction")
    yield Sample((x, x), {"weight": make.normal(4)}, name="weight")
    integers = make.labels(3, classes=5)
    yield Sample((integers, integers), name="integers")


def _benchmark(make: Make, n: int) -> Sample:
    (x,) = square(make, n).args
    return Sample((x, make.normal(*x.shape, requires_grad=False)))


def _saved_bytes(x: Tensor, target: Tensor, **kwargs: object) -> int:
    weight = kwargs.get("weight")
    if weight is None:
        return stored(x)
    quotient = 2 if kwargs["reduction"] == "mean" else 0  # Σ w · ℓ and Σ w
    return stored(x, x, weight) + quotient * x.element_size()  # d and ℓ


OP = Op(
    function=l1_loss,
    modules=(L1Loss,),
    reference=F.l1_loss,
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=_saved_bytes,
    benchmark=_benchmark,
)
