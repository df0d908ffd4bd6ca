"""Normalization over rows as compiled loops (``rows.h``): of layer, root mean square, group, instance and batch norms.

They are templates over what memory holds, one text for each dtype, found by its name as a formula's loop is.
"""

from collections.abc import Sequence
from ctypes import c_double, c_int, c_int64, c_void_p
from math import prod

import torch
from torch import Tensor, get_num_threads

from torchbp.ops.kernels import _library
from torchbp.ops.kernels._by_hand import Loop, Run, taken, wide
from torchbp.ops.kernels._loop import many

__all__ = [
    "over_batch",
    "over_batch_backward",
    "over_groups",
    "over_groups_backward",
    "over_rows",
    "over_rows_backward",
]

_SHORT = 32  # positions of a channel, for fewer of which each has the weight beside it, as in a row
# Elements, from which a loop gains on one thread, its call counted in. Of float32 torch reads rows once, too: of
# layer norm's the loop gains a twentieth at 4M, of group norm's an eighth at 1M.
_FROM = {"rows": 1 << 22, "groups": 1 << 19, "batch": 1 << 15}
_ROWS, _CHANNELS = "n, m, l, threads, eps", "{n, m, l, k}, threads, eps"
_WRITTEN = "y, f1, f2"
_PARAMETERS = """int64_t n, int64_t m, int64_t l, int64_t k, const T* g, const T* x, const float* w,
    const float* b, T* y, float* f1, float* f2, float* f3, int threads, double eps"""
_TYPES = (*(c_int64,) * 4, *(c_void_p,) * 8, c_int, c_double)
_CALLS = {
    "rows": f"rows<true>({_ROWS}, x, w, b, {_WRITTEN})",
    "rows, not centred": f"rows<false>({_ROWS}, x, w, b, {_WRITTEN})",
    "rows, backward": f"rows_backward<true>({_ROWS}, g, x, w, b, {_WRITTEN})",
    "rows, not centred, backward": f"rows_backward<false>({_ROWS}, g, x, w, b, {_WRITTEN})",
    "channels": f"channels({_CHANNELS}, x, w, b, {_WRITTEN}, f3)",
    "channels, backward": f"channels_backward({_CHANNELS}, g, x, w, b, {_WRITTEN})",
}
_LOOPS = {kind: Loop("rows.h", _PARAMETERS, call, _TYPES) for kind, call in _CALLS.items()}
Needs = Sequence[bool]  # of x, w and b
Gradients = tuple[Tensor | None, ...]  # of x, w and b


def over_rows(
    x: Tensor,
    dims: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    centred: bool = True,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return y, and μ and r in float32, of rows; ``None`` where this was not compiled, or isn't taken.

    Args:
        x: ``(*, *shape)``.
        dims: How many there are in ``shape``, that of a row.
        weight: ``shape``, or ``None`` for ones.
        bias: ``shape``, or ``None`` for zeros.
        eps: Added to the variance, or the mean square.
        centred: Whether the mean is subtracted.
    """
    if not many(x) or not _library.at_hand():
        return None
    run = taken(_LOOPS["rows" if centred else "rows, not centred"], x, weight, bias)
    if run is None:
        return None
    width = prod(x.shape[-dims:])
    if not _gain_rows(x, width, centred):
        return None
    each = (*x.shape[:-dims], *(1 for _ in range(dims)))
    return _rows(run, x, 1, width, each, _weight(weight, width), wide(bias), eps)


def over_rows_backward(
    grad_y: Tensor,
    x: Tensor,
    dims: int,
    weight: Tensor | None,
    mean: Tensor | None,
    eps: float,
    needs: Needs,
    *,
    centred: bool = True,
) -> Gradients | None:
    """Return the gradients of what :func:`over_rows` takes, those of w and b in float32.

    Args:
        grad_y: As ``x``.
        x: ``(*, *shape)``.
        dims: How many there are in ``shape``, that of a row.
        weight: ``shape``, or ``None`` for ones.
        mean: What :func:`over_rows` returned; ``None`` where it was not kept.
        eps: Added to the variance, or the mean square.
        needs: Which gradients are needed.
        centred: Whether the mean is subtracted.
    """
    if not many(x) or not _library.at_hand():
        return None
    run = taken(
        _LOOPS["rows, backward" if centred else "rows, not centred, backward"],
        x,
        weight,
        grad_y,
        mean,
    )
    if run is None:
        return None
    shape = x.shape[-dims:]
    width = prod(shape)
    if not _gain_rows(x, width, centred):
        return None
    w = _weight(weight, width)
    grad_x, grad_w, grad_b = _rows_backward(run, grad_y, x, 1, width, w, mean, eps, needs)
    return grad_x, *(None if t is None else t.view(shape) for t in (grad_w, grad_b))


def over_groups(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return y, and μ and r in float32 (N, G), of ``x`` (N, C, *), w and b (C,); ``None`` as :func:`over_rows` does."""
    if not many(x) or not _library.at_hand():
        return None
    n, channels, length = x.shape[0], x.shape[1], prod(x.shape[2:])
    short = length < _SHORT
    run = taken(_LOOPS["rows" if short else "channels"], x, weight, bias)
    if run is None or not _gain_groups(x, groups, length):
        return None
    if short:
        w, b = _weight(weight, channels, length), wide(bias, length)
        return _rows(run, x, groups, channels // groups * length, (n, groups), w, b, eps)
    y, mean, rstd = torch.empty_like(x), *_statistics((n, groups), 2)
    _call(
        run,
        (n, channels, length, groups),
        (None, x, wide(weight), wide(bias)),
        (y, mean, rstd, None),
        eps,
    )
    return y, mean, rstd


def over_groups_backward(
    grad_y: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    mean: Tensor | None,
    eps: float,
    needs: Needs,
) -> Gradients | None:
    """Return the gradients of what :func:`over_groups` takes, those of w and b in float32."""
    if not many(x) or not _library.at_hand():
        return None
    channels, length = x.shape[1], prod(x.shape[2:])
    short = length < _SHORT
    run = taken(
        _LOOPS["rows, backward" if short else "channels, backward"], x, weight, grad_y, mean
    )
    if run is None or not _gain_groups(x, groups, length):
        return None
    if not short:
        return _channels_backward(run, grad_y, x, groups, weight, mean, eps, needs)
    w, width = _weight(weight, channels, length), channels // groups * length
    grad_x, *of_positions = _rows_backward(run, grad_y, x, groups, width, w, mean, eps, needs)
    return grad_x, *(None if t is None else t.view(channels, length).sum(1) for t in of_positions)


def over_batch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Return y, and μ, r and v in float32 (C,), each channel of ``x`` (N, C, *) normalized over all samples."""
    if not many(x) or not _library.at_hand():
        return None
    run = taken(_LOOPS["channels"], x, weight, bias)
    length = prod(x.shape[2:])
    if run is None or not _gain_batch(x, length):
        return None
    y, mean, rstd, variance = torch.empty_like(x), *_statistics((x.shape[1],), 3)
    _call(
        run,
        (*x.shape[:2], length, 0),
        (None, x, wide(weight), wide(bias)),
        (y, mean, rstd, variance),
        eps,
    )
    return y, mean, rstd, variance


def over_batch_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    eps: float,
    needs: Needs,
) -> Gradients | None:
    """Return the gradients of what :func:`over_batch` takes, those of w and b in float32."""
    if not many(x) or not _library.at_hand():
        return None
    run = taken(_LOOPS["channels, backward"], x, weight, grad_y, mean)
    if run is None or not _gain_batch(x, prod(x.shape[2:])):
        return None
    return _channels_backward(run, grad_y, x, 0, weight, mean, eps, needs)


def _gain_rows(x: Tensor, width: int, centred: bool) -> bool:
    if not centred:
        return width >= 16
    if x.dtype == torch.float32:
        return width >= 128 and x.numel() >= _FROM["rows"]
    return width >= 4


def _gain_groups(x: Tensor, groups: int, length: int) -> bool:
    channels = x.shape[1]
    if groups != channels and x.dtype == torch.float32 and x.numel() < _FROM["groups"]:
        return False
    return channels // groups * length >= _SHORT and x.is_contiguous()


def _gain_batch(x: Tensor, length: int) -> bool:
    return length >= _SHORT and x.numel() >= _FROM["batch"] and x.is_contiguous()


def _rows(
    run: Run,
    x: Tensor,
    groups: int,
    width: int,
    each: tuple[int, ...],
    w: Tensor,
    b: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    y, mean, rstd = torch.empty_like(x), *_statistics(each, 2)
    sizes = (x.numel() // (groups * width), groups, width, 0)
    _call(run, sizes, (None, x, w, b), (y, mean, rstd, None), eps)
    return y, mean, rstd


def _rows_backward(
    run: Run,
    grad_y: Tensor,
    x: Tensor,
    groups: int,
    width: int,
    w: Tensor,
    mean: Tensor | None,
    eps: float,
    needs: Needs,
) -> Gradients:
    x, grad_y = x.contiguous(), grad_y.contiguous()
    columns = groups * width
    made = _gradients(x, columns, needs)
    _call(run, (x.numel() // columns, groups, width, 0), (grad_y, x, w, mean), (*made, None), eps)
    return made


def _channels_backward(
    run: Run,
    grad_y: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    mean: Tensor | None,
    eps: float,
    needs: Needs,
) -> Gradients:
    n, channels = x.shape[:2]
    made = _gradients(x, channels, needs)
    sizes = (n, channels, prod(x.shape[2:]), groups)
    _call(run, sizes, (grad_y.contiguous(), x, wide(weight), mean), (*made, None), eps)
    return made


def _gradients(x: Tensor, columns: int, needs: Needs) -> Gradients:
    """Return room for the gradients of x, w and b."""
    need_x, *of_parameters = needs
    rooms = (torch.empty(columns, dtype=torch.float32) if need else None for need in of_parameters)
    return torch.empty_like(x) if need_x else None, *rooms


def _statistics(shape: tuple[int, ...], count: int) -> list[Tensor]:
    return [torch.empty(shape, dtype=torch.float32) for _ in range(count)]


def _weight(t: Tensor | None, size: int, times: int = 1) -> Tensor:
    given = wide(t, times)
    return torch.ones(size * times, dtype=torch.float32) if given is None else given


def _call(
    run: Run,
    sizes: tuple[int, ...],
    read: tuple[Tensor | None, ...],
    written: tuple[Tensor | None, ...],
    eps: float,
) -> None:
    at = [None if t is None else t.data_ptr() for t in read + written]
    run(*sizes, *at, get_num_threads(), eps)
