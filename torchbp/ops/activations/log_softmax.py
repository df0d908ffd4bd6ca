r"""Log-softmax along a dimension: y_i = x_i - log Σ_j exp(x_j).

Derivation, with all sums along that dimension and p = softmax(x) = exp(y):
    ∂y_i/∂x_j = [i = j] - p_j
    grad_x    = grad_y - p · Σ grad_y                                                          (1)
    tangent_y = tangent_x - Σ p · tangent_x                                                    (2)

Saves:
    float32 and wider: y (4 bytes per float32 element).   bfloat16, float16: x (2 bytes): there exp(y) of a rounded y is
    off by |y| roundings, up to 3 % at y = -10; softmax(x) in float32 is not.

Edge values:
    x_i = -∞: y_i = -∞, and grad_y passes to it.   All -∞, or one +∞: NaN, as in torch.   A dimension of size 0: empty.

Sources:
    Bridle, "Probabilistic Interpretation of Feedforward Classification Network Outputs", 1990,
    doi:10.1007/978-3-642-76153-9_28.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._function import Context, entry, fused, is_half, kernel, public, undifferentiated
from torchbp.ops._one_kernel import in_one_kernel
from torchbp.ops._op import Op
from torchbp.ops._pieces import in_row_pieces
from torchbp.ops._samples import Make, Sample
from torchbp.ops.activations.softmax import along
from torchbp.ops.kernels import over_log_softmax, over_log_softmax_backward

__all__ = ["LogSoftmax", "LogSoftmaxFunction", "log_softmax"]

_log_softmax_backward_data = kernel("_log_softmax_backward_data")


class LogSoftmaxFunction(Function):
    """Log-softmax with a hand-written gradient. Call it through :func:`log_softmax`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:  # x, y: (*)
        made = over_log_softmax(x, dim)
        return torch.log_softmax(x, dim) if made is None else made

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, int], output: Tensor) -> None:
        x, ctx.dim = inputs
        kept = x if is_half(x) else output
        ctx.save_for_backward(kept)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        grad_x = over_log_softmax_backward(grad_y, kept, ctx.dim)
        if grad_x is not None:
            return grad_x, None
        if undifferentiated() and not (is_half(kept) or is_half(grad_y)):
            grad_x = _log_softmax_backward_data(grad_y, kept, ctx.dim, kept.dtype)
            return grad_x, None

        if kept.is_cuda and kept.dtype == grad_y.dtype and fused(grad_y, kept, half=True):
            return _of_half(grad_y, kept, ctx.dim), None

        def formula(v: Tensor, kept: Tensor) -> Tensor:
            p, total = _probabilities(kept, grad_y, ctx.dim), v.sum(ctx.dim, keepdim=True)
            return p.mul_(-total).add_(v) if fused(p, v) else v - p * total  # (1)

        return in_row_pieces(formula, ctx.dim, grad_y, kept), None

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, _: None) -> Tensor:
        (kept,) = ctx.saved_tensors

        def formula(v: Tensor, kept: Tensor) -> Tensor:
            p = _probabilities(kept, tangent_x, ctx.dim)
            return v - (p * v).sum(ctx.dim, keepdim=True)  # (2)

        return in_row_pieces(formula, ctx.dim, tangent_x, kept)


def _of_half(v: Tensor, x: Tensor, dim: int) -> Tensor:
    """Return (1) on a GPU: v and x are read as they are, and all between them is float32."""
    total = v.sum(dim, keepdim=True, dtype=torch.float32)
    if x.numel() and dim in (-1, x.dim() - 1):
        largest = x.amax(dim, keepdim=True).float()
        terms = in_one_kernel(_exponential, x, largest, summed=True)
        if terms is not None:
            scale = total / terms.sum(dim, keepdim=True)
            grad_x = in_one_kernel(_gradient, v, x, largest, scale)
            if grad_x is not None:
                return grad_x
    p = torch.softmax(x, dim, dtype=torch.float32)
    return torch.addcmul(v, p, total, value=-1, out=torch.empty_like(v))  # (1)


def _exponential(x: Tensor, largest: Tensor) -> Tensor:
    return torch.exp(x - largest)


def _gradient(v: Tensor, x: Tensor, largest: Tensor, scale: Tensor) -> Tensor:
    return v - torch.exp(x - largest) * scale  # (1)


def _probabilities(kept: Tensor, original: Tensor, dim: int) -> Tensor:
    """Return p from what is kept: x where the original is half precision, else y."""
    return torch.softmax(kept, dim) if is_half(original) else kept.exp()


_log_softmax = entry(LogSoftmaxFunction, again=LogSoftmaxFunction.forward)


@public
def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    r"""Logarithm of the softmax along a dimension: :math:`y_i = x_i - \log \sum_j e^{x_j}`.

    Args:
        input: Any shape ``(*)``, floating point.
        dim: The dimension whose :math:`e^{y_i}` sum to 1. Without it torch's old choice is made, with a warning.
        _stacklevel: Of that warning.
        dtype: ``input`` is cast to it first.

    Returns:
        Tensor of the shape of ``input``; values are in ``[-∞, 0]``.

    Raises:
        IndexError: ``input`` has no dimension ``dim``.
        NotImplementedError: ``input`` is of integers, and ``dtype`` is not given.

    Example:
        >>> import torch
        >>> from torchbp.functional import log_softmax
        >>> log_softmax(torch.tensor([0.0, 1.0, 2.0]), dim=0)
        tensor([-2.4076, -1.4076, -0.4076])
    """
    return _log_softmax(*along("log_softmax", input, dim, _stacklevel, dtype))


class LogSoftmax(nn.LogSoftmax):
    """Module form of :func:`log_softmax`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return log_softmax(input, self.dim, _stacklevel=5)


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield LogSoftmax, Sample((1,)), Sample((make.normal(3, 4),))


OP = Op(
    function=log_softmax,
    modules=(LogSoftmax,),
    reference=F.log_softmax,
    samples=_samples.with_dtype,
    module_samples=_module_samples,
    errors=_samples.along_dims_errors,
    saved_bytes=lambda x, *_, dtype=None, **__: x.numel() * (dtype or x.dtype).itemsize,
    benchmark=_samples.along_rows,
    fused="aten::_log_softmax_backward_data",
)
