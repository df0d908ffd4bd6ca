r"""SELU: y = s · x where x > 0, else s · α · (exp(x) - 1), with the s and α that keep mean 0 and variance 1.

Derivation:
    It is a scaled ELU, of which elu.py has the derivative:
    dy/dx  = s where x > 0, else s · α · exp(x)                                                (1)

Saves:
    What ELU saves: x, 4 bytes per float32 element, as torch.

Edge values:
    x = 0: s α, the left derivative, as in torch.   x → +∞: y → s x.   x → -∞: y → -s α, dy/dx → 0.   NaN: dy/dx is s.

Sources:
    Klambauer, Unterthiner, Mayr, Hochreiter, "Self-Normalizing Neural Networks", 2017, arXiv:1706.02515.
"""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops import _samples
from torchbp.ops._function import public
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample
from torchbp.ops.activations.elu import scaled_elu, scaled_elu_

__all__ = ["SELU", "selu", "selu_"]

_ALPHA = 1.6732632423543772848170429916717
_SCALE = 1.0507009873554804934193349852946


@public
def selu(input: Tensor, inplace: bool = False) -> Tensor:
    r"""Scaled ELU, elementwise: :math:`y = s x` where :math:`x > 0`, else :math:`s \alpha (e^x - 1)`.

    Args:
        input: Any shape ``(*)``, floating point.
        inplace: Write the result into ``input``.

    Returns:
        Tensor of the shape and dtype of ``input``.

    Raises:
        TypeError: ``input`` is not a tensor.
        RuntimeError: ``input`` is no floating-point tensor, or ``inplace`` on a leaf that requires grad.

    Example:
        >>> import torch
        >>> from torchbp.functional import selu
        >>> selu(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([-1.1113,  0.0000,  2.1014])
    """
    if inplace:
        return scaled_elu_("selu", input, _ALPHA, _SCALE, 1.0)
    return scaled_elu(input, _ALPHA, _SCALE, 1.0, False)  # (1)


@public
def selu_(input: Tensor) -> Tensor:
    """In-place form of :func:`selu`."""
    return selu(input, inplace=True)


class SELU(nn.SELU):
    """Module form of :func:`selu`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return selu(input, self.inplace)


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield SELU, Sample(), Sample((make.normal(3, 4),))
    x = make.normal(3, 4, requires_grad=False)
    yield SELU, Sample((True,)), Sample((x,), name="inplace")


OP = Op(
    function=selu,
    modules=(SELU,),
    reference=F.selu,
    samples=_samples.elementwise,
    module_samples=_module_samples,
    errors=_samples.elementwise_errors,
    saved_bytes=lambda x, **_: x.numel() * x.element_size(),
    benchmark=_samples.square,
    elementwise=True,
    fused="aten::elu_backward",
)
