r"""Softmax along a dimension: y_i = exp(x_i) / Σ_j exp(x_j).

Derivation, with all sums along that dimension:
    ∂y_i/∂x_j = y_i · ([i = j] - y_j)
    grad_x    = y · (grad_y - Σ grad_y · y)                                                    (1)
    The Jacobian is symmetric, so tangent_y is (1) of tangent_x.

Saves:
    y (4 bytes per float32 element), which a matrix product behind it keeps anyway.

Edge values:
    x_i = -∞: y_i = 0, grad_x_i = 0.   All -∞, or one +∞: NaN, as in torch.   A dimension of size 0: empty.

Sources:
    Bridle, "Probabilistic Interpretation of Feedforward Classification Network Outputs", 1990,
    doi:10.1007/978-3-642-76153-9_28.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.overrides import has_torch_function

from torchbp.ops import _samples
from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import (
    Context,
    entry,
    in_float32,
    is_half,
    kernel,
    public,
    undifferentiated,
)
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample
from torchbp.ops.kernels import over_softmax, over_softmax_backward

__all__ = ["Softmax", "Softmax2d", "SoftmaxFunction", "softmax"]

_softmax_backward_data = kernel("_softmax_backward_data")


class SoftmaxFunction(Function):
    """Softmax with a hand-written gradient. Call it through :func:`softmax`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:  # x, y: (*)
        made = over_softmax(x, dim)
        return torch.softmax(x, dim) if made is None else made

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, int], output: Tensor) -> None:
        _, ctx.dim = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        grad_x = over_softmax_backward(grad_y, y, ctx.dim)
        if grad_x is not None:
            return grad_x, None
        if undifferentiated():
            return _softmax_backward_data(grad_y, y, ctx.dim, y.dtype), None
        return project(grad_y, y, ctx.dim), None

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, _: None) -> Tensor:
        (y,) = ctx.saved_tensors
        return project(tangent_x, y, ctx.dim)


def project(v: Tensor, y: Tensor, dim: int) -> Tensor:
    return in_float32(lambda v, y: y * (v - (v * y).sum(dim, keepdim=True)), v, y)  # (1)


_softmax = entry(SoftmaxFunction, again=SoftmaxFunction.forward)


def implicit_dim(op: str, input: Tensor, stacklevel: int) -> int:
    """Return the dimension that torch assumes where none is given, with its warning."""
    choose = F._get_softmax_dim  # pyright: ignore[reportAttributeAccessIssue]
    return choose(op, input.dim(), stacklevel + 2)


def along(
    op: str, input: Tensor, dim: int | None, stacklevel: int, dtype: torch.dtype | None
) -> tuple[Tensor, int]:
    """Return ``input`` in ``dtype``, or as autocast casts it for a softmax, and ``dim``, or what torch assumes."""
    if dim is None:
        dim = implicit_dim(op, input, stacklevel + 1)
    if dtype is None and is_half(input) and input.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = torch.float32  # there, not on the CPU, softmax is on autocast's float32 list
    return input if dtype is None else input.to(dtype), dim


@public
def softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    r"""Softmax along a dimension: :math:`y_i = e^{x_i} / \sum_j e^{x_j}`.

    Args:
        input: Any shape ``(*)``, floating point.
        dim: The dimension whose values sum to 1. Without it torch's old choice is made, with a warning.
        _stacklevel: Of that warning.
        dtype: ``input`` is cast to it first.

    Returns:
        Tensor of the shape of ``input``; values are in ``[0, 1]``.

    Raises:
        IndexError: ``input`` has no dimension ``dim``.
        NotImplementedError: ``input`` is of integers, and ``dtype`` is not given.

    Example:
        >>> import torch
        >>> from torchbp.functional import softmax
        >>> softmax(torch.tensor([0.0, 1.0, 2.0]), dim=0)
        tensor([0.0900, 0.2447, 0.6652])
    """
    return _softmax(*along("softmax", input, dim, _stacklevel, dtype))


class Softmax(nn.Softmax):
    """Module form of :func:`softmax`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return softmax(input, self.dim, _stacklevel=5)


class Softmax2d(nn.Softmax2d):
    """:func:`softmax` over the channels of ``(N, C, H, W)`` or ``(C, H, W)``."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        if not has_torch_function((input,)) and input.dim() not in (3, 4):
            rule = "input of shape (N, C, H, W) or (C, H, W)"
            raise ValueError(wrong("Softmax2d", rule, shape(input), "use Softmax(dim)"))
        return softmax(input, -3)


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield Softmax, Sample((1,)), Sample((make.normal(3, 4),))
    yield Softmax2d, Sample(), Sample((make.normal(2, 3, 2, 2),), name="batch")
    yield Softmax2d, Sample(), Sample((make.normal(3, 2, 2),), name="image")


OP = Op(
    function=softmax,
    modules=(Softmax, Softmax2d),
    reference=F.softmax,
    samples=_samples.with_dtype,
    module_samples=_module_samples,
    errors=_samples.along_dims_errors,
    saved_bytes=lambda x, *_, dtype=None, **__: x.numel() * (dtype or x.dtype).itemsize,
    benchmark=_samples.along_rows,
    fused="aten::_softmax_backward_data",
)
