r"""Gradient scale: y = x in forward; in backward the gradient is multiplied by a factor c.

Derivation (a rule, not a derivative: that of the identity would be 1):
    grad_x = c · grad_y                                                                        (1)
    Forward mode follows the rule too: tangent_y = c · tangent_x.

Saves:
    Nothing.

Edge values:
    c = 0 stops the gradient, with zeros.   grad_y = ±∞ or NaN: times c.

Sources:
    Ganin et al., "Domain-Adversarial Training of Neural Networks", 2015, arXiv:1505.07818 (c = -λ: gradient reversal).
"""

from collections.abc import Iterator

from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._function import Context, entry, handed_on, public
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample

__all__ = ["GradientScale", "GradientScaleFunction", "gradient_scale"]


class GradientScaleFunction(Function):
    """Identity whose gradient is scaled. Call it through :func:`gradient_scale`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: float) -> Tensor:  # x, y: (*)
        return handed_on(x)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, float], output: Tensor) -> None:
        _, ctx.scale = inputs

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None]:
        return grad_y * ctx.scale, None  # (1)

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, _: None) -> Tensor:
        return tangent_x * ctx.scale


_gradient_scale = entry(GradientScaleFunction, again=GradientScaleFunction.forward)


@public
def gradient_scale(input: Tensor, scale: float) -> Tensor:
    r"""Pass ``input`` on, and :math:`c` times the gradient back.

    Args:
        input: Any shape ``(*)``, floating point or complex.
        scale: The factor :math:`c` of the gradient.

    Returns:
        A view of ``input``; in forward mode a copy.

    Raises:
        AttributeError: ``input`` is not a tensor.

    Example:
        >>> import torch
        >>> from torchbp.functional import gradient_scale
        >>> x = torch.ones(2, requires_grad=True)
        >>> gradient_scale(x, 0.5).sum().backward()
        >>> x.grad
        tensor([0.5000, 0.5000])
    """
    return _gradient_scale(input, scale)


class GradientScale(nn.Module):
    """Module form of :func:`gradient_scale`."""

    __module__ = "torchbp.nn"

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def extra_repr(self) -> str:
        return f"scale={self.scale}"

    def forward(self, input: Tensor) -> Tensor:
        return gradient_scale(input, self.scale)


def _rule(input: Tensor, scale: float) -> Tensor:
    return input.detach() + (scale * (input - input.detach())).to(input.dtype)


def _all_samples(make: Make) -> Iterator[Sample]:
    for sample in _samples.elementwise(make):
        yield Sample((*sample.args, 0.5), name=sample.name)
    yield Sample((make.normal(3, 4), -2.0), name="negative")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield GradientScale, Sample((0.5,)), Sample((make.normal(3, 4),))


def _benchmark(make: Make, n: int) -> Sample:
    return Sample((*_samples.square(make, n).args, 0.5))


OP = Op(
    function=gradient_scale,
    modules=(GradientScale,),
    reference=_rule,
    samples=_all_samples,
    module_samples=_module_samples,
    saved_bytes=lambda *_, **__: 0,
    benchmark=_benchmark,
    estimator=True,
)
