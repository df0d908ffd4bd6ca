r"""Mish: y = x · tanh(softplus(x)).

Derivation:
    with u = exp(x) and m = u + u²/2:  tanh(log(1 + u)) = ((1 + u)² - 1) / ((1 + u)² + 1) = m / (m + 1)
    y      = x · m / (m + 1),   dm/dx = u + u² = u (1 + u)
    dy/dx  = m / (m + 1) + x · u (1 + u) / (m + 1)²                                            (1)
    grad_x = grad_y · dy/dx                                                                    (2)
    Above x = 40 the quotients are 1 and 0 to the last place of float64; exp is cut there, so that m does not overflow.

Saves:
    x, in its own dtype: 4 bytes per float32 element, as torch.

Edge values:
    x → +∞: y → x, dy/dx → 1.   x → -∞: y → 0, dy/dx → 0; torch gives NaN at x = -∞, and as derivative at ±∞.

Sources:
    Misra, "Mish: A Self Regularized Non-Monotonic Neural Activation Function", 2019, arXiv:1908.08681.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _nn  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._function import (
    Context,
    entry,
    fused,
    kernel,
    overwrite,
    public,
    transforms_active,
    undifferentiated,
    visible,
    visible_in_backward,
)
from torchbp.ops._invalid import INVALID, raised, sound
from torchbp.ops._op import Op
from torchbp.ops._pieces import in_pieces
from torchbp.ops._samples import Make, Sample
from torchbp.ops.activations._infinities import (
    FAR,
    at_once,
    bounded,
    mended,
    value,
)
from torchbp.ops.kernels import in_one_loop, many

__all__ = ["Mish", "MishFunction", "mish"]

_mish_backward = kernel("mish_backward")
_FEW = (
    1 << 12
)  # elements; up to these torch's kernels, two and not twenty, take less time, and one thread runs them
_LOG2_E = math.log2(math.e)


class MishFunction(Function):
    """Mish with a hand-written derivative. Call it through :func:`mish`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # x, y: (*)
        if isinstance(x, Tensor) and visible(x) and x.numel() <= _FEW:
            y = _nn.mish(x)
            # Written out as in backward: a function in common would take 0.6 µs more, there and back.
            return y if not raised(INVALID) or sound(y) else mended(y, x)
        # What is no tensor torch's refuses.
        if isinstance(x, Tensor) and many(x, _FEW + 1) and x.is_cpu:
            y = in_one_loop(_by_one_exponential, x)
            if y is not None:
                return y
            return in_pieces(lambda x: mended(_nn.mish(x), x), x, into=_value_into, spare=1)
        return value(_nn.mish, x, False, _value)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor], output: Tensor) -> None:
        (x,) = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if visible_in_backward(x) and x.numel() <= _FEW:
            grad_x = _mish_backward(grad_y, x)
            if not raised(INVALID) or (fused(grad_y, half=True) and sound(grad_x)):
                return grad_x
            return _mish_backward(grad_y, bounded(x))
        if x.is_cuda:
            grad_x = at_once(_times_derivative, grad_y, x)  # (2)
            if grad_x is not None:
                return grad_x
        few = not (many(x, _FEW + 1) and x.is_cpu)
        if few and undifferentiated() and not transforms_active():  # it has no rule for vmap
            return _mish_backward(grad_y, bounded(x))
        into = _times_derivative_into
        return in_pieces(_times_derivative, grad_y, x, into=into, spare=2)  # (2)

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return in_pieces(_times_derivative, tangent_x, x)


def _value(x: Tensor) -> Tensor:
    return x * torch.tanh(torch.log1p(torch.exp(x)))


def _by_one_exponential(x: Tensor) -> Tensor:
    u = torch.exp(x.clamp(max=40))
    m = u + 0.5 * u * u
    return x.clamp(min=-FAR) * (m / (m + 1))  # not -∞ · 0


def _value_into(y: Tensor, u: Tensor, x: Tensor) -> None:
    torch.clamp(x, max=40, out=u).exp_()
    m = torch.addcmul(u, u, u, value=0.5, out=y)
    m.div_(torch.add(m, 1, out=u)).mul_(torch.clamp(x, min=-FAR, out=u))  # not -∞ · 0


def _times_derivative(v: Tensor, x: Tensor) -> Tensor:
    x = bounded(x)
    u = torch.exp(x.clamp(max=40))
    m = u + 0.5 * u * u
    return v * ((m + x * (u * (1 + u) / (m + 1))) / (m + 1))  # (1)


def _times_derivative_into(grad_x: Tensor, c: Tensor, m: Tensor, v: Tensor, x: Tensor) -> None:
    torch.clamp(x, -FAR, 40, out=c)
    # exp2 takes a third of exp's time here, and costs 0.03 of 1.0 ulp of mean error
    u = torch.exp2(torch.mul(c, _LOG2_E, out=grad_x), out=grad_x)
    torch.addcmul(u, u, u, value=0.5, out=m)
    slope = u.addcmul_(u, u).mul_(c)  # u (1 + u) x
    m1 = torch.add(m, 1, out=c)
    torch.addcdiv(m, slope, m1, out=slope).div_(m1).mul_(v)  # (1)


_mish = entry(MishFunction, again=MishFunction.forward)


@public
def mish(input: Tensor, inplace: bool = False) -> Tensor:
    r"""Mish, elementwise: :math:`y = x \tanh(\log(1 + e^x))`.

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
        >>> from torchbp.functional import mish
        >>> mish(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([-0.3034,  0.0000,  1.9440])
    """
    if inplace:
        return overwrite(_mish, input)
    return _mish(input)


class Mish(nn.Mish):
    """Module form of :func:`mish`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return mish(input, self.inplace)


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield Mish, Sample(), Sample((make.normal(3, 4),))
    x = make.normal(3, 4, requires_grad=False)
    yield Mish, Sample((), {"inplace": True}), Sample((x,), name="inplace")


OP = Op(
    function=mish,
    modules=(Mish,),
    reference=F.mish,
    samples=_samples.elementwise,
    module_samples=_module_samples,
    errors=_samples.elementwise_errors,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=_samples.square,
    elementwise=True,
    own_value=True,
    limits={math.inf: (math.inf, 1.0), -math.inf: (0.0, 0.0)},
)
