r"""Mean squared error: ℓ = w · (x - t)², then the mean, the sum, or nothing ("reduction"); w is 1 unless given.

Derivation, with s the gradient of each ℓ (grad for "none" and "sum", grad / N for "mean"):
    grad_x = 2 s · w · (x - t)                                                                (1)
    grad_t = -grad_x                                                                          (2)
    grad_w = s · (x - t)²                                                                     (3)
    tangent_ℓ = 2 w · (x - t) · (tangent_x - tangent_t) + (x - t)² · tangent_w                (4)
    The weighted mean divides the sum by Σ w; that quotient is autograd's own.

Saves:
    x, t and w, which are inputs.

Edge values:
    No elements: the mean is NaN, the gradient empty.   x = t = ±∞: NaN.

Sources:
    Bishop, "Pattern Recognition and Machine Learning", 2006, section 1.2.5 (the Gaussian's maximum likelihood).
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
    as_dtype,
    entry,
    fused,
    in_autocast_float32,
    is_half,
    kernel,
    public,
    scale_fresh,
    undifferentiated,
)
from torchbp.ops._op import Op
from torchbp.ops._pieces import in_pieces
from torchbp.ops._reduction import FEW, REDUCTIONS, WIDE, matched, named, reduce, reduced, spread
from torchbp.ops._samples import Make, Sample, against_values
from torchbp.ops.kernels import in_one_loop, many

__all__ = ["MSELoss", "MSELossFunction", "mse_loss"]

_mse_loss_backward = kernel("mse_loss_backward")
_mse_loss_backward_into = kernel("mse_loss_backward", "grad_input")


class MSELossFunction(Function):
    """Squared error with hand-written gradients. Call it through :func:`mse_loss`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, target: Tensor, w: Tensor | None, reduction: str) -> Tensor:
        if w is not None:
            return reduce((x - target).square() * w, reduction)
        few = not (many(x, FEW + 1) or is_half(x))
        if few or x.dtype != target.dtype or not x.is_floating_point():  # torch's rules, refusals
            return _nn.mse_loss(x, target, REDUCTIONS[reduction])
        return reduced(_values, reduction, x, target)  # (*), (*) -> () or (*)

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, Tensor, Tensor | None, str], output: Tensor
    ) -> None:
        x, target, w, ctx.reduction = inputs
        ctx.save_for_backward(x, target, w)

    @staticmethod
    def backward(
        ctx: Context, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, target, w = ctx.saved_tensors
        need_x, need_target, need_w, _ = ctx.needs_input_grad
        wide = grad.dtype is x.dtype is target.dtype in WIDE
        if wide and w is None and undifferentiated() and x.numel() <= FEW:
            gradient = _mse_loss_backward(grad, x, target, REDUCTIONS[ctx.reduction])  # (1)
            return gradient if need_x else None, -gradient if need_target else None, None, None
        grad_x = grad_target = grad_w = None
        if need_x or need_target:
            v, how = grad, ctx.reduction
            if w is not None:
                v, how = spread(grad, how, x.numel()) * w, "none"
            s = spread(v, how, x.numel())
            gradient = in_one_loop(_gradient, x, target, s) if x.dtype == target.dtype else None
            if gradient is None and fused(v) and v.dtype == x.dtype == target.dtype:
                into = torch.empty_like(x)  # else the kernel fills it with zeros first
                gradient = _mse_loss_backward_into(v, x, target, REDUCTIONS[how], grad_input=into)
            elif gradient is None:
                gradient = in_pieces(_gradient, x, target, s)
            grad_x = as_dtype(gradient, x.dtype) if need_x else None
            grad_target = as_dtype(-gradient, target.dtype) if need_target else None  # (2)
        if need_w:
            s = spread(grad, ctx.reduction, x.numel())
            grad_w = (s * (x - target).square()).to(w.dtype)  # (3)
        return grad_x, grad_target, grad_w, None

    @staticmethod
    def jvp(
        ctx: Context,
        tangent_x: Tensor | None,
        tangent_target: Tensor | None,
        tangent_w: Tensor | None,
        _: None,
    ) -> Tensor:
        x, target, w = ctx.saved_tensors
        tangent = torch.zeros_like(x) if tangent_x is None else tangent_x
        if tangent_target is not None:
            tangent = tangent - tangent_target
        tangent = _gradient(x, target, tangent if w is None else tangent * w)
        if tangent_w is not None:
            tangent = tangent + (x - target).square() * tangent_w
        return reduce(tangent, ctx.reduction)  # (4)


def _values(x: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(x, target, reduction="none")


def _gradient(x: Tensor, target: Tensor, s: Tensor) -> Tensor:
    return scale_fresh(x - target, 2 * s)  # (1)


_mse_loss = entry(MSELossFunction)


@public
def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Mean squared error: :math:`\ell = (x - t)^2`, reduced.

    Args:
        input: Any shape ``(*)``, floating point.
        target: The shape of ``input``; other shapes that can be broadcast are, with a warning.
        size_average: Deprecated in torch; see ``reduction``.
        reduce: Deprecated in torch; see ``reduction``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: The shape of ``input``: a factor for each squared error; ``"mean"`` then divides by its sum.

    Returns:
        The loss in the squared unit of ``input``: a scalar, or ``(*)`` for ``"none"``.

    Raises:
        ValueError: An unknown reduction, or ``weight`` of another shape.
        NotImplementedError: Integer or complex input.

    Example:
        >>> import torch
        >>> from torchbp.functional import mse_loss
        >>> mse_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        tensor(2.)
    """
    reduction = named("mse_loss", reduction, size_average, reduce)
    input, target = matched("mse_loss", input, target)
    if not (input.dtype is target.dtype in WIDE):
        if torch.bool in (input.dtype, target.dtype) and input.dtype != target.dtype:
            input, target = input + 0, target + 0  # masks are not subtracted
        if weight is None:
            input, target = in_autocast_float32(input, target)
    if weight is None:
        return _mse_loss(input, target, None, reduction)
    if weight.size() != input.size():
        rule = f"weight of the input's shape {shape(input)}"
        raise ValueError(wrong("mse_loss", rule, shape(weight), "expand it first"))
    if reduction == "mean":
        return _mse_loss(input, target, weight, "sum") / weight.sum()
    return _mse_loss(input, target, weight, reduction)


class MSELoss(nn.MSELoss):
    """Module form of :func:`mse_loss`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return mse_loss(input, target, reduction=self.reduction)


def _samples(make: Make) -> Iterator[Sample]:
    for dims in ((3, 4), (), (1,), (2, 3, 2)):
        for reduction in ("mean", "sum", "none"):
            name = f"{'x'.join(map(str, dims)) or 'scalar'}-{reduction}"
            yield Sample((make.normal(*dims), make.normal(*dims)), {"reduction": reduction}, name)
    data = make.normal(3, 4, requires_grad=False)
    yield Sample((make.normal(3, 4), data), name="data-target")
    for reduction in ("sum", "none"):
        args = (make.normal(0, 3), make.normal(0, 3))
        yield Sample(args, {"reduction": reduction}, name=f"empty-{reduction}")
    for reduction in ("mean", "sum", "none"):
        kwargs = {"weight": make.uniform(3, 4, requires_grad=True), "reduction": reduction}
        yield Sample((make.normal(3, 4), make.normal(3, 4)), kwargs, name=f"weight-{reduction}")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    for reduction in ("mean", "sum", "none"):
        sample = Sample((make.normal(3, 4), make.normal(3, 4)), name=reduction)
        yield MSELoss, Sample((), {"reduction": reduction}), sample


def _errors(make: Make) -> Iterator[Sample]:
    x = make.normal(3, 4)
    yield Sample((x, x), {"reduction": "average"}, name="reduction")
    yield Sample((x, x), {"weight": make.normal(4)}, name="weight")
    integers = make.labels(3, classes=5)
    yield Sample((integers, integers), name="integers")


def _saved_bytes(x: Tensor, target: Tensor, **kwargs: object) -> int:
    inputs = 2 * x.numel() * x.element_size()
    weight = kwargs.get("weight")
    if not isinstance(weight, Tensor):
        return inputs
    quotient = 2 if kwargs["reduction"] == "mean" else 0  # Σ w · ℓ and Σ w
    return inputs + (weight.numel() + quotient) * weight.element_size()


OP = Op(
    function=mse_loss,
    modules=(MSELoss,),
    reference=F.mse_loss,
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=_saved_bytes,
    benchmark=against_values,
    fused="aten::mse_loss_backward",
)
