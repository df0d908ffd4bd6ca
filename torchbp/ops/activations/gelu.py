r"""GELU: y = x · Φ(x), Φ the distribution function of the standard normal, or its tanh approximation.

Derivation:
    "none", with φ(x) = exp(-x²/2) / √(2π):
    dy/dx  = Φ(x) + x · φ(x),                 Φ(x) = erfc(-x/√2) / 2                           (1)
    "tanh", with u = √(2/π) · (x + c x³), c = 0.044715 and (1 + tanh u)/2 = σ(2u):
    dy/dx  = σ(2u) + x · σ(2u) · σ(-2u) · 2u',   u' = √(2/π) · (1 + 3c x²)                     (1')
    grad_x = grad_y · dy/dx                                                                    (2)

Saves:
    x, in its own dtype: 4 bytes per float32 element, as torch.

Edge values:
    x → +∞: y → x, dy/dx → 1.   x → -∞: y → 0, dy/dx → 0; torch gives NaN at x = -∞, and as derivative at ±∞.

Sources:
    Hendrycks, Gimpel, "Gaussian Error Linear Units (GELUs)", 2016, arXiv:1606.08415.
"""

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.compiler import is_dynamo_compiling

from torchbp.ops import _samples
from torchbp.ops._errors import wrong
from torchbp.ops._function import Context, entry, fused, kernel, public
from torchbp.ops._op import Op
from torchbp.ops._pieces import in_pieces
from torchbp.ops._samples import Make, Sample
from torchbp.ops.activations._infinities import (
    at_once,
    bounded,
    known_finite,
    limited,
    value,
    with_limits,
)
from torchbp.ops.kernels import many

__all__ = ["GELU", "GELUFunction", "gelu"]

_gelu_backward = kernel("gelu_backward")
_sigmoid_backward_into = kernel("sigmoid_backward", "grad_input")

_SQRT_HALF = math.sqrt(0.5)
_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
_DENSITY_AT_0 = 1 / math.sqrt(2 * math.pi)
_CUBIC = 0.044715
_LOG2_E = math.log2(math.e)
_FEW = 128  # elements
_TENSORS = (Tensor, nn.Parameter)


class GELUFunction(Function):
    """GELU with a hand-written derivative. Call it through :func:`gelu`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, approximate: str, finite: bool | None) -> Tensor:  # x, y: (*)
        few = approximate == "none" and type(x) in _TENSORS and _is_few(x)
        if few:
            return limited(F.gelu(x.double()).float(), x, finite)
        formula = _value_of_erf if approximate == "none" else _value_of_tanh
        loop = approximate == "tanh"  # for erf oneDNN takes 0.7 to 0.85 of its time, in every dtype
        return value(partial(F.gelu, approximate=approximate), x, finite, formula, loop=loop)

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, str, bool | None], output: Tensor
    ) -> None:
        x, ctx.approximate, ctx.finite = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        derivative, into = _DERIVATIVES[ctx.approximate]
        if x.is_cuda or many(x):
            one = derivative if x.is_cuda else _IN_A_LOOP[ctx.approximate]
            grad_x = at_once(one, grad_y, x)  # (2)
            if grad_x is not None:
                return grad_x, None, None
        if fused(grad_y, x):
            if ctx.approximate == "none" and _is_few(x):
                return with_limits(_backward_of_few, grad_y, x, ctx.finite), None, None
            backward = partial(_gelu_backward, approximate=ctx.approximate)
            return with_limits(backward, grad_y, x, ctx.finite), None, None
        return in_pieces(derivative, grad_y, bounded(x), into=into, spare=1), None, None  # (2)

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, *_: None) -> Tensor:
        (x,) = ctx.saved_tensors
        return in_pieces(_DERIVATIVES[ctx.approximate][0], tangent_x, bounded(x))


def _is_few(x: Tensor) -> bool:
    """Whether float64 is faster: to oneDNN, float32's kernel, a few elements are 7 and 14 µs; so 5 and 7, and exact."""
    return x.dtype is torch.float32 and x.is_cpu and not is_dynamo_compiling() and x.numel() <= _FEW


def _backward_of_few(grad_y: Tensor, x: Tensor) -> Tensor:
    return _gelu_backward(grad_y.double(), x.double(), approximate="none").float()


def _value_of_erf(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(_SQRT_HALF * x))


def _value_of_tanh(x: Tensor) -> Tensor:
    k = 2 * _SQRT_2_OVER_PI
    return x / (1 + torch.exp(-(x * (k + k * _CUBIC * (x * x)))))  # (1 + tanh u)/2 = σ(2u)


def _of_erf(v: Tensor, x: Tensor) -> Tensor:
    cdf = 0.5 * torch.erfc(-_SQRT_HALF * x)  # erfc keeps the left tail, where 1 + erf cancels
    return v * (cdf + x * torch.exp(-0.5 * x * x) * _DENSITY_AT_0)  # (1)


def _of_tanh(v: Tensor, x: Tensor) -> Tensor:
    double_u = 2 * _SQRT_2_OVER_PI * (x + _CUBIC * x * x * x)
    slope = 2 * _SQRT_2_OVER_PI * (1 + 3 * _CUBIC * x * x)
    s = torch.sigmoid(double_u)
    return v * (s * (1 + x * torch.sigmoid(-double_u) * slope))  # (1')


def _erf_in_a_loop(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return Φ(x) and dy/dx, both by one exponential: erfc(z) = exp(-z²) erfcx(z)."""
    e = torch.exp(-0.5 * (x * x))
    tail = 0.5 * torch.special.erfcx(_SQRT_HALF * x.abs()) * e
    cdf = torch.where(x < 0, tail, 1 - tail)
    return cdf, cdf + x * e * _DENSITY_AT_0  # (1)


def _tanh_in_a_loop(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return σ(2u) and dy/dx, both by one exponential."""
    k, square = 2 * _SQRT_2_OVER_PI, x * x
    e = torch.exp(-(x * (k + k * _CUBIC * square)).abs())
    s = e / (1 + e)  # σ(-2|u|), whose complement is exact
    share = torch.where(x < 0, s, 1 - s)
    return share, share + x * (k + 3 * k * _CUBIC * square) * (s - s * s)  # (1')


def _of_erf_in_a_loop(v: Tensor, x: Tensor) -> Tensor:
    return v * _erf_in_a_loop(x)[1]


def _of_tanh_in_a_loop(v: Tensor, x: Tensor) -> Tensor:
    return v * _tanh_in_a_loop(x)[1]


def _of_erf_into(grad_x: Tensor, density: Tensor, v: Tensor, x: Tensor) -> None:
    # exp2 takes a third of exp's time, and half precision does not see the difference
    torch.mul(x, x, out=density).mul_(-0.5 * _LOG2_E).exp2_().mul_(x)
    cdf = torch.mul(x, -_SQRT_HALF, out=grad_x).erfc_().mul_(0.5)
    cdf.add_(density, alpha=_DENSITY_AT_0).mul_(v)  # (1)


def _of_tanh_into(grad_x: Tensor, slope: Tensor, v: Tensor, x: Tensor) -> None:
    k = 2 * _SQRT_2_OVER_PI
    torch.mul(x, x, out=slope)
    s = torch.mul(slope, k * _CUBIC, out=grad_x).add_(k).mul_(x).sigmoid_()
    slope.mul_(3 * k * _CUBIC).add_(k).mul_(x)
    s.add_(_sigmoid_backward_into(slope, s, grad_input=slope)).mul_(v)  # (1')


_DERIVATIVES = {"none": (_of_erf, _of_erf_into), "tanh": (_of_tanh, _of_tanh_into)}
_IN_A_LOOP = {"none": _of_erf_in_a_loop, "tanh": _of_tanh_in_a_loop}


_gelu = entry(GELUFunction, again=GELUFunction.forward)


@public
def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    r"""Gaussian error linear unit, elementwise: :math:`y = x \Phi(x)`.

    Args:
        input: Any shape ``(*)``, floating point.
        approximate: ``"none"`` for :math:`\Phi`, ``"tanh"`` for the approximation.

    Returns:
        Tensor of the shape and dtype of ``input``.

    Raises:
        TypeError: ``input`` is not a tensor.
        RuntimeError: ``input`` is no floating-point tensor, or ``approximate`` is unknown.

    Example:
        >>> import torch
        >>> from torchbp.functional import gelu
        >>> gelu(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([-0.1587,  0.0000,  1.9545])
    """
    if approximate not in _DERIVATIVES:
        rule = "approximate to be 'none' or 'tanh'"
        raise RuntimeError(wrong("gelu", rule, repr(approximate), "pass one of the two"))
    return _gelu(input, approximate, known_finite(input, loop=approximate == "tanh"))


class GELU(nn.GELU):
    """Module form of :func:`gelu`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, approximate=self.approximate)


def _all_samples(make: Make) -> Iterator[Sample]:
    yield from _samples.elementwise(make)
    yield Sample((make.normal(3, 4),), {"approximate": "tanh"}, name="tanh")
    yield Sample((make.normal(2, 3, 2),), {"approximate": "tanh"}, name="2x3x2-tanh")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield GELU, Sample(), Sample((make.normal(3, 4),))
    yield GELU, Sample((), {"approximate": "tanh"}), Sample((make.normal(3, 4),), name="arguments")


OP = Op(
    function=gelu,
    modules=(GELU,),
    reference=F.gelu,
    samples=_all_samples,
    module_samples=_module_samples,
    errors=_samples.elementwise_errors,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=_samples.square,
    elementwise=True,
    own_value=True,
    limits={math.inf: (math.inf, 1.0), -math.inf: (0.0, 0.0)},
    fused="aten::gelu_backward",
)
