r"""GeGLU: y = gelu(a) · b, where a and b are the two halves of x along a dimension.

Derivation:
    grad_a = grad_y · b · gelu'(a),  gelu' as in gelu.py                                                       (1)
    grad_b = grad_y · gelu(a)                                                                   (2)

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
from torchbp.ops._errors import wrong
from torchbp.ops._function import public
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample
from torchbp.ops.activations._gated import gated, halves

__all__ = ["GeGLU", "geglu"]


@public
def geglu(input: Tensor, dim: int = -1, approximate: str = "none") -> Tensor:
    r"""GELU-gated linear unit: :math:`y = \mathrm{gelu}(a) \cdot b`, the first half of ``input`` gating the second.

    Args:
        input: ``(*, 2D, *)``, floating point: the gate :math:`a`, then the values :math:`b`.
        dim: The dimension that is halved.
        approximate: ``"none"`` or ``"tanh"``, as in :func:`gelu`.

    Returns:
        ``(*, D, *)``, of the dtype of ``input``.

    Raises:
        RuntimeError: The dimension is odd, or ``input`` is a scalar;
            ``approximate`` is unknown.
        IndexError: ``input`` has no dimension ``dim``.

    Example:
        >>> import torch
        >>> from torchbp.functional import geglu
        >>> geglu(torch.tensor([1.0, -1.0, 2.0, 3.0]))
        tensor([ 1.6827, -0.4760])
    """
    if approximate not in ("none", "tanh"):
        rule = "approximate to be 'none' or 'tanh'"
        raise RuntimeError(wrong("geglu", rule, repr(approximate), "pass one of the two"))
    return gated("geglu", input, dim, approximate)  # (1), (2)


class GeGLU(nn.Module):
    """Module form of :func:`geglu`."""

    __module__ = "torchbp.nn"

    def __init__(self, dim: int = -1, approximate: str = "none") -> None:
        super().__init__()
        self.dim = dim
        self.approximate = approximate

    def extra_repr(self) -> str:
        return f"dim={self.dim}, approximate={self.approximate}"

    def forward(self, input: Tensor) -> Tensor:
        return geglu(input, self.dim, self.approximate)


def _composed(input: Tensor, dim: int = -1, approximate: str = "none") -> Tensor:
    a, b = halves("geglu", input, dim)
    return F.gelu(a, approximate=approximate) * b


def _all_samples(make: Make) -> Iterator[Sample]:
    yield from _samples.halved(make)
    yield Sample((make.normal(2, 40),), {"approximate": "tanh"}, name="tanh")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield GeGLU, Sample(), Sample((make.normal(3, 4),))
    yield GeGLU, Sample((0,)), Sample((make.normal(4, 3),), name="dim")
    sample = Sample((make.normal(3, 4),), name="tanh")
    yield GeGLU, Sample((), {"approximate": "tanh"}), sample


def _errors(make: Make) -> Iterator[Sample]:
    yield Sample((make.normal(2, 3),), name="odd")
    yield Sample((make.normal(),), name="scalar")
    yield Sample((make.normal(2, 4), 2), name="no-such-dim")
    yield Sample((make.normal(2, 4),), {"approximate": "erf"}, name="approximate")


OP = Op(
    function=geglu,
    modules=(GeGLU,),
    reference=_composed,
    samples=_all_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=_samples.square,
    fused="aten::gelu_backward",
)
