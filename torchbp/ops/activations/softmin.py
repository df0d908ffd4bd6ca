r"""Softmin along a dimension: y_i = exp(-x_i) / Σ_j exp(-x_j).

Derivation, with all sums along that dimension:
    y = softmax(z) with z = -x, of which softmax.py has the gradient:
    grad_x = -grad_z = -y · (grad_y - Σ grad_y · y)                                            (1)
    The Jacobian is symmetric, so tangent_y is (1) of tangent_x.

Saves:
    y (4 bytes per float32 element), as torch.

Edge values:
    x_i = +∞: y_i = 0, grad_x_i = 0.   All +∞, or one -∞: NaN, as in torch.   A dimension of size 0: empty.

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
from torchbp.ops._function import Context, entry, kernel, public, undifferentiated
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample
from torchbp.ops.activations.softmax import along, project

__all__ = ["Softmin", "SoftminFunction", "softmin"]

_softmax_backward_data = kernel("_softmax_backward_data")


class SoftminFunction(Function):
    """Softmin with a hand-written gradient. Call it through :func:`softmin`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:  # x, y: (*)
        return torch.softmax(-x, dim)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, int], output: Tensor) -> None:
        _, ctx.dim = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        if undifferentiated():
            return _softmax_backward_data(grad_y, y, ctx.dim, y.dtype).neg_(), None
        return -project(grad_y, y, ctx.dim), None  # (1)

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, _: None) -> Tensor:
        (y,) = ctx.saved_tensors
        return -project(tangent_x, y, ctx.dim)


_softmin = entry(SoftminFunction, again=SoftminFunction.forward)


@public
def softmin(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    r"""Softmin along a dimension: :math:`y_i = e^{-x_i} / \sum_j e^{-x_j}`.

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
        >>> from torchbp.functional import softmin
        >>> softmin(torch.tensor([0.0, 1.0, 2.0]), dim=0)
        tensor([0.6652, 0.2447, 0.0900])
    """
    return _softmin(*along("softmin", input, dim, _stacklevel, dtype))


class Softmin(nn.Softmin):
    """Module form of :func:`softmin`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return softmin(input, self.dim, _stacklevel=5)


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield Softmin, Sample((1,)), Sample((make.normal(3, 4),))


OP = Op(
    function=softmin,
    modules=(Softmin,),
    reference=F.softmin,
    samples=_samples.with_dtype,
    module_samples=_module_samples,
    errors=_samples.along_dims_errors,
    saved_bytes=lambda x, *_, dtype=None, **__: x.numel() * (dtype or x.dtype).itemsize,
    benchmark=_samples.along_rows,
    fused="aten::_softmax_backward_data",
)
