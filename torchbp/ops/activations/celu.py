r"""CELU: y = x where x > 0, else α · (exp(x/α) - 1): ELU made smooth at 0 for every α.

Derivation:
    It is α · (exp(βx) - 1) with β = 1/α, of which elu.py has the derivative:
    dy/dx  = 1 where x > 0, else exp(x/α)                                                      (1)

Saves:
    What ELU saves: x, 4 bytes per float32 element, as torch.

Edge values:
    x = 0: dy/dx = 1, from both sides.   x → +∞: y → x.   x → -∞: y → -α, dy/dx → 0 (α > 0).
    NaN: dy/dx is 1, as in torch.   In float64 torch takes 1/α of its gradient as a float32 number; here it is exact.

Sources:
    Barron, "Continuously Differentiable Exponential Linear Units", 2017, arXiv:1704.07483.
"""

from collections.abc import Iterator

from torch import Tensor, nn
from torch._C import _nn  # pyright: ignore[reportAttributeAccessIssue]

from torchbp.ops import _samples
from torchbp.ops._errors import wrong
from torchbp.ops._function import public
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample
from torchbp.ops.activations.elu import scaled_elu, scaled_elu_

__all__ = ["CELU", "celu", "celu_"]


@public
def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    r"""Continuously differentiable ELU: :math:`y = x` where :math:`x > 0`, else :math:`\alpha (e^{x/\alpha} - 1)`.

    Args:
        input: Any shape ``(*)``, floating point.
        alpha: The values approach :math:`-\alpha` at -∞; not 0.
        inplace: Write the result into ``input``; needs ``alpha > 0`` where a gradient is wanted.

    Returns:
        Tensor of the shape and dtype of ``input``.

    Raises:
        TypeError: ``input`` is not a tensor.
        RuntimeError: ``input`` is no floating-point tensor; ``alpha`` is 0; ``inplace`` with a negative ``alpha`` where
            a gradient is wanted, or on a leaf that requires grad.

    Example:
        >>> import torch
        >>> from torchbp.functional import celu
        >>> celu(torch.tensor([-1.0, 0.0, 2.0]), 0.5)
        tensor([-0.4323,  0.0000,  2.0000])
    """
    if alpha == 0:
        raise RuntimeError(wrong("celu", "alpha != 0", alpha, "x is divided by it"))
    if inplace:
        return scaled_elu_("celu", input, alpha, 1.0, 1.0 / alpha)
    return scaled_elu(input, alpha, 1.0, 1.0 / alpha, False)  # (1)


@public
def celu_(input: Tensor, alpha: float = 1.0) -> Tensor:
    """In-place form of :func:`celu`."""
    return celu(input, alpha, inplace=True)


class CELU(nn.CELU):
    """Module form of :func:`celu`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return celu(input, self.alpha, self.inplace)


def _all_samples(make: Make) -> Iterator[Sample]:
    yield from _samples.elementwise(make)
    for alpha in (1.7, -0.5):
        yield Sample((make.normal(3, 4), alpha), name=f"alpha{alpha}")


def _exact(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """Torch's values; its gradient rounds 1/α to float32, in float64 too."""
    return _nn.elu(input, alpha, 1.0, 1.0 / alpha)


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield CELU, Sample(), Sample((make.normal(3, 4),))
    x = make.normal(3, 4, requires_grad=False)
    yield CELU, Sample((0.7,), {"inplace": True}), Sample((x,), name="inplace")


def _errors(make: Make) -> Iterator[Sample]:
    yield from _samples.elementwise_errors(make)
    yield Sample((make.normal(3), 0.0), name="alpha0")


OP = Op(
    function=celu,
    modules=(CELU,),
    reference=_exact,
    samples=_all_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=_samples.square,
    elementwise=True,
    fused="aten::elu_backward",
)
