r"""RReLU: y = x where x > 0, else r · x; in training each r is drawn from U(lower, upper), else it is their mean.

Derivation, with the slopes m = 1 where x > 0, else r:
    y      = m · x                                                                             (1)
    grad_x = m · grad_y                                                                        (2)

Saves:
    In training m: 4 bytes per float32 element; torch keeps m and x, 8 bytes.   Else what leaky ReLU saves.

Edge values:
    x = 0: the subgradient r, as in torch.   NaN gives NaN.

Randomness:
    Reproducible under ``torch.manual_seed``, on every device; the stream is torch's for few elements on the CPU alone.

Sources:
    Xu, Wang, Chen, Li, "Empirical Evaluation of Rectified Activations in Convolutional Network", 2015,
    arXiv:1505.00853.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _nn  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._errors import wrong
from torchbp.ops._function import Context, as_dtype, entry, is_half, public, visible, widened
from torchbp.ops._one_kernel import in_one_kernel
from torchbp.ops._op import Op
from torchbp.ops._random import int32_of
from torchbp.ops._samples import Make, Sample
from torchbp.ops.activations.leaky_relu import leaky_relu
from torchbp.ops.kernels import in_one_loop

__all__ = ["RReLU", "RReLUFunction", "rrelu", "rrelu_"]

_FEW = 1 << 10  # elements


class RReLUFunction(Function):
    """Product with drawn slopes. Call it through :func:`rrelu`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # (*), (*) -> (*)
        x: Tensor, slopes: Tensor, bounds: tuple[float, float] | None, inplace: bool
    ) -> Tensor:
        if bounds is not None:  # the kernel draws the slopes, too
            return _nn.rrelu_with_noise(x, slopes, *bounds, True)
        return x.mul_(slopes) if inplace else x * slopes  # (1)

    @staticmethod
    def setup_context(
        ctx: Context,
        inputs: tuple[Tensor, Tensor, tuple[float, float] | None, bool],
        output: Tensor,
    ) -> None:
        x, slopes, _, inplace = inputs
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(slopes)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return grad_y * slopes, None, None, None  # (2)

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, *_: None) -> Tensor:
        (slopes,) = ctx.saved_tensors
        return tangent_x * slopes


def _draw(x: Tensor, lower: float, upper: float) -> Tensor:
    """Return the slopes m of ``x``."""
    x = x.detach()
    if _is_few(x):
        wide = widened(x)
        # contiguous: drawn in the order of the indices, whatever the strides of x
        slopes = torch.empty_like(wide, memory_format=torch.contiguous_format)
        _nn.rrelu_with_noise(wide, slopes, lower, upper, True)  # two calls instead of ten
        return as_dtype(slopes, x.dtype)
    bits = int32_of(x.shape) if visible(x) else None
    if bits is not None:
        with torch.no_grad():
            slopes = in_one_loop(partial(_slopes_of_bits, lower=lower, upper=upper), x, bits)
        if slopes is not None:
            return slopes
    uniform = _uniform(x, bits)
    if x.is_cuda:
        with torch.no_grad():
            slopes = in_one_kernel(partial(_slopes, lower=lower, upper=upper), x, uniform)
        if slopes is not None:
            return slopes
    drawn = uniform.mul_(upper - lower).add_(lower)
    if not visible(x):
        return torch.where(x <= 0, drawn, 1)
    # A mask and torch.where take ten times as long as these kernels: 1 where x > 0, else -1; then 1 or drawn.
    sign = F.threshold(x, 0, -1).sign_()
    return torch._prelu_kernel(sign, drawn.neg_())


def _slopes(x: Tensor, uniform: Tensor, *, lower: float, upper: float) -> Tensor:
    return torch.where(x <= 0, uniform * (upper - lower) + lower, 1)


def _slopes_of_bits(x: Tensor, bits: Tensor, *, lower: float, upper: float) -> Tensor:
    return _slopes(x, bits * 2**-32 + 0.5, lower=lower, upper=upper)


def _is_few(x: Tensor) -> bool:
    """Whether torch's kernel, which draws one number after the other, is faster."""
    return visible(x) and x.numel() <= _FEW and x.is_floating_point()


def _uniform(x: Tensor, bits: Tensor | None = None) -> Tensor:
    """Draw from U(0, 1), whatever the strides of ``x``; ``bits`` is what has been drawn for it already."""
    if visible(x):
        wide = torch.float32 if is_half(x) else x.dtype
        bits = int32_of(x.shape) if bits is None else bits
        return bits.to(wide).mul_(2**-32).add_(0.5).to(x.dtype)
    return torch.rand_like(x, memory_format=torch.contiguous_format)


def _again(x: Tensor, slopes: Tensor, _bounds: object, inplace: bool) -> Tensor:
    return RReLUFunction.forward(x, slopes, None, inplace)


_rrelu = entry(RReLUFunction, again=_again)


@public
def rrelu(
    input: Tensor,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    r"""Randomized leaky ReLU, elementwise: :math:`y = x` where :math:`x > 0`, else :math:`r x`, :math:`r` random.

    Args:
        input: Any shape ``(*)``, floating point.
        lower: The least slope.
        upper: The greatest slope.
        training: Draw the slopes; else their mean serves as the slope of a leaky ReLU.
        inplace: Write the result into ``input``.

    Returns:
        Tensor of the shape and dtype of ``input``.

    Raises:
        AttributeError: ``input`` is not a tensor.
        RuntimeError: ``lower`` is greater than ``upper``, or ``inplace`` on a leaf that requires grad.
        NotImplementedError: ``input`` is no floating-point tensor.

    Example:
        >>> import torch
        >>> from torchbp.functional import rrelu
        >>> rrelu(torch.tensor([-1.0, 2.0]), 0.25, 0.75)
        tensor([-0.5000,  2.0000])
    """
    if lower > upper:
        raise RuntimeError(
            wrong("rrelu", "lower <= upper", f"{lower} and {upper}", "exchange them")
        )
    if not inplace:
        input = input.contiguous()  # as torch's result is
    if not training:
        return leaky_relu(input, (lower + upper) / 2, inplace)
    if not inplace and _is_few(input) and not is_half(input):
        return _rrelu(input, torch.empty_like(input), (lower, upper), False)
    return _rrelu(input, _draw(input, lower, upper), None, inplace)


@public
def rrelu_(
    input: Tensor, lower: float = 1.0 / 8, upper: float = 1.0 / 3, training: bool = False
) -> Tensor:
    """In-place form of :func:`rrelu`."""
    return rrelu(input, lower, upper, training, inplace=True)


class RReLU(nn.RReLU):
    """Module form of :func:`rrelu`; slopes are drawn in training mode only."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return rrelu(input, self.lower, self.upper, self.training, self.inplace)


def _reference(
    input: Tensor, lower: float = 1.0 / 8, upper: float = 1.0 / 3, training: bool = False
) -> Tensor:
    """The definition; the slopes are drawn before, as the op draws them."""
    if not training:
        return F.rrelu(input, lower, upper)
    if _is_few(input):
        wide = widened(input)
        return F.rrelu(wide, lower, upper, True).to(input.dtype)
    drawn = lower + (upper - lower) * _uniform(input)
    return torch.where(input > 0, input, drawn * input)


def _all_samples(make: Make) -> Iterator[Sample]:
    for sample in _samples.elementwise(make):
        yield Sample(sample.args, {"training": True}, sample.name)
    yield Sample((make.normal(3, 4), 0.2, 0.9, True), name="bounds")
    yield Sample((make.normal(3, 4),), name="eval")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield RReLU, Sample(), Sample((make.normal(3, 4),))
    x = make.normal(3, 4, requires_grad=False)
    yield RReLU, Sample((0.1, 0.2), {"inplace": True}), Sample((x,), name="inplace")


def _errors(make: Make) -> Iterator[Sample]:
    yield Sample((make.normal(3), 0.5, 0.2), name="order")
    yield Sample((make.normal(3), 0.5, 0.2, True), name="order-training")


def _benchmark(make: Make, n: int) -> Sample:
    return Sample(_samples.square(make, n).args, {"training": True})


OP = Op(
    function=rrelu,
    modules=(RReLU,),
    reference=_reference,
    samples=_all_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=_benchmark,
    elementwise=True,
    random=True,
)
