r"""ReGLU: y = relu(a) · b, where a and b are the two halves of x along a dimension.

Derivation:
    grad_a = grad_y · b · relu'(a),  relu' as in relu.py                                                       (1)
    grad_b = grad_y · relu(a)                                                                   (2)

Saves:
    x, in its own dtype: 4 bytes per float32 element of x; the composition in torch ops keeps another half, 6.

Edge values:
    a → +∞: y → a · b.   a → -∞: y → 0, and the gradients too (b finite).   NaN gives NaN.

Sources:
    Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from torchbp.ops import _samples
from torchbp.ops._function import public
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample
from torchbp.ops.activations._gated import gated, halves

__all__ = ["ReGLU", "reglu"]


@public
def reglu(input: Tensor, dim: int = -1) -> Tensor:
    r"""ReLU-gated linear unit: :math:`y = \max(a, 0) \cdot b`, the first half of ``input`` gating the second.

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
        >>> from torchbp.functional import reglu
        >>> reglu(torch.tensor([1.0, -1.0, 2.0, 3.0]))
        tensor([2., 0.])
    """
    return gated("reglu", input, dim, "relu")  # (1), (2)


class ReGLU(nn.Module):
    """Module form of :func:`reglu`."""

    __module__ = "torchbp.nn"

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def extra_repr(self) -> str:
        return f"dim={self.dim}"

    def forward(self, input: Tensor) -> Tensor:
        return reglu(input, self.dim)


def _composed(input: Tensor, dim: int = -1) -> Tensor:
    a, b = halves("reglu", input, dim)
    return torch.relu(a) * b


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield ReGLU, Sample(), Sample((make.normal(3, 4),))
    yield ReGLU, Sample((0,)), Sample((make.normal(4, 3),), name="dim")


def _errors(make: Make) -> Iterator[Sample]:
    yield Sample((make.normal(2, 3),), name="odd")
    yield Sample((make.normal(),), name="scalar")
    yield Sample((make.normal(2, 4), 2), name="no-such-dim")


OP = Op(
    function=reglu,
    modules=(ReGLU,),
    reference=_composed,
    samples=_samples.halved,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=_samples.square,
    fused="aten::threshold_backward",
)
