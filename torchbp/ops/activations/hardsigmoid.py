r"""Hardsigmoid: y = min(max(x + 3, 0), 6) / 6.

Derivation:
    dy/dx  = 1/6 where -3 < x < 3, else 0                                                      (1)
    grad_x = grad_y · dy/dx                                                                    (2)

Saves:
    x, in its own dtype: 4 bytes per float32 element, as torch. Not y: it rounds to 1 before x reaches 3.

Edge values:
    x = ±3: the subgradient 0.   x → ±∞: y → 1 or 0, dy/dx → 0.   NaN: y is NaN, dy/dx is 0, as in torch.
    In float64 torch takes 1/6 as a float32 number, 3e-8 off; here it is exact.

Sources:
    Howard et al., "Searching for MobileNetV3", 2019, arXiv:1905.02244;
    Courbariaux, Bengio, David, "BinaryConnect: Training Deep Neural Networks with binary weights during propagations",
    2015, arXiv:1511.00363 (with slope 1/2).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._function import Context, entry, kernel, overwrite, public, undifferentiated
from torchbp.ops._op import Op
from torchbp.ops._pieces import in_pieces
from torchbp.ops._samples import Make, Sample

__all__ = ["Hardsigmoid", "HardsigmoidFunction", "hardsigmoid"]

_hardsigmoid_backward = kernel("hardsigmoid_backward")


class HardsigmoidFunction(Function):
    """Hardsigmoid with a hand-written derivative. Call it through :func:`hardsigmoid`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # x, y: (*)
        if rounds_a_sixth(x):
            return (x + 3).clamp(0, 6) / 6
        return F.hardsigmoid(x)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor], output: Tensor) -> None:
        (x,) = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if undifferentiated() and x.dtype != torch.float64:
            return _hardsigmoid_backward(grad_y, x)
        return _times_derivative(grad_y, x)  # (2)

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _times_derivative(tangent_x, x)


def rounds_a_sixth(x: Tensor) -> bool:
    """Whether torch's kernel of a hard gate rounds 1/6 to float32, though ``x`` is float64: a GPU's (torch 2.11)."""
    return isinstance(x, Tensor) and x.dtype == torch.float64 and not x.is_cpu


def _times_derivative(v: Tensor, x: Tensor) -> Tensor:
    return torch.where((x > -3) & (x < 3), v / 6, 0)  # (1)


def _exact(input: Tensor, inplace: bool = False) -> Tensor:
    """Torch's values, with the derivative that its own float64 kernel misses."""
    inside = (input > -3) & (input < 3)
    return torch.where(
        inside, in_pieces(lambda x: (x + 3) / 6, input), F.hardsigmoid(input).detach().round()
    )


_hardsigmoid = entry(HardsigmoidFunction, again=HardsigmoidFunction.forward)


@public
def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    r"""Hard sigmoid, elementwise: :math:`y = \min(\max(x + 3, 0), 6) / 6`.

    Args:
        input: Any shape ``(*)``, floating point.
        inplace: Write the result into ``input``.

    Returns:
        Tensor of the shape and dtype of ``input``; values are in ``[0, 1]``.

    Raises:
        TypeError: ``input`` is not a tensor.
        RuntimeError: ``input`` is no floating-point tensor, or ``inplace`` on a leaf that requires grad.

    Example:
        >>> import torch
        >>> from torchbp.functional import hardsigmoid
        >>> hardsigmoid(torch.tensor([-4.0, 0.0, 1.5]))
        tensor([0.0000, 0.5000, 0.7500])
    """
    if inplace:
        return overwrite(_hardsigmoid, input)
    return _hardsigmoid(input)


class Hardsigmoid(nn.Hardsigmoid):
    """Module form of :func:`hardsigmoid`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return hardsigmoid(input, self.inplace)


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield Hardsigmoid, Sample(), Sample((make.normal(3, 4),))
    x = make.normal(3, 4, requires_grad=False)
    yield Hardsigmoid, Sample((), {"inplace": True}), Sample((x,), name="inplace")


OP = Op(
    function=hardsigmoid,
    modules=(Hardsigmoid,),
    reference=_exact,
    samples=_samples.elementwise,
    module_samples=_module_samples,
    errors=_samples.elementwise_errors,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=_samples.square,
    elementwise=True,
    fused="aten::hardsigmoid_backward",
)
