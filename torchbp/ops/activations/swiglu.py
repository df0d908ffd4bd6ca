r"""SwiGLU: y = silu(a) · b, where a and b are the two halves of x along a dimension.

Derivation:
    grad_a = grad_y · b · silu'(a),  silu' as in silu.py                                                       (1)
    grad_b = grad_y · silu(a)                                                                   (2)

Saves:
    x, in its own dtype: 4 bytes per float32 element of x; the composition in torch ops keeps another half, 6.

Edge values:
    a → +∞: y → a · b.   a → -∞: y → 0, and the gradients too (b finite).   NaN gives NaN.

Sources:
    Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202.
"""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops import _samples
from torchbp.ops._function import public
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample
from torchbp.ops.activations._gated import gated, halves

__all__ = ["SwiGLU", "swiglu"]


@public
def swiglu(input: Tensor, dim: int = -1) -> Tensor:
    r"""SiLU-gated linear unit: :math:`y = \mathrm{silu}(a) \cdot b`, the first half of ``input`` gating the second.

    Args:
        input: ``(*, 2D, *)``, floating point: the gate :math:`a`, then the values :math:`b`.
        dim: The dimension that is halved.

    Returns:
        ``(*, D, *)``, of the dtype of ``input``.

    Raises:
        RuntimeError: The dimension is odd, or ``input`` is a scalar.
        IndexError: ``input`` has no dimension ``dim``.

    Example:
        >>> import torch
        >>> from torchbp.functional import swiglu
        >>> swiglu(torch.tensor([1.0, -1.0, 2.0, 3.0]))
        tensor([ 1.4621, -0.8068])
    """
    return gated("swiglu", input, dim, "silu")  # (1), (2)


class SwiGLU(nn.Module):
    """Module form of :func:`swiglu`."""

    __module__ = "torchbp.nn"

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def extra_repr(self) -> str:
        return f"dim={self.dim}"

    def forward(self, input: Tensor) -> Tensor:
        return swiglu(input, self.dim)


def _composed(input: Tensor, dim: int = -1) -> Tensor:
    a, b = halves("swiglu", input, dim)
    return F.silu(a) * b


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield SwiGLU, Sample(), Sample((make.normal(3, 4),))
    yield SwiGLU, Sample((0,)), Sample((make.normal(4, 3),), name="dim")


def _errors(make: Make) -> Iterator[Sample]:
    yield Sample((make.normal(2, 3),), name="odd")
    yield Sample((make.normal(),), name="scalar")
    yield Sample((make.normal(2, 4), 2), name="no-such-dim")


OP = Op(
    function=swiglu,
    modules=(SwiGLU,),
    reference=_composed,
    samples=_samples.halved,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=_samples.square,
    fused="aten::silu_backward",
)
