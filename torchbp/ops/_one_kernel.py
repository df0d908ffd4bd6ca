"""An elementwise formula as one kernel, as torch's own are: of several steps each would be a trip to memory.

On the CPU it is a loop that has been compiled beforehand, where the extra is there: ``kernels/``. On a GPU torch's
jiterator (``torch.cuda.jiterator``, by NVRTC, which torch brings along) compiles what :func:`source` writes down, some
0.1 s for each formula and dtype, and keeps it on disk. Where neither is there, or a formula does what has no rule, the
formula runs as it is: nothing depends on this but time.
"""

from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from torchbp.ops._function import as_dtype, fused, is_half
from torchbp.ops._identity import identity
from torchbp.ops._symbols import source
from torchbp.ops.kernels import SUM, in_one_loop

__all__ = ["in_one_kernel"]

_PLAIN = Tensor.__torch_dispatch__  # pyright: ignore[reportAttributeAccessIssue]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST = 8  # tensors that the jiterator takes
_VARIANTS = 64  # of one formula: in its constants, and in what it is given
_kernels: dict[Any, Callable[..., Tensor] | None] = {}
_variants: Counter[str] = Counter()


def in_one_kernel(
    formula: Callable[..., Tensor], *tensors: Tensor, summed: bool = False
) -> Tensor | None:
    """Return the values of ``formula``, computed in float32 and rounded once; ``None`` where it has to run itself.

    Args:
        formula: Elementwise function of ``tensors``. What it closes over, or is partial in, are numbers and functions.
        tensors: Of one dtype, and of shapes that can be broadcast. Beside half precision single numbers may be float32,
            and what has one number for each of its rows; on the CPU all that :func:`in_one_loop` takes.
        summed: Whether only the sum of the values is wanted: they may then be sums of two, and in float32.
    """
    first = tensors[0]
    if first.is_cpu:
        return in_one_loop(formula, *tensors, outputs=(SUM if summed else None,))
    if not (
        first.is_cuda and first.dtype in _DTYPES and first.numel() and fused(*tensors, half=True)
    ):
        return None
    if len(tensors) > _MOST or not all(_suits(t, first) for t in tensors) or not _at_hand():
        return None
    if is_half(first) and (summed or any(t.dtype != first.dtype for t in tensors)):
        return _in_pairs(formula, tensors, summed)
    run = _kernel(formula, len(tensors))
    return None if run is None else run(*tensors)


def _suits(t: Tensor, first: Tensor) -> bool:
    if type(t).__torch_dispatch__ is not _PLAIN or t.is_neg() or t.device != first.device:  # pyright: ignore[reportAttributeAccessIssue]
        return False
    if t.dtype == first.dtype:
        return True
    return t.dtype in _DTYPES and (t.dim() == 0 or (t.dim() == first.dim() and t.shape[-1] == 1))


def _in_pairs(
    formula: Callable[..., Tensor], tensors: tuple[Tensor, ...], summed: bool
) -> Tensor | None:
    """Compute on two neighbours of half precision as one float32, where single numbers, and sums, stay exact."""
    first = tensors[0]
    pairs = tuple(t.dim() > 0 and t.dtype == first.dtype for t in tensors)
    of_rows = any(t.dim() and not pair for t, pair in zip(tensors, pairs, strict=True))
    odd = first.dim() == 0 or first.shape[-1] % 2 > 0
    if not pairs[0] or (odd and (of_rows or first.numel() % 2)):
        return None
    for t, pair in zip(tensors, pairs, strict=True):
        if pair and not (
            t.shape == first.shape and t.is_contiguous() and t.storage_offset() % 2 == 0
        ):
            return None
    run = _kernel(formula, len(tensors), pairs, first.dtype, summed)
    if run is None:
        return None

    def given(t: Tensor, pair: bool) -> Tensor:
        if not pair:
            return as_dtype(t, torch.float32)
        return (t.view(-1) if odd else t).view(torch.float32)

    value = run(*map(given, tensors, pairs))
    if summed:
        return value
    return value.view(first.dtype).view(first.shape) if odd else value.view(first.dtype)


@cache
def _at_hand() -> bool:
    """Whether the jiterator is there, and compiles."""
    if torch.version.cuda is None:
        return False
    code = "template <typename T> T twice(T x) { return x + x; }"
    try:
        torch.cuda.jiterator._create_jit_fn(code)(torch.ones(1, device="cuda"))
    except (AttributeError, AssertionError, RuntimeError):
        return False
    return True


def _kernel(
    formula: Callable[..., Tensor], count: int, *pairs: Any
) -> Callable[..., Tensor] | None:
    known = identity(formula)
    if known is None:
        return None
    key = (known, count, *pairs)
    if key not in _kernels:
        name = _named(formula)
        if _variants[name] >= _VARIANTS:  # a number that changes from step to step is no constant
            return None
        _variants[name] += 1
        code = source(name, formula, count)
        if code is not None and pairs:
            code = _of_pairs(name, code, *pairs)
        _kernels[key] = None if code is None else torch.cuda.jiterator._create_jit_fn(code)
    return _kernels[key]


def _named(formula: Callable[..., Tensor]) -> str:
    while isinstance(formula, partial):
        formula = formula.func
    name = f"torchbp_{(formula.__module__ or '').rpartition('.')[2]}_{formula.__name__}"
    return "".join(c for c in name if c.isalnum() or c == "_")


def _of_pairs(
    name: str, code: str, pairs: tuple[bool, ...], dtype: torch.dtype, summed: bool
) -> str:
    """Return the source of what takes pairs, packed in a float32, and gives such, or the sum of the two values."""

    def one(half: str) -> str:
        return f"{name}<T>({', '.join(f'{half}<T>(a{i})' if p else f'a{i}' for i, p in enumerate(pairs))})"

    taken = ", ".join(f"T a{i}" for i in range(len(pairs)))
    value = f"{one('low')} + {one('high')}" if summed else f"both<T>({one('low')}, {one('high')})"
    return f"{_HALVES[dtype]}{code} template <typename T> T {name}_of_pairs({taken}) {{ return {value}; }}"


_BOTH = """
template <typename T> T low(T pair) { return wide<T>(__float_as_uint(pair) & 0xffffu); }
template <typename T> T high(T pair) { return wide<T>(__float_as_uint(pair) >> 16); }
template <typename T> T both(T x, T y) { return __uint_as_float(bits<T>(x) | bits<T>(y) << 16); }
"""
_HALVES = {
    torch.bfloat16: """
template <typename T> T wide(unsigned h) { return __uint_as_float(h << 16); }
template <typename T> unsigned bits(T x) {
    const unsigned u = __float_as_uint(x);
    return x != x ? 0x7fffu : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}"""
    + _BOTH,
    torch.float16: """
template <typename T> T wide(unsigned u) {
    const unsigned short h = u;
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
    return x;
}
template <typename T> unsigned bits(T x) {
    unsigned short h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
}"""
    + _BOTH,
}
