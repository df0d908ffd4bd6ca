r"""Hardswish: y = x · min(max(x + 3, 0), 6) / 6.

Derivation:
    dy/dx  = 0 where x ≤ -3,  1 where x ≥ 3,  else x/3 + 1/2                                   (1)
    grad_x = grad_y · dy/dx                                                                    (2)

Saves:
    x, in its own dtype: 4 bytes per float32 element, as torch.

Edge values:
    x = ±3: the subgradients 0 and 1, those of the outer pieces.   x → -∞: y → 0; torch gives NaN.
    NaN: dy/dx is 1, as in torch.

Sources:
    Howard et al., "Searching for MobileNetV3", 2019, arXiv:1905.02244.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, get_num_threads, nn
from torch._C import _nn  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._function import Context, entry, kernel, overwrite, public, undifferentiated
from torchbp.ops._invalid import at_hand_of_all
from torchbp.ops._op import Op
from torchbp.ops._pieces import in_pieces
from torchbp.ops._samples import Make, Sample
from torchbp.ops.activations._infinities import bounded, known_finite, value
from torchbp.ops.activations.hardsigmoid import rounds_a_sixth
from torchbp.ops.kernels import listed, many

__all__ = ["Hardswish", "HardswishFunction", "hardswish"]

_hardswish_backward = kernel("hardswish_backward")


class HardswishFunction(Function):
    """Hardswish with a hand-written derivative. Call it through :func:`hardswish`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, finite: bool | None) -> Tensor:  # x, y: (*)
        if _is_looped(x):
            return value(_value, x, finite, _by_six, loop=True)
        return value(_value, x, finite, _formula)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, bool | None], output: Tensor) -> None:
        x, _ = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if undifferentiated():
            return _hardswish_backward(grad_y, x), None  # right at ±∞, too
        return in_pieces(_times_derivative, grad_y, bounded(x)), None  # (2)

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, _: None) -> Tensor:
        (x,) = ctx.saved_tensors
        return in_pieces(_times_derivative, tangent_x, bounded(x))


def _is_looped(x: Tensor) -> bool:
    """Whether float32, too, goes through a loop: on several threads, where only a look at x would tell of ±∞."""
    if not (isinstance(x, Tensor) and x.is_cpu and x.dtype is torch.float32):
        return False
    if listed():
        return True
    return many(x) and get_num_threads() > 1 and not at_hand_of_all(x.numel())


def _value(x: Tensor) -> Tensor:
    if rounds_a_sixth(x):
        return x * (x + 3).clamp(0, 6) / 6
    return _nn.hardswish(x)


def _formula(x: Tensor) -> Tensor:
    return x * (x + 3).clamp(0, 6) * (1 / 6)  # as torch's in half precision, to the bit


def _by_six(x: Tensor) -> Tensor:
    return x * (x + 3).clamp(0, 6) / 6  # as torch's in float32 on the CPU, to the bit


def _times_derivative(v: Tensor, x: Tensor) -> Tensor:
    middle = v * (x / 3 + 0.5)
    return torch.where(x <= -3, 0, torch.where(x < 3, middle, v))  # (1)


def _reference(input: Tensor, inplace: bool = False) -> Tensor:
    """Torch's, or where that is rounded the definition."""
    if not rounds_a_sixth(input):
        return F.hardswish(input, inplace)
    nan = input.isnan()  # for which relu6 has another derivative
    known = input.masked_fill(nan, 0)
    return torch.where(nan, F.hardswish(input), known * F.relu6(known + 3) / 6)


_hardswish = entry(HardswishFunction, again=HardswishFunction.forward)


@public
def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    r"""Hard swish, elementwise: :math:`y = x \min(\max(x + 3, 0), 6) / 6`.

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
        >>> from torchbp.functional import hardswish
        >>> hardswish(torch.tensor([-4.0, 1.0, 4.0]))
        tensor([-0.0000, 0.6667, 4.0000])
    """
    if inplace:
        return overwrite(_hardswish, input, known_finite(input, loop=True))
    return _hardswish(input, known_finite(input, loop=True))


class Hardswish(nn.Hardswish):
    """Module form of :func:`hardswish`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return hardswish(input, self.inplace)


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield Hardswish, Sample(), Sample((make.normal(3, 4),))
    x = make.normal(3, 4, requires_grad=False)
    yield Hardswish, Sample((), {"inplace": True}), Sample((x,), name="inplace")


OP = Op(
    function=hardswish,
    modules=(Hardswish,),
    reference=_reference,
    samples=_samples.elementwise,
    module_samples=_module_samples,
    errors=_samples.elementwise_errors,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=_samples.square,
    elementwise=True,
    limits={-math.inf: (0.0, 0.0)},
    fused="aten::hardswish_backward",
)
