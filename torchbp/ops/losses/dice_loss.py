r"""Dice loss: ℓ = 1 - (2 Σ x t + ε) / (Σ x^k + Σ t^k + ε) over all but the first dimension, then reduced over it.

x are probabilities; k is 1, or 2 with "squared" (V-Net's form).

Derivation, with I = 2 Σ x t + ε, U = Σ x^k + Σ t^k + ε, and s the gradient of each ℓ:
    grad_x = s · (I k x^(k-1) / U - 2 t) / U                                                  (1)
    grad_t = s · (I k t^(k-1) / U - 2 x) / U                                                  (2)
    tangent_ℓ = Σ gradient · tangent over both inputs, with s = 1                             (3)

Saves:
    x and t, which are inputs; the sums of each row are made again.

Edge values:
    x = t = 0 throughout: ℓ = 0 for ε > 0, NaN for ε = 0.   No rows: the mean is NaN.

Sources:
    Milletari, Navab, Ahmadi, "V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image Segmentation",
    2016, arXiv:1606.04797.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import Context, entry, in_float32, public
from torchbp.ops._op import Op, rounded_once
from torchbp.ops._reduction import in_common_dtype, named, reduce, spread
from torchbp.ops._samples import Make, Sample, square, stored

__all__ = ["DiceLoss", "DiceLossFunction", "dice_loss"]


class DiceLossFunction(Function):
    """Dice loss with hand-written gradients. Call it through :func:`dice_loss`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, target: Tensor, eps: float, power: int, reduction: str) -> Tensor:
        def values(x: Tensor, t: Tensor) -> Tensor:  # (N, *), (N, *) -> (N,)
            overlap, size = _sums(x, t, eps, power)
            return 1 - overlap / size

        return reduce(in_float32(values, x, target), reduction)

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, Tensor, float, int, str], output: Tensor
    ) -> None:
        x, target, ctx.eps, ctx.power, ctx.reduction = inputs
        ctx.save_for_backward(x, target)

    @staticmethod
    def backward(
        ctx: Context, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, target = ctx.saved_tensors
        need_x, need_target, *_ = ctx.needs_input_grad
        s = spread(grad, ctx.reduction, x.shape[0])

        def gradient(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return _gradient(x, t, s, ctx.eps, ctx.power)

        grad_x = in_float32(gradient, x, target, s) if need_x else None
        # (2) is (1) with x and t exchanged
        grad_target = in_float32(gradient, target, x, s) if need_target else None
        return grad_x, grad_target, None, None, None

    @staticmethod
    def jvp(
        ctx: Context, tangent_x: Tensor | None, tangent_target: Tensor | None, *_: None
    ) -> Tensor:
        x, target = ctx.saved_tensors
        one, tangent = x.new_ones(()), torch.zeros_like(x)
        if tangent_x is not None:
            tangent = tangent + _gradient(x, target, one, ctx.eps, ctx.power) * tangent_x
        if tangent_target is not None:
            tangent = tangent + _gradient(target, x, one, ctx.eps, ctx.power) * tangent_target
        return reduce(_over_rows(tangent), ctx.reduction)  # (3)


def _over_rows(v: Tensor) -> Tensor:
    return v.sum(tuple(range(1, v.dim())))


def _sums(x: Tensor, t: Tensor, eps: float, power: int) -> tuple[Tensor, Tensor]:
    """Return I and U of each row."""
    x_k, t_k = (x, t) if power == 1 else (x.square(), t.square())
    return 2 * _over_rows(x * t) + eps, _over_rows(x_k) + _over_rows(t_k) + eps


def _gradient(x: Tensor, t: Tensor, s: Tensor, eps: float, power: int) -> Tensor:
    overlap, size = _sums(x, t, eps, power)
    rows = (-1, *(1 for _ in x.shape[1:]))
    of_x, of_t = (s * (overlap / size) / size).reshape(rows), (-2 * s / size).reshape(rows)
    return of_t * t + (of_x if power == 1 else 2 * of_x * x)  # (1)


_dice_loss = entry(DiceLossFunction)


@public
def dice_loss(
    input: Tensor,
    target: Tensor,
    eps: float = 1.0,
    squared: bool = False,
    reduction: str = "mean",
) -> Tensor:
    r"""Dice loss: :math:`\ell = 1 - (2 \sum x t + \epsilon) / (\sum x^k + \sum t^k + \epsilon)`, reduced over the rows.

    Args:
        input: Probabilities ``(N, *)``, floating point.
        target: Probabilities, the shape of ``input``.
        eps: :math:`\epsilon`, which keeps the quotient of empty masks finite.
        squared: Whether k is 2 rather than 1.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        The loss, in ``[0, 1]`` a row: a scalar, or ``(N,)`` for ``"none"``.

    Raises:
        NotImplementedError: Integer or complex ``input``.
        ValueError: Fewer than two dimensions, ``target`` of another shape, or an unknown reduction.

    Example:
        >>> import torch
        >>> from torchbp.functional import dice_loss
        >>> dice_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
        tensor(0.2500)
    """
    reduction = named("dice_loss", reduction, None, None)
    _check(input, target)
    input, target = in_common_dtype(input, target)
    return _dice_loss(input, target, eps, 2 if squared else 1, reduction)


def _check(input: Tensor, target: Tensor) -> None:
    if not input.is_floating_point() or target.is_complex():
        raise NotImplementedError(
            wrong("dice_loss", "floating-point input", input.dtype, "cast it")
        )
    if input.dim() < 2 or target.size() != input.size():
        rule, got = "input and target (N, *) of one shape", f"{shape(input)} and {shape(target)}"
        raise ValueError(wrong("dice_loss", rule, got, "reshape them"))


class DiceLoss(nn.Module):
    """Module form of :func:`dice_loss`."""

    __module__ = "torchbp.nn"

    def __init__(self, eps: float = 1.0, squared: bool = False, reduction: str = "mean") -> None:
        super().__init__()
        self.eps, self.squared, self.reduction = eps, squared, reduction

    def extra_repr(self) -> str:
        return f"eps={self.eps}, squared={self.squared}"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return dice_loss(input, target, self.eps, self.squared, self.reduction)


def _pair(make: Make, *dims: int) -> tuple[Tensor, Tensor]:
    x = make.uniform(*dims, low=0.05, high=0.95, requires_grad=True)
    return x, make.uniform(*dims, requires_grad=True)


def _samples(make: Make) -> Iterator[Sample]:
    for reduction in ("mean", "sum", "none"):
        yield Sample(_pair(make, 3, 4), {"reduction": reduction}, reduction)
    yield Sample(_pair(make, 2, 3, 2), {"squared": True, "eps": 0.1}, "squared")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield DiceLoss, Sample(), Sample(_pair(make, 3, 4))
    kwargs = {"squared": True, "eps": 0.1, "reduction": "sum"}
    yield DiceLoss, Sample((), kwargs), Sample(_pair(make, 2, 3, 2), name="squared")


def _errors(make: Make) -> Iterator[Sample]:
    x, t = _pair(make, 3, 4)
    yield Sample((x, t), {"reduction": "average"}, name="reduction")
    yield Sample((x, t[0]), name="shape")
    yield Sample((x[0], t[0]), name="dimensions")


def _benchmark(make: Make, n: int) -> Sample:
    x, t = _pair(make, *square(make, n).args[0].shape)
    return Sample((x, t.detach()))


def _reference(
    input: Tensor,
    target: Tensor,
    eps: float = 1.0,
    squared: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """The definition, as it is usually written."""
    reduction = named("dice_loss", reduction, None, None)
    _check(input, target)
    x, t = input.flatten(1), target.flatten(1)
    k = 2 if squared else 1
    size = (x**k).sum(1) + (t**k).sum(1) + eps
    return reduce(1 - (2 * (x * t).sum(1) + eps) / size, reduction)


OP = Op(
    function=dice_loss,
    modules=(DiceLoss,),
    reference=rounded_once(_reference),
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=lambda *args, **_: stored(*args),
    benchmark=_benchmark,
)
