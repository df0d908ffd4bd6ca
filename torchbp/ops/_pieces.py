"""Elementwise formulas piece by piece, so that what lies between their steps stays in the cache.

A formula of several steps makes a tensor at each. Beyond the cache every one of them is a trip to memory, and from
some megabytes on, of pages that the system first has to give: they cost several times the arithmetic.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from torchbp.ops._function import fused, in_float32, is_half
from torchbp.ops._one_kernel import in_one_kernel
from torchbp.ops.kernels import many

__all__ = [
    "FEW",
    "PIECE",
    "alike",
    "at_once",
    "in_pieces",
    "in_row_pieces",
    "is_few",
    "length_written",
    "pieces",
    "separable",
    "written",
]

FEW = 1 << 14  # elements, that need no pieces: torch's own reduction is one call
PIECE = 1 << 16  # elements: 256 KB of float32; two threads halve it, torch gives none less
_LARGE = 1 << 23  # elements; below 32 MB the C library keeps memory, and pieces gain nothing
_LARGE_HALF = 1 << 18  # the float32 copies of half precision are worth avoiding sooner


def in_pieces(
    formula: Callable[..., Tensor],
    *tensors: Tensor,
    into: Callable[..., object] | None = None,
    spare: int = 0,
) -> Tensor:
    """Evaluate an elementwise ``formula`` as :func:`in_float32` does, large tensors piece by piece.

    Args:
        formula: Elementwise function of ``tensors``.
        tensors: Floating point; the value has the shape and dtype of the first.
        into: The same formula as ``into(value, *spares, *tensors)``, which writes to its first arguments alone, where
            nobody differentiates: see :func:`written`.
        spare: How many spares it takes.

    Returns:
        The formula's value in the first tensor's own dtype.
    """
    first = tensors[0]
    if first.is_cuda or many(first):
        made = in_one_kernel(formula, *tensors)
        if made is not None:
            return made
    if into is not None and writable(*tensors):
        if is_few(first):
            return at_once(into, spare, *tensors)
        value = torch.empty_like(first)
        for _ in written(into, spare, *tensors, value=value):
            pass
        return value
    if not separable(*tensors):
        return in_float32(formula, *tensors)
    value = torch.empty_like(first)
    for part, *parts in pieces(value, *tensors):
        part.copy_(formula(*(p.float() for p in parts) if is_half(first) else parts))
    return value


def is_few(first: Tensor) -> bool:
    """Whether ``first`` needs neither pieces nor other numbers than its own: :func:`at_once` does."""
    return first.numel() <= FEW and not is_half(first)


def at_once(into: Callable[..., object], spare: int, *tensors: Tensor) -> Tensor:
    """Return what ``into`` writes, as :func:`written` takes it, of tensors taken whole, in their own dtype."""
    value = torch.empty_like(tensors[0])
    if spare:
        into(value, *[torch.empty_like(value) for _ in range(spare)], *tensors)
    else:
        into(value, *tensors)
    return value


def in_row_pieces(formula: Callable[..., Tensor], dim: int, *tensors: Tensor) -> Tensor:
    """Evaluate as :func:`in_float32` does a ``formula`` along ``dim``, half precision some rows at a time.

    Args:
        formula: Function of ``tensors``, and its value a tensor, whose rows are those of the last dimension.
        dim: The dimension it works along; another than the last is not taken apart.
        tensors: Floating point, alike but for the length of their rows; the value has the dtype of the first.
    """
    first = tensors[0]
    if not is_half(first):
        return formula(*tensors)
    last = first.dim() > 1 and dim in (-1, first.dim() - 1)
    if not (
        last
        and many(first, _LARGE_HALF)
        and first.is_cpu
        and fused(*tensors, half=True)
        and all(t.is_contiguous() and t.shape[:-1] == first.shape[:-1] for t in tensors)
    ):
        return in_float32(formula, *tensors)
    some = max(1, PIECE // max(t.shape[-1] for t in tensors))
    rows = zip(*(t.view(-1, t.shape[-1]).split(some) for t in tensors), strict=True)
    value = torch.cat([in_float32(formula, *parts) for parts in rows])
    return value.view(*first.shape[:-1], value.shape[-1])


def separable(*tensors: Tensor) -> bool:
    """Whether an elementwise formula of ``tensors`` is worth evaluating piece by piece, and can be."""
    first = tensors[0]
    least = _LARGE_HALF if is_half(first) else _LARGE
    return many(first, least) and first.is_cpu and alike(*tensors)


def alike(*tensors: Tensor) -> bool:
    """Whether they lie in memory alike, but for single numbers, and :func:`writable` holds."""
    return writable(*tensors) and _dense(*tensors)


def writable(first: Tensor, *others: Tensor) -> bool:
    """Whether an elementwise formula of ``tensors`` may write into tensors of its own.

    Nobody differentiates or traces it, and they have one shape and dtype, but for single numbers.
    """
    if not fused(first, *others, half=True):
        return False
    for t in others:
        if t.dim() and not (t.dtype is first.dtype and t.size() == first.size()):
            return False
    return first.numel() > 0 and first.is_floating_point()


def _dense(*tensors: Tensor) -> bool:
    return all(t.is_contiguous() for t in tensors)


def pieces(*tensors: Tensor, length: int | None = None) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors' pieces side by side; a single number goes with each of them."""
    length = length or PIECE // 2 * max(2, torch.get_num_threads())
    count = -(-tensors[0].numel() // length)
    split = ((t,) * count if t.dim() == 0 else t.view(-1).split(length) for t in tensors)
    yield from zip(*split, strict=True)


def row_pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the rows of matrices some at a time, as many as stay in the cache beside what is made of them."""
    first = tensors[0]
    some = max(1, length_written(first) // max(1, first.shape[-1]))
    yield from zip(*(t.split(some) for t in tensors), strict=True)


def length_written(first: Tensor) -> int:
    """Return the length of all but the last piece of what :func:`written` makes of ``first`` and its like.

    On several threads twice as much for each: of a call on two, some 8 µs is waiting for the other.
    """
    if not first.is_cpu:
        return first.numel()
    threads = torch.get_num_threads()
    return PIECE * (4 if threads == 1 else 8 * threads)


def written(
    into: Callable[..., object], spare: int, *tensors: Tensor, value: Tensor | None = None
) -> Iterator[Tensor]:
    """Evaluate ``into(value, *spares, *tensors)`` piece by piece, without a tensor made on the way.

    Args:
        into: An elementwise formula. It writes its value into the first argument, which it may use before, and what
            lies between into the spares; the other arguments it only reads. In half precision all are float32.
        spare: How many spares it takes.
        tensors: For which :func:`writable` holds; taken whole where they are not contiguous.
        value: Where the values are to be; ``None`` where each piece is used at once.

    Yields:
        The values of a piece, in float32 for half precision, until the next is asked for.
    """
    first = tensors[0]
    half = is_half(first)
    dtype = torch.float32 if half else first.dtype
    length = length_written(first)
    if first.numel() <= length or not _dense(*tensors):
        made = [torch.empty_like(first, dtype=dtype) for _ in range(spare)]
        whole = value if value is not None and not half else torch.empty_like(first, dtype=dtype)
        into(whole, *made, *((t.float() for t in tensors) if half else tensors))
        if half and value is not None:
            value.copy_(whole)
        yield whole
        return
    own = value is None or half
    copied = [half and t.dim() > 0 for t in tensors]
    room = [first.new_empty(length, dtype=dtype) for _ in range(own + spare + sum(copied))]
    for part, *parts in pieces(first if value is None else value, *tensors, length=length):
        n = part.numel()
        rooms = iter(room if n == length else [r[:n] for r in room])
        whole = next(rooms) if own else part
        made = [next(rooms) for _ in range(spare)]
        wide = [next(rooms).copy_(p) if c else p for c, p in zip(copied, parts, strict=True)]
        into(whole, *made, *((t.float() for t in wide) if half else wide))
        if half and value is not None:
            part.copy_(whole)
        yield whole
