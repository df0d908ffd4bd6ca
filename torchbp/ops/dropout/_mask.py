"""The mask that every form of dropout draws, and its product with values, gradients and tangents."""

from functools import partial

import torch
from torch import Tensor

from torchbp.ops._errors import wrong
from torchbp.ops._function import fused, kernel, modes_active, undifferentiated, visible
from torchbp.ops._numbers import constant
from torchbp.ops._random import int32_of, plain
from torchbp.ops.kernels import half_in_one_loop

__all__ = ["draw", "draw_factor", "draw_few", "is_few", "is_identity", "masked", "one_kernel"]

_dropout_backward = kernel("native_dropout_backward")
_FEW = 1 << 12
_INT32_MIN = -(2**31)
# What may be added to -0 and leaves it so.
_NOTHING = {t: torch.tensor(-0.0, dtype=t, device="cpu") for t in (torch.float32, torch.float64)}


def is_identity(op: str, x: Tensor, p: float, training: bool) -> bool:
    """Check the arguments; return whether nothing is to be dropped."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(wrong(op, "p in [0, 1]", p, "p is a probability"))
    if p == 0.0 or not training:
        return x.dim() >= 0  # of what is no tensor it is asked, too
    if x.numel() == 0:
        return True
    if x.dtype not in _NOTHING and not (x.is_floating_point() or x.is_complex()):
        raise RuntimeError(wrong(op, "floating-point input", x.dtype, "cast it first"))
    return False


def draw(x: Tensor, p: float, leading: int | None = None) -> Tensor:
    """Return a mask, uint8: 0 with probability ``p``, else 1.

    Args:
        x: Of whose shape the mask is.
        p: Probability.
        leading: One element is drawn for each index of so many first dimensions, (N, C, 1, ...); of all by default.
    """
    if not visible(x):
        if leading is not None:
            x = x[(..., *(slice(0, 1) for _ in range(x.dim() - leading)))]
        if plain(x):  # a third of the kernels; on a GPU, in the order of memory
            return torch.empty_like(x, dtype=torch.uint8).bernoulli_(1 - p)
        return (torch.rand_like(x, dtype=torch.float32) >= p).to(torch.uint8)
    if leading is None and x.numel() < _FEW:  # half the time of making a tensor by its shape
        drawn = torch.empty_like(x, dtype=torch.uint8, memory_format=torch.contiguous_format)
        return drawn.bernoulli_(1 - p)
    shape = x.shape if leading is None else x.shape[:leading] + (1,) * (x.dim() - leading)
    if shape.numel() < _FEW:  # two calls instead of five; one draw for each index, whatever strides
        return torch.empty(shape, dtype=torch.uint8).bernoulli_(1 - p)
    return (int32_of(shape) >= _INT32_MIN + round(p * 2**32)).view(torch.uint8)


def is_few(x: Tensor) -> bool:
    """Whether the factors of a mask like ``x`` are drawn as numbers of its dtype."""
    return visible(x) and x.numel() < _FEW and x.dtype in _NOTHING


def draw_few(x: Tensor, p: float, leading: int | None = None) -> Tensor | None:
    """Return what :func:`draw` would, the same for the same seed, in the dtype of ``x``; ``None`` where not few.

    Of few elements, a byte's widening is what a product with it takes most of its time for, 1.1 µs.
    """
    if not is_few(x):
        return None
    if leading is None:
        drawn = torch.empty_like(x, memory_format=torch.contiguous_format)
    else:
        drawn = x.new_empty(x.shape[:leading] + (1,) * (x.dim() - leading))
    return drawn.bernoulli_(1 - p)


def draw_factor(x: Tensor, p: float, leading: int | None = None) -> Tensor | None:
    """Return m / (1 - p) for the mask m of :func:`draw_few`, or ``None`` as it does."""
    drawn = draw_few(x, p, leading)
    if drawn is None:
        return None
    return drawn.mul_(constant(1.0 / (1.0 - float(p)) if p < 1.0 else 0.0, x.dtype))


def one_kernel(v: Tensor) -> Tensor | None:
    """Return, where torch.addcmul takes values and a mask as they are, a zero to add them to; else ``None``."""
    nothing = _NOTHING.get(v.dtype)
    if nothing is None or not (v.is_cpu and undifferentiated()) or modes_active():
        return None
    return nothing


def masked(v: Tensor, mask: Tensor, scale: float, *, alike: bool = False) -> Tensor:
    """Return v · mask · scale, the mask expanded; ``alike`` where it is known not to be needed."""
    if alike or mask.numel() == v.numel():
        nothing = one_kernel(v)
        if nothing is not None:
            return torch.addcmul(nothing, v, mask, value=scale)  # 0.7 of the time of two products
    if v.is_cuda and mask.shape == v.shape and v.is_floating_point() and fused(v, half=True):
        return _dropout_backward(v, mask.view(torch.bool), scale)  # one pass, rounded once
    if v.dtype not in _NOTHING:
        made = half_in_one_loop(partial(_scaled, scale=scale), v, mask)
        return v * mask * scale if made is None else made
    if mask.numel() == v.numel():
        return v * mask * scale
    # one pass over v; in half precision it would round twice
    if v.dtype is torch.float32 is torch.get_default_dtype():  # that of the product with a number
        return v * (mask * scale)
    return v * (mask.to(v.dtype) * scale)


def _scaled(v: Tensor, mask: Tensor, *, scale: float) -> Tensor:
    return v * mask * scale
