r"""Local response normalization: y = x · n^(-β), n_c = k + α/size · Σ x_j² over the channels j in the window W(c).

W(c) is the "size" channels from c - ⌊size/2⌋ to c + ⌊(size - 1)/2⌋, as far as there are channels.

Derivation, position by position:
    ∂y_c/∂x_i = δ_ci n_c^(-β) - 2αβ/size · x_c n_c^(-β-1) x_i   if i ∈ W(c);   with h_c = grad_y_c · x_c · n_c^(-β-1):
    grad_x_i  = grad_y_i · n_i^(-β) - 2αβ/size · x_i · Σ h_c over the c with i ∈ W(c)         (1)
    tangent_y_c = t_c · n_c^(-β) - 2αβ/size · x_c n_c^(-β-1) · Σ x_j t_j over j ∈ W(c),   t = tangent_x      (2)
    The windows that i is in are the mirror image of the window of i: c from i - ⌊(size - 1)/2⌋ to i + ⌊size/2⌋.

Saves:
    x (4 bytes per float32 element, 2 in half precision); torch keeps 16.5.

Edge values:
    x² overflows (1e30 in float32): in float64.   ±inf or NaN: NaN there, 0 or NaN in the window, as in torch.

Sources:
    Krizhevsky, Sutskever, Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", 2012, NIPS 25.
"""

import math
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._autocast import autocasts
from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import Context, entry, followed, fused, in_float32, is_half, public
from torchbp.ops._op import Op, rounded_once
from torchbp.ops._range import in_float64, in_range
from torchbp.ops._samples import Make, Sample

__all__ = ["LocalResponseNorm", "LocalResponseNormFunction", "local_response_norm"]


class LocalResponseNormFunction(Function):
    """Local response normalization with hand-written gradients. Call it through :func:`local_response_norm`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # (N, C, *) -> (N, C, *)
        x: Tensor, size: int, alpha: float, beta: float, k: float
    ) -> Tensor:
        return in_float32(lambda x: x * _divisor(x, size, alpha, k) ** -beta, x)

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, int, float, float, float], output: Tensor
    ) -> None:
        x, *ctx.rule = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        return (
            in_float32(lambda g, x: _gradient(g, x, *ctx.rule), grad_y, x),
            None,
            None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, *_: None) -> Tensor:
        (x,) = ctx.saved_tensors
        return in_float32(lambda t, x: _tangent(t, x, *ctx.rule), tangent_x, x)


def _gradient(g: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    n = _divisor(x, size, alpha, k)
    scaled = g * n**-beta
    factor = 2 * alpha * beta / size
    if factor == 0:
        return scaled  # n, which does not depend on x, may be 0
    if fused(g, x):
        windows = _window_sum((scaled * x).div_(n), size, mirrored=True)
        return scaled.addcmul_(windows, x, value=-factor)  # (1)
    return scaled - factor * x * _window_sum(scaled * x / n, size, mirrored=True)  # (1)


def _tangent(t: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    n = _divisor(x, size, alpha, k)
    if alpha * beta == 0:
        return t * n**-beta
    change = 2 * alpha * beta / size * _window_sum(x * t, size) / n
    return (t - x * change) * n**-beta  # (2)


def _divisor(x: Tensor, size: int, alpha: float, k: float) -> Tensor:
    total = _window_sum(x * x, size)
    return total * (alpha / size) + k if followed() else total.mul_(alpha / size).add_(k)


def _window_sum(t: Tensor, size: int, mirrored: bool = False) -> Tensor:
    """Sum over each channel's window, (N, C, *) -> (N, C, *); ``mirrored``: over the windows that it is in."""
    before, after = size // 2, (size - 1) // 2
    if mirrored:
        before, after = after, before
    channels = t.shape[1]
    total, write = t.clone(), not followed()
    for offset in range(max(-before, 1 - channels), min(after, channels - 1) + 1):
        if offset:
            count = channels - abs(offset)
            low, high = max(0, -offset), max(0, offset)
            part = t.narrow(1, high, count)
            if write:
                total.narrow(1, low, count).add_(part)
            else:
                total = total + nn.functional.pad(part, (*(0, 0) * (t.dim() - 2), low, high))
    return total


_local_response_norm = entry(LocalResponseNormFunction, again=LocalResponseNormFunction.forward)


@public
def local_response_norm(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    r"""Normalize across neighbouring channels: :math:`y = x (k + \alpha \, \overline{x^2})^{-\beta}`.

    Args:
        input: ``(N, C, *)`` of at least three dimensions, floating point.
        size: Number of neighbouring channels in the window.
        alpha: Factor of the mean square over the window; outside the channels there are zeros.
        beta: Exponent.
        k: Added to the scaled mean square.

    Returns:
        Tensor of the shape and dtype of ``input``.

    Raises:
        ValueError: ``input`` has fewer than three dimensions.
        RuntimeError: ``size`` is below 1.
        NotImplementedError: Complex input, and integers of more than three dimensions.

    Example:
        >>> import torch
        >>> from torchbp.functional import local_response_norm
        >>> local_response_norm(torch.tensor([[[1.0], [2.0]]]), 2, alpha=2.0, beta=1.0, k=0.0)
        tensor([[[1.0000],
                 [0.4000]]])
    """
    if input.dim() < 3:
        rule = "input of shape (N, C, *) of at least 3 dimensions"
        raise ValueError(wrong("local_response_norm", rule, shape(input), "unsqueeze it"))
    if input.numel() == 0:
        return input
    if size < 1:
        rule = "size of at least 1"
        raise RuntimeError(wrong("local_response_norm", rule, size, "it counts channels"))
    if (
        not input.is_floating_point()
    ):  # no gradient; torch takes integers of three dimensions, rounding their means
        return F.local_response_norm(input, size, alpha, beta, k)
    pooled = input.dim() > 3 or not input.is_cpu  # by an op of torch that autocast casts for
    if pooled and is_half(input) and autocasts(input.device.type):
        input = input.float()
    y = _local_response_norm(input, size, alpha, beta, k)
    return y if in_range(input) else in_float64(local_response_norm, input, size, alpha, beta, k)


class LocalResponseNorm(nn.LocalResponseNorm):
    """Module form of :func:`local_response_norm`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return local_response_norm(input, self.size, self.alpha, self.beta, self.k)


def _samples(make: Make) -> Iterator[Sample]:
    strong = {"alpha": 0.9}
    yield Sample((make.normal(2, 4, 3), 3), strong, name="odd")
    yield Sample((make.normal(2, 4, 2, 2), 2), strong, name="even")
    yield Sample((make.normal(1, 3, 2, 1, 2), 4, 0.9, 0.5, 2.0), name="beta-k")
    yield Sample((make.normal(2, 3, 2), 9, 0.9), name="wide")
    yield Sample((make.normal(2, 3, 2), 1, 0.9), name="one")
    yield Sample((make.normal(2, 3, 2), 5), name="default")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield LocalResponseNorm, Sample((2,)), Sample((make.normal(2, 4, 3),))
    kwargs = {"alpha": 0.5, "beta": 1.0, "k": 2.0}
    yield LocalResponseNorm, Sample((3,), kwargs), Sample((make.normal(2, 4, 2, 2),), name="4d")


def _errors(make: Make) -> Iterator[Sample]:
    yield Sample((make.normal(4, 3), 2), name="dimensions")
    yield Sample((make.normal(4, 3, 2), 0), name="size")


def _benchmark(make: Make, n: int) -> Sample:
    side = max(1, math.isqrt(n // 512))
    return Sample((make.normal(8, 64, side, side), 5))


OP = Op(
    function=local_response_norm,
    modules=(LocalResponseNorm,),
    reference=rounded_once(F.local_response_norm),  # torch has no half precision of four dimensions
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=_benchmark,
)
