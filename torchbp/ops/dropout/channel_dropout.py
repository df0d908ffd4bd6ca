r"""Channel dropout: y = x · m / (1 - p), where one m for each channel of each sample is 0 with probability p, else 1.

Derivation:
    As of dropout, m expanded over the channel's positions: grad_x = grad_y · m / (1 - p).

Saves:
    m / (1 - p), a number of x's dtype for each channel of a sample, as torch; m, a byte, of complex x, and in half
    precision but where 1 / (1 - p) is 2, 4 or so, and not rounded.

Edge values:
    p = 0, or not training: y is x itself.   p = 1: y is x · 0.   ±inf or NaN: NaN where dropped, as in torch.

Randomness:
    As of dropout: reproducible under ``torch.manual_seed``, on every device; the stream is not torch's.

Sources:
    Tompson, Goroshin, Jain, LeCun, Bregler, "Efficient Object Localization Using Convolutional Networks", 2014,
    arXiv:1411.4280.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import entry, public
from torchbp.ops._op import Op
from torchbp.ops._reduction import WIDE
from torchbp.ops._samples import Make, Sample
from torchbp.ops.dropout._factor import times_factor
from torchbp.ops.dropout._mask import draw, draw_factor, is_identity
from torchbp.ops.dropout.dropout import DropoutFunction

__all__ = [
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "dropout1d",
    "dropout2d",
    "dropout3d",
]


_dropout = entry(DropoutFunction, again=DropoutFunction.forward)


def _drop(op: str, x: Tensor, p: float, training: bool, inplace: bool, leading: int) -> Tensor:
    """Draw one number for each index of the first ``leading`` dimensions, and apply it."""
    if is_identity(op, x, p, training):
        return x
    factor = draw_factor(x, p, leading)
    if factor is not None:
        return times_factor(x, factor, inplace)
    mask, scale = draw(x, p, leading), _scale(p)
    if not _has(x.dtype, scale):
        return _dropout(x, mask, scale, inplace)
    mask = mask if x.dtype is torch.get_default_dtype() else mask.to(x.dtype)
    return times_factor(x, mask * scale, inplace)


def _scale(p: float) -> float:
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def _has(dtype: torch.dtype, scale: float) -> bool:
    """Whether ``scale`` is rounded by ``dtype`` no more than the product is."""
    return dtype in WIDE or (not dtype.is_complex and scale.is_integer() and scale <= 256)


@public
def dropout1d(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    r"""Zero whole channels of a sequence with probability ``p`` and scale the others by :math:`1 / (1 - p)`.

    Args:
        input: ``(N, C, L)`` or ``(C, L)``, floating point or complex.
        p: Probability of a channel of a sample to be zeroed, in ``[0, 1]``.
        training: Where false, ``input`` is returned as it is.
        inplace: Write the result into ``input``.

    Returns:
        Tensor of the shape and dtype of ``input``; its expectation is ``input``.

    Raises:
        ValueError: ``p`` is outside ``[0, 1]``.
        RuntimeError: ``input`` has other dimensions or is of integers; ``inplace`` on a leaf that requires grad.

    Example:
        >>> import torch
        >>> from torchbp.functional import dropout1d
        >>> _ = torch.manual_seed(2)
        >>> dropout1d(torch.ones(3, 2))
        tensor([[0., 0.],
                [2., 2.],
                [0., 0.]])
    """
    if input.dim() not in (2, 3):
        rule = "input of shape (N, C, L) or (C, L)"
        raise RuntimeError(wrong("dropout1d", rule, shape(input), "for other shapes: dropout"))
    return _drop("dropout1d", input, p, training, inplace, input.dim() - 1)


@public
def dropout2d(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    r"""Zero whole channels of an image with probability ``p`` and scale the others by :math:`1 / (1 - p)`.

    Args:
        input: ``(N, C, H, W)``, floating point or complex; what has other dimensions is taken as ``(N, C, *)``, with a
            warning, ``(C, H, W)`` too.
        p: Probability of a channel of a sample to be zeroed, in ``[0, 1]``.
        training: Where false, ``input`` is returned as it is.
        inplace: Write the result into ``input``.

    Returns:
        Tensor of the shape and dtype of ``input``; its expectation is ``input``.

    Raises:
        ValueError: ``p`` is outside ``[0, 1]``.
        RuntimeError: ``input`` has one dimension or is of integers; ``inplace`` on a leaf that requires grad.

    Example:
        >>> import torch
        >>> from torchbp.functional import dropout2d
        >>> _ = torch.manual_seed(2)
        >>> dropout2d(torch.ones(1, 3, 1, 2)).squeeze()
        tensor([[0., 0.],
                [2., 2.],
                [0., 0.]])
    """
    if input.dim() != 4:
        rule = "input of shape (N, C, H, W)"
        message = wrong("dropout2d", rule, shape(input), "it is taken as (N, C, *)")
        warnings.warn(message, UserWarning, stacklevel=3)
    if input.dim() < 2 and not is_identity("dropout2d", input, p, training):
        rule = "input of at least 2 dimensions"
        raise RuntimeError(wrong("dropout2d", rule, shape(input), "for other shapes: dropout"))
    return _drop("dropout2d", input, p, training, inplace, 2)


@public
def dropout3d(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    r"""Zero whole channels of a volume with probability ``p`` and scale the others by :math:`1 / (1 - p)`.

    Args:
        input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``, floating point or complex; what has other dimensions is taken as
            ``(C, *)``, with a warning.
        p: Probability of a channel of a sample to be zeroed, in ``[0, 1]``.
        training: Where false, ``input`` is returned as it is.
        inplace: Write the result into ``input``.

    Returns:
        Tensor of the shape and dtype of ``input``; its expectation is ``input``.

    Raises:
        ValueError: ``p`` is outside ``[0, 1]``.
        RuntimeError: ``input`` has no dimension or is of integers; ``inplace`` on a leaf that requires grad.

    Example:
        >>> import torch
        >>> from torchbp.functional import dropout3d
        >>> _ = torch.manual_seed(2)
        >>> dropout3d(torch.ones(3, 1, 1, 2)).squeeze()
        tensor([[0., 0.],
                [2., 2.],
                [0., 0.]])
    """
    if input.dim() not in (4, 5):
        rule = "input of shape (N, C, D, H, W) or (C, D, H, W)"
        message = wrong("dropout3d", rule, shape(input), "it is taken as (C, *)")
        warnings.warn(message, UserWarning, stacklevel=3)
    if input.dim() < 1 and not is_identity("dropout3d", input, p, training):
        rule = "input of at least 1 dimension"
        raise RuntimeError(wrong("dropout3d", rule, shape(input), "for other shapes: dropout"))
    return _drop("dropout3d", input, p, training, inplace, 2 if input.dim() == 5 else 1)


class Dropout1d(nn.Dropout1d):
    """Module form of :func:`dropout1d`; it is active in training mode only."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return dropout1d(input, self.p, self.training, self.inplace)


class Dropout2d(nn.Dropout2d):
    """Module form of :func:`dropout2d`; it is active in training mode only."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return dropout2d(input, self.p, self.training, self.inplace)


class Dropout3d(nn.Dropout3d):
    """Module form of :func:`dropout3d`; it is active in training mode only."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return dropout3d(input, self.p, self.training, self.inplace)


def _op(function: Callable[..., Tensor], module: type[nn.Module], spatial: int) -> Op:
    """Return the record of one of the three: of inputs (N, C, *) with ``spatial`` further dimensions."""

    def samples(make: Make) -> Iterator[Sample]:
        sizes = (3, 2, 2)[:spatial]
        yield Sample((make.normal(2, 3, *sizes),), name="batch")
        yield Sample((make.normal(2, 3, *sizes), 0.2), name="p")
        yield Sample((make.normal(2, 3, *sizes), 0.5, False), name="eval")
        if spatial != 2:  # where torch takes a sample without a batch
            yield Sample((make.normal(4, *sizes),), name="sample")

    def module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
        x = make.normal(2, 3, *(3, 2, 2)[:spatial], requires_grad=False)
        yield module, Sample((0.2,)), Sample((x,))
        yield module, Sample((0.2,), {"inplace": True}), Sample((x,), name="inplace")

    def errors(make: Make) -> Iterable[Sample]:
        sizes = (3, 2, 2)[:spatial]
        yield Sample((make.normal(2, 3, *sizes), -0.1), name="negative")
        yield Sample((make.normal(2, 3, *sizes), 1.5), name="above-one")
        yield Sample((make.labels(2, 3, *sizes, classes=5),), name="integers")
        if spatial == 1:
            yield Sample((make.normal(2, 3, 4, 5),), name="dimensions")

    def saved_bytes(x: Tensor, p: float = 0.5, training: bool = True) -> int:
        channels = math.prod(x.shape[: x.dim() - spatial])
        each = x.element_size() if _has(x.dtype, _scale(p)) else 1
        return channels * each if p and training else 0

    def benchmark(make: Make, n: int) -> Sample:
        side = max(1, math.floor((n // 512) ** (1 / spatial)))
        return Sample((make.normal(8, 64, *(side for _ in range(spatial))),))

    return Op(
        function=function,
        modules=(module,),
        reference=None,
        samples=samples,
        module_samples=module_samples,
        errors=errors,
        saved_bytes=saved_bytes,
        benchmark=benchmark,
        random=True,
    )


OPS = (_op(dropout1d, Dropout1d, 1), _op(dropout2d, Dropout2d, 2), _op(dropout3d, Dropout3d, 3))
