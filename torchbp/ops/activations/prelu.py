r"""PReLU: y = x where x > 0, else w · x, with a trained slope w, one for all or one a channel (dimension 1).

Derivation:
    grad_x = grad_y where x > 0, else w · grad_y                                               (1)
    grad_w = Σ over the positions that share w of grad_y · min(x, 0)                           (2)
    tangent_y = tangent_x · (1 or w) + min(x, 0) · tangent_w                                   (3)

Saves:
    x, in its own dtype, 4 bytes per float32 element, and w, as torch.

Edge values:
    x = 0: the subgradient w, as in torch.   x → ±∞: y → ±∞ · (1 or w).   NaN gives NaN.

Sources:
    He, Zhang, Ren, Sun, "Delving Deep into Rectifiers", 2015, arXiv:1502.01852.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _is_any_autocast_enabled as anywhere
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._autocast import autocasts
from torchbp.ops._clamp import clipped
from torchbp.ops._function import Context, entry, fused, is_half, kernel, public, widened
from torchbp.ops._one_kernel import in_one_kernel
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample
from torchbp.ops.kernels import SUM, in_one_loop, looped

__all__ = ["PReLU", "PReLUFunction", "prelu"]


_prelu_kernel_backward = kernel("_prelu_kernel_backward")
_FEW = 1 << 12  # elements; up to these torch's kernel, slow by each, is faster than six calls


class PReLUFunction(Function):
    """Parametric ReLU with hand-written gradients. Call it through :func:`prelu`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:  # (N, C, *), (C,) or (1,) -> (N, C, *)
        if isinstance(x, Tensor) and looped(x) and _fits(weight, x):
            y = in_one_loop(_value, x, _along_channels(weight, x))
            if y is not None:
                return y
        return torch.prelu(x, weight)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        x, weight = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        one = weight.numel() == 1 and weight.dim() <= x.dim()
        if one and fused(grad_y) and x.numel() <= _FEW:  # of the dtype of x
            grad_x, products = _prelu_kernel_backward(grad_y, x, weight)
            return grad_x, products.sum_to_size(weight.shape)  # (1), (2)
        need_x, need_weight = ctx.needs_input_grad
        w = _along_channels(weight, x)
        grad_x = grad_w = None
        if need_x and need_weight and looped(grad_y, x):
            summed = SUM if weight.numel() == 1 else torch.float32
            both = in_one_loop(_times_both, grad_y, x, w, outputs=(None, summed))
            if both is not None:
                grad_x, product = both
                total = product if summed == SUM else product.sum_to_size(w.shape)
                return grad_x, total.reshape(weight.shape).to(weight.dtype)  # (1), (2)
        if need_x:
            grad_x = in_one_kernel(_times_slope, grad_y, x, w)  # (1)
        if need_x and grad_x is None and fused(grad_y, x, w):
            # Masks and torch.where take several times as long as these kernels, which give 1 or w, too.
            sign = F.threshold(x, 0, -1).sign_()
            grad_x = torch._prelu_kernel(sign, -w).mul_(grad_y)  # (1)
        elif need_x and grad_x is None:
            grad_x = _times_slope(grad_y, x, w)  # (1)
        if need_weight:
            summed = weight.numel() == 1
            if x.is_cuda and (summed or not is_half(x)):
                product = in_one_kernel(_times_negative, x, grad_y, summed=summed)
                if product is not None:
                    total = (
                        product.sum().expand(w.shape) if summed else product.sum_to_size(w.shape)
                    )
                    return grad_x, total.reshape(weight.shape).to(weight.dtype)  # (2)
            negative = clipped(x, -math.inf, 0.0)
            wide = widened(negative)
            product = wide.mul_(grad_y) if fused(wide, grad_y) else wide * grad_y
            grad_w = product.sum_to_size(w.shape).reshape(weight.shape).to(weight.dtype)  # (2)
        return grad_x, grad_w

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor | None, tangent_weight: Tensor | None) -> Tensor:
        x, weight = ctx.saved_tensors
        tangent_y = torch.zeros_like(x)  # (3)
        if tangent_x is not None:
            tangent_y = tangent_y + _times_slope(tangent_x, x, _along_channels(weight, x))
        if tangent_weight is not None:
            tangent_y = tangent_y + clipped(x, -math.inf, 0.0) * _along_channels(tangent_weight, x)
        return tangent_y


def _along_channels(w: Tensor, x: Tensor) -> Tensor:
    """Return ``w`` in a shape that meets ``x`` in its dimension 1, and has its number of dimensions."""
    if x.dim() < 2:
        return w.reshape([1] * x.dim())
    return w.reshape([1, -1, *(1 for _ in x.shape[2:])])


def _fits(weight: Tensor, x: Tensor) -> bool:
    """Whether ``weight`` is what torch, too, takes beside ``x``."""
    if not isinstance(weight, Tensor) or weight.dim() > 1 or weight.dtype != x.dtype:
        return False
    return weight.numel() == 1 or (x.dim() > 1 and weight.numel() == x.shape[1])


def _value(x: Tensor, w: Tensor) -> Tensor:
    return torch.where(x > 0, x, x * w)


def _times_both(v: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return _times_slope(v, x, w), _times_negative(x, v)


def _times_negative(x: Tensor, v: Tensor) -> Tensor:
    return v * x.clamp(max=0)


def _times_slope(v: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return torch.where(x > 0, v, v * w)


_prelu = entry(PReLUFunction, again=PReLUFunction.forward)


@public
def prelu(input: Tensor, weight: Tensor) -> Tensor:
    r"""Leaky ReLU with a trained slope: :math:`y = x` where :math:`x > 0`, else :math:`w x`.

    Args:
        input: ``(N, C, *)``, or any shape where ``weight`` is one number; floating point.
        weight: The slope, ``(C,)`` or ``(1,)`` or ``()``, of the dtype of ``input``.

    Returns:
        Tensor of the shape and dtype of ``input``.

    Raises:
        TypeError: ``input`` or ``weight`` is not a tensor.
        RuntimeError: ``weight`` has another number of elements than 1 or C, or another dtype.

    Example:
        >>> import torch
        >>> from torchbp.functional import prelu
        >>> prelu(torch.tensor([-1.0, 2.0]), torch.tensor(0.25))
        tensor([-0.2500,  2.0000])
    """
    if anywhere() and isinstance(input, Tensor) and autocasts(input.device.type):
        weight = weight.to(input.dtype)
    return _prelu(input, weight)


class PReLU(nn.PReLU):
    """Module form of :func:`prelu`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return prelu(input, self.weight)


def _all_samples(make: Make) -> Iterator[Sample]:
    for shape in ((3, 4), (5,), (), (0, 2), (2, 3, 2), (2, 3, 2, 2)):
        name = "x".join(map(str, shape)) or "scalar"
        yield Sample((make.normal(*shape), make.normal(1)), name=f"{name}-one")
        if len(shape) > 1:
            yield Sample((make.normal(*shape), make.normal(shape[1])), name=f"{name}-channels")
    yield Sample((make.normal(3, 4), make.normal()), name="scalar-weight")
    frozen = make.normal(4, requires_grad=False)
    yield Sample((make.normal(3, 4), frozen), name="frozen")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield PReLU, Sample(), Sample((make.normal(3, 4),))
    yield PReLU, Sample((4,), {"init": 0.1}), Sample((make.normal(3, 4),), name="channels")


def _errors(make: Make) -> Iterator[Sample]:
    yield Sample((make.normal(3, 4), make.normal(3)), name="channels")
    yield Sample((make.normal(4), make.normal(3)), name="no-channels")
    yield Sample((make.normal(3, 4), make.normal(4).float()), name="dtype")
    yield Sample((make.normal(3, 4), 0.25), name="number")


def _benchmark(make: Make, n: int) -> Sample:
    return Sample((*_samples.square(make, n).args, make.normal(1)))


OP = Op(
    function=prelu,
    modules=(PReLU,),
    reference=F.prelu,
    samples=_all_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=lambda x, w: (x.numel() + w.numel()) * x.element_size(),
    benchmark=_benchmark,
)
