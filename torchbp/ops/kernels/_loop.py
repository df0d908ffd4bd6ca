"""An elementwise formula as one compiled loop over tensors in memory, where it has been compiled.

What a formula of Python says is noted by running it on symbols (``_symbols.py``) and stands in a loop of C++; the name
of the loop is a digest of that source, so a formula that has changed is not found and runs as it is.
"""

from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_void_p
from struct import Struct
from typing import Any, NamedTuple

import torch
from torch import Tensor, get_num_threads
from torch.compiler import is_dynamo_compiling

from torchbp.ops._identity import identity
from torchbp.ops._symbols import steps
from torchbp.ops.kernels import _library
from torchbp.ops.kernels._layout import (
    HALF,
    NAMES,
    SPREAD,
    Laid,
    Taken,
    all_arrays,
    in_rows,
    is_one_for_all,
    laid_out,
)
from torchbp.ops.kernels._layout import ROWS as IN_ROWS

__all__ = ["MANY", "ROWS", "SUM", "half_in_one_loop", "in_one_loop", "looped", "many"]

MANY = 1 << 14  # elements; for fewer the call costs as much as the loop
SUM = "sum"
ROWS = "sums of rows"
_MOST = 4096  # formulas and dtypes that are remembered
_SUMMED_ROW = 64  # elements; of shorter rows the sums take as long as torch's
Output = torch.dtype | str | Tensor | None
_ONE_LIKE_FIRST: tuple[Output, ...] = (None,)


def in_one_loop(
    formula: Callable[..., Any], *tensors: Tensor, outputs: tuple[Output, ...] = _ONE_LIKE_FIRST
) -> Any:
    """Return the value of ``formula``, computed in float32 and rounded once; ``None`` where it has to run itself.

    Args:
        formula: Elementwise function of ``tensors``. What it closes over, or is partial in, are numbers and functions.
        tensors: On the CPU, the first of the whole shape, and of float32 or half precision, or signs and the like where
            no output has its dtype. The others have its shape and layout, or are one number for all elements; beside
            contiguous ones they may be broadcast from one dimension, or several side by side, or lie in rows with gaps,
            as the halves of a tensor do.
        outputs: Of each of the formula's values: ``None`` for a tensor like the first; a dtype for one like it of that
            dtype; ``SUM`` for the sum over all elements, without dimensions, or ``ROWS`` for those over the last, of 64
            elements or more, in float32, but not both; or the tensor that it is written into, of the same shape,
            contiguous or in rows.

    Returns:
        A tensor, or for several ``outputs`` a tuple of them.
    """
    first = tensors[0]
    if not isinstance(first, Tensor) or not many(first) or not _library.at_hand():
        return None
    known = identity(formula)
    if known is None:
        return None
    taken = all_arrays(tensors) if outputs is _ONE_LIKE_FIRST else None
    if taken is None:
        return _of_any_layout(known, formula, tensors, outputs)
    # what is most usual, in few lines: beside many elements, where their code has left the cache, each takes some 3 µs
    run = _remembered(known, formula, taken, outputs)
    if run is None:
        return None
    y = torch.empty_like(first)
    run(first.numel(), tensors, (y,), None)
    return y


def _of_any_layout(
    known: Any,
    formula: Callable[..., Any],
    tensors: tuple[Tensor, ...],
    outputs: tuple[Output, ...],
) -> Any:
    first = tensors[0]
    tensors = tuple(t.contiguous() if is_one_for_all(t) else t for t in tensors)
    laid = laid_out(tensors, any_first=None not in outputs)
    if laid is None:
        return None
    lengths = [_lengths(o, first.shape, outputs) for o in outputs]
    if None in lengths or (any(lengths) and not (laid.rows or laid.like.is_contiguous())):
        return None
    kinds = tuple(_Into(o.dtype) if isinstance(o, Tensor) else o for o in outputs)
    run = _remembered(known, formula, laid.taken, kinds)
    if run is None or (ROWS in kinds and first.shape[-1] < _SUMMED_ROW):
        return None
    made = tuple(
        o if isinstance(o, Tensor) else _made(laid, first.dtype if o is None else o)
        for o in outputs
    )
    of_outputs = (n for pair in lengths for n in pair or (0, 0))
    run(first.numel(), tensors, made, (*laid.lengths, *of_outputs))
    return made[0] if len(made) == 1 else made


def _remembered(
    known: Any, formula: Callable[..., Any], taken: tuple[Taken, ...], kinds: tuple[Any, ...]
) -> Callable[..., None] | None:
    key = (known, kinds, taken)
    run = _library.remembered.get(key, ())
    if run == ():
        if len(_library.remembered) >= _MOST:  # a number that changes from step to step
            _library.remembered.clear()
        run = _library.remembered[key] = _compiled(formula, taken, kinds)
    return run


def _made(laid: Laid, dtype: torch.dtype | str) -> Tensor:
    if dtype == SUM:
        return torch.empty((), dtype=torch.float32)
    if dtype == ROWS:
        return torch.empty(laid.like.shape[:-1], dtype=torch.float32)
    layout = torch.contiguous_format if laid.rows else torch.preserve_format
    return torch.empty_like(laid.like, dtype=dtype, memory_format=layout)  # pyright: ignore[reportArgumentType]


def _lengths(
    output: Output, shape: torch.Size, outputs: tuple[Output, ...]
) -> tuple[int, ...] | None:
    """Return two numbers of rows that ``output`` depends on, if it does; ``None`` where it can't be made.

    They are the length, and the stride of those of a tensor that is written into.
    """
    if not isinstance(output, Tensor):
        of_rows = (shape[-1], 0) if shape and SUM not in outputs else None
        return of_rows if output == ROWS else ()
    rows = in_rows(output)
    if rows is None or output.shape != shape or output.dtype not in NAMES:
        return None
    return rows if rows[1] >= rows[0] else None


def half_in_one_loop(formula: Callable[..., Any], *tensors: Tensor) -> Any:
    """Do as :func:`in_one_loop` in half precision alone: in float32 torch's own kernel takes as long."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not many(first) or first.dtype not in HALF:
        return None
    return in_one_loop(formula, *tensors)


def many(x: Tensor, least: int = MANY) -> bool:
    """Whether ``x`` has so many elements; not where it is traced for any number of them."""
    if is_dynamo_compiling():
        return False
    n = x.numel()
    return type(n) is int and n >= least


def looped(*tensors: Tensor) -> bool:
    """Whether :func:`in_one_loop` takes ``tensors``; the formula may still not have been compiled."""
    return many(tensors[0]) and _library.at_hand() and laid_out(tensors) is not None


class _Into(NamedTuple):
    """A value that is written into a tensor of this dtype."""

    dtype: torch.dtype


def _compiled(
    formula: Callable[..., Any], taken: tuple[Taken, ...], outputs: tuple[Any, ...]
) -> Callable[..., None] | None:
    noted = steps(formula, len(taken), loop=True)
    if noted is None or len(noted[1]) != len(outputs):
        return None
    lines, values, numbers = noted
    name, text = _source(lines, values, len(numbers), taken, outputs)
    function = _library.find(name, text)
    if function is None:
        return None
    function.restype = None
    function.argtypes = (c_int64, c_int, *(c_void_p,) * 4)
    given = (c_float * len(numbers))(*numbers)
    # bytes, as they stand in memory: an array of ctypes' takes three times as long
    of_inputs, of_outputs = Struct(f"{len(taken)}P").pack, Struct(f"{len(outputs)}P").pack
    count = 2 * len(taken) + 2 * len(outputs)
    of_lengths, none = Struct(f"{count}q").pack, bytes(8 * count)

    def run(
        n: int,
        tensors: tuple[Tensor, ...],
        made: tuple[Tensor, ...],
        lengths: tuple[int, ...] | None,
    ) -> None:
        read = of_inputs(*[t.data_ptr() for t in tensors])
        write = of_outputs(*[t.data_ptr() for t in made])
        function(
            n, get_num_threads(), read, write, given, of_lengths(*lengths) if lengths else none
        )

    return run


def _source(
    lines: list[str],
    values: tuple[str, ...],
    numbers: int,
    arguments: tuple[Taken, ...],
    outputs: tuple[Any, ...],
) -> tuple[str, str]:
    """Return the name and the C++ of the loop."""
    shared = " ".join(f"const T c{i} = c[{i}];" for i in range(numbers))
    rows = "".join(f", const auto& r{i}" for i in range(len(arguments)))
    taken = " ".join(f"const T a{i} = r{i}[i];" for i in range(len(arguments)))
    to = " ".join(f"float* __restrict y{o} = to[{o}];" for o in range(len(outputs)))
    # a bool as a float takes four times as long by itself
    inside = " ".join(lines)
    as_float = [f"{v} ? T(1) : T(0)" if f"const bool {v} " in inside else v for v in values]
    kept = " ".join(f"y{o}[i] = {value};" for o, value in enumerate(as_float))
    read = ", ".join(
        f"{kind}<{NAMES[dtype]}>(in[{i}]{f', lengths + {2 * i}' if kind in (SPREAD, IN_ROWS) else ''})"
        for i, (dtype, kind) in enumerate(arguments)
    )
    written = ", ".join(_destination(o, i, arguments) for i, o in enumerate(outputs))
    body = f"""(int64_t n, int threads, const void* const* in, void* const* out, const float* c,
    const int64_t* lengths) {{
    using T = float;
    {shared}
    run(n, threads, [=](float* const* to{rows}) {{
        {to}
#pragma omp simd
        for (int64_t i = 0; i < BLOCK; ++i) {{
            {taken}
            {inside}
            {kept}
        }}
    }}, std::make_tuple({written}), std::make_tuple({read}));
}}
"""
    return _library.named(body)


def _destination(output: Any, i: int, arguments: tuple[Taken, ...]) -> str:
    """Return the C++ of where the value ``i`` goes."""
    if output == SUM:
        return f"Sum(out[{i}], n)"
    lengths = f"lengths + {2 * (len(arguments) + i)}"
    if output == ROWS:
        return f"RowSums(out[{i}], n, {lengths})"
    if isinstance(output, _Into):
        return f"IntoRows<{NAMES[output.dtype]}>(out[{i}], {lengths})"
    dtype = arguments[0].dtype if output is None else output
    return f"Values<{NAMES[dtype]}>(out[{i}], n)"
