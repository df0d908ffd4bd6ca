r"""Gradient reversal: y = x in forward; in backward the gradient is multiplied by -λ.

Derivation (a rule, not a derivative: that of the identity would be 1):
    grad_x = -λ · grad_y, the scale -λ of gradient_scale.py                                    (1)

Saves:
    Nothing.

Edge values:
    λ = 0 stops the gradient, with zeros.   grad_y = ±∞ or NaN: times -λ.

Sources:
    Ganin et al., "Domain-Adversarial Training of Neural Networks", 2015, arXiv:1505.07818.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from torchbp.ops import _samples
from torchbp.ops._function import public
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample
from torchbp.ops.estimators.gradient_scale import gradient_scale

__all__ = ["GradientReversal", "gradient_reversal"]


@public
def gradient_reversal(input: Tensor, lambd: float = 1.0) -> Tensor:
    r"""Pass ``input`` on, and :math:`-\lambda` times the gradient back.

    Args:
        input: Any shape ``(*)``, floating point or complex.
        lambd: The strength :math:`\lambda` of the reversed gradient.

    Returns:
        A view of ``input``; in forward mode a copy.

    Raises:
        AttributeError: ``input`` is not a tensor.

    Example:
        >>> import torch
        >>> from torchbp.functional import gradient_reversal
        >>> x = torch.ones(2, requires_grad=True)
        >>> gradient_reversal(x, 0.1).sum().backward()
        >>> x.grad
        tensor([-0.1000, -0.1000])
    """
    return gradient_scale(input, -lambd)  # (1)


class GradientReversal(nn.Module):
    """Module form of :func:`gradient_reversal`."""

    __module__ = "torchbp.nn"

    def __init__(self, lambd: float = 1.0) -> None:
        super().__init__()
        self.lambd = lambd

    def extra_repr(self) -> str:
        return f"lambd={self.lambd}"

    def forward(self, input: Tensor) -> Tensor:
        return gradient_reversal(input, self.lambd)


def _rule(input: Tensor, lambd: float = 1.0) -> Tensor:
    return input.detach() - (lambd * (input - input.detach())).to(input.dtype)


def _all_samples(make: Make) -> Iterator[Sample]:
    yield from _samples.elementwise(make)
    yield Sample((make.normal(3, 4), 0.3), name="lambd")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield GradientReversal, Sample(), Sample((make.normal(3, 4),))
    yield GradientReversal, Sample((0.3,)), Sample((make.normal(3, 4),), name="lambd")


OP = Op(
    function=gradient_reversal,
    modules=(GradientReversal,),
    reference=_rule,
    samples=_all_samples,
    module_samples=_module_samples,
    saved_bytes=lambda *_, **__: 0,
    benchmark=_samples.square,
    estimator=True,
)
