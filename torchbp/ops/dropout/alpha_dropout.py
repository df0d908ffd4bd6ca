r"""Alpha dropout: y = a · (x · m + α' · (1 - m)) + b, where each m is 0 with probability p, else 1.

α' = -λ α = -1.758..., what SELU tends to on its negative side, takes the place of what is dropped; a and b keep mean 0
and variance 1:
    a = 1 / √((1 - p) (1 + p α'²)),   b = -a · p · α'                                         (1)
A channel of a sample may share one m (feature_alpha_dropout).

Derivation:
    y = a · x + b where kept, a · α' + b where dropped                                        (2)
    grad_x = grad_y · m · a                                                                   (3)

Saves:
    m as one byte an element, or a channel of a sample; torch keeps a number of x's dtype for each. Of less than 4096
    float32 or float64 on the CPU a number, too, as of dropout.

Edge values:
    p = 0, or not training: y is x itself.   p = 1: y is x · 0.   ±inf or NaN: NaN where dropped, as in torch.

Randomness:
    As of dropout: reproducible under ``torch.manual_seed``, on every device; the stream is not torch's.

Sources:
    Klambauer, Unterthiner, Mayr, Hochreiter, "Self-Normalizing Neural Networks", 2017, arXiv:1706.02515.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import Context, entry, in_float32, public
from torchbp.ops._numbers import constant
from torchbp.ops._one_kernel import in_one_kernel
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample
from torchbp.ops.dropout._mask import draw, draw_few, is_few, is_identity, masked, one_kernel
from torchbp.ops.kernels import in_one_loop, many

__all__ = [
    "AlphaDropout",
    "AlphaDropoutFunction",
    "FeatureAlphaDropout",
    "alpha_dropout",
    "feature_alpha_dropout",
]

_FEW = 1 << 12  # elements
_SATURATION = -1.0507009873554804934193349852946 * 1.6732632423543772848170429916717  # -λ α of SELU


class AlphaDropoutFunction(Function):
    """Choice between an affine map and a constant. Call it through :func:`alpha_dropout`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # (*), and what can be expanded to it -> (*)
        x: Tensor, mask: Tensor, a: float, b: float, inplace: bool
    ) -> Tensor:
        y = None
        if x.is_cuda:
            y = in_one_kernel(partial(_choice, a=a, b=b), x, mask.to(x.dtype))
        elif not many(x, _FEW + 1):
            y = _chosen_of_few(x, mask, a, b) if one_kernel(x) is not None else None
        else:
            y = in_one_loop(partial(_sum, a=a, b=b), x, mask)
        if y is None:
            y = in_float32(lambda x: _chosen(x, mask, a, b), x)
        return x.copy_(y) if inplace else y

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, Tensor, float, float, bool], output: Tensor
    ) -> None:
        x, mask, ctx.a, _, inplace = inputs
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None, None, None, None]:
        (mask,) = ctx.saved_tensors
        return masked(grad_y, mask, ctx.a), None, None, None, None  # (3)

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, *_: None) -> Tensor:
        (mask,) = ctx.saved_tensors
        return masked(tangent_x, mask, ctx.a)


def _chosen(x: Tensor, mask: Tensor, a: float, b: float) -> Tensor:
    """Return (2) as a · m · x + offset; torch.where takes 3.8 ms for a million elements of a random mask, this 1.5."""
    scale = mask.to(x.dtype) * a
    y = x * scale
    return y.add_(scale.mul_(-_SATURATION).add_(a * _SATURATION + b))  # (2)


def _sum(x: Tensor, mask: Tensor, *, a: float, b: float) -> Tensor:
    scale = mask * a
    return x * scale + ((a * _SATURATION + b) - scale * _SATURATION)  # (2)


def _choice(x: Tensor, mask: Tensor, *, a: float, b: float) -> Tensor:
    return a * torch.where(mask > 0, x, _SATURATION) + b  # (2)


def _chosen_of_few(x: Tensor, mask: Tensor, a: float, b: float) -> Tensor:
    """Return (2) as a · (x - α') · m + a · α' + b, in two calls instead of six."""
    above = x - constant(_SATURATION, x.dtype)
    return torch.addcmul(constant(a * _SATURATION + b, x.dtype), above, mask, value=a)


_alpha_dropout = entry(AlphaDropoutFunction, again=AlphaDropoutFunction.forward)


def _coefficients(p: float) -> tuple[float, float]:
    a = 1 / math.sqrt((1 - p) * (1 + p * _SATURATION * _SATURATION))
    return a, -a * p * _SATURATION  # (1)


def _drop(x: Tensor, p: float, inplace: bool, leading: int | None) -> Tensor:
    """Draw a mask as :func:`draw` does, and apply it."""
    if p == 1.0:
        return x.mul_(0) if inplace else x * 0
    mask = draw_few(x, p, leading)
    mask = draw(x, p, leading) if mask is None else mask
    return _alpha_dropout(x, mask, *_coefficients(p), inplace)


@public
def alpha_dropout(
    input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    r"""Set each element to SELU's negative limit with probability ``p``, then restore mean 0 and variance 1.

    Args:
        input: Any shape ``(*)``, floating point, of mean 0 and variance 1.
        p: Probability of an element to be dropped, in ``[0, 1]``.
        training: Where false, ``input`` is returned as it is.
        inplace: Write the result into ``input``.

    Returns:
        Tensor of the shape and dtype of ``input``, of mean 0 and variance 1 if ``input`` is.

    Raises:
        ValueError: ``p`` is outside ``[0, 1]``.
        RuntimeError: ``input`` is of integers; ``inplace`` on a leaf that requires grad.

    Example:
        >>> import torch
        >>> from torchbp.functional import alpha_dropout
        >>> _ = torch.manual_seed(2)
        >>> alpha_dropout(torch.zeros(9), training=True).unique()
        tensor([-0.7792,  0.7792])
    """
    if is_identity("alpha_dropout", input, p, training):
        return input
    return _drop(input, p, inplace, None)


@public
def feature_alpha_dropout(
    input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    r"""Set whole channels to SELU's negative limit with probability ``p``, then restore mean 0 and variance 1.

    Args:
        input: ``(N, C, *)``, floating point, of mean 0 and variance 1.
        p: Probability of a channel of a sample to be dropped, in ``[0, 1]``.
        training: Where false, ``input`` is returned as it is.
        inplace: Write the result into ``input``.

    Returns:
        Tensor of the shape and dtype of ``input``, of mean 0 and variance 1 if ``input`` is.

    Raises:
        ValueError: ``p`` is outside ``[0, 1]``.
        RuntimeError: ``input`` has one dimension or is of integers; ``inplace`` on a leaf that requires grad.

    Example:
        >>> import torch
        >>> from torchbp.functional import feature_alpha_dropout
        >>> _ = torch.manual_seed(2)
        >>> feature_alpha_dropout(torch.zeros(1, 3, 2), training=True)
        tensor([[[-0.7792, -0.7792],
                 [ 0.7792,  0.7792],
                 [-0.7792, -0.7792]]])
    """
    if is_identity("feature_alpha_dropout", input, p, training):
        return input
    if input.dim() < 2:
        rule = "input of shape (N, C, *)"
        advice = "for other shapes: alpha_dropout"
        raise RuntimeError(wrong("feature_alpha_dropout", rule, shape(input), advice))
    return _drop(input, p, inplace, 2)


class AlphaDropout(nn.AlphaDropout):
    """Module form of :func:`alpha_dropout`; active in training mode only, and never in place, as in torch."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return alpha_dropout(input, self.p, self.training)


class FeatureAlphaDropout(nn.FeatureAlphaDropout):
    """Module form of :func:`feature_alpha_dropout`; active in training mode only, and never in place, as in torch."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return feature_alpha_dropout(input, self.p, self.training)


def _reference(leading: int | None) -> Callable[..., Tensor]:
    """Return the composition in torch's ops, with the same draw."""

    def reference(
        input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
    ) -> Tensor:
        if is_identity("reference", input, p, training):
            return input
        if p == 1:
            return input * 0
        m = draw(input, p, leading).to(input.dtype)
        a, b = _coefficients(p)
        return a * (input * m + _SATURATION * (1 - m)) + b

    return reference


def _samples_of_both(make: Make) -> Iterator[Sample]:
    for dims in ((3, 4), (2, 3, 2, 2), (0, 3, 2)):
        yield Sample((make.normal(*dims), 0.5, True), name="x".join(map(str, dims)))
    for p in (0.1, 1.0):
        yield Sample((make.normal(3, 4), p, True), name=f"p{p}")
    yield Sample((make.normal(3, 4),), name="eval")


def _errors(make: Make) -> Iterator[Sample]:
    yield Sample((make.normal(3, 2), -0.1), name="negative")
    yield Sample((make.normal(3, 2), 1.5), name="above-one")
    yield Sample((make.labels(3, 2, classes=5), 0.5, True), name="integers")


def _errors_of_channels(make: Make) -> Iterator[Sample]:
    yield from _errors(make)
    yield Sample((make.normal(3), 0.5, True), name="vector")


def _op(function: Callable[..., Tensor], module: type[nn.Module], by_channel: bool) -> Op:
    """Return the record of one of the two."""
    leading = 2 if by_channel else None

    def saved_bytes(x: Tensor, p: float = 0.5, training: bool = False) -> int:
        each = x.element_size() if is_few(x) else 1
        return x.shape[:leading].numel() * each if 0 < p < 1 and training else 0

    def benchmark(make: Make, n: int) -> Sample:
        side = max(1, math.isqrt(n // 512))
        return Sample((make.normal(8, 64, side, side), 0.5, True))

    return Op(
        function=function,
        modules=(module,),
        reference=_reference(leading),
        samples=_samples_of_both,
        module_samples=lambda make: [(module, Sample((0.2,)), Sample((make.normal(2, 3, 4),)))],
        errors=_errors_of_channels if by_channel else _errors,
        saved_bytes=saved_bytes,
        benchmark=benchmark,
        random=True,
    )


OPS = (
    _op(alpha_dropout, AlphaDropout, by_channel=False),
    _op(feature_alpha_dropout, FeatureAlphaDropout, by_channel=True),
)
