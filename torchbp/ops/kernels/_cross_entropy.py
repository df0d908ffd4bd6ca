"""Cross entropy along contiguous rows as compiled loops (``cross_entropy.h``), for losses of logits."""

from ctypes import byref, c_int64

import torch
from torch import Tensor

from torchbp.ops._function import as_dtype, visible
from torchbp.ops.kernels import _library
from torchbp.ops.kernels._by_hand import NAMES, Loop, Run, taken, wide
from torchbp.ops.kernels._loop import many
from torchbp.ops.kernels._softmax import call, row_loop

__all__ = [
    "over_log_partition",
    "over_log_probabilities",
    "over_probabilities",
    "over_softmax_gradient",
    "takes_logits",
]

_LOGITS = ("const T* x", "const int64_t* target", "int64_t ignored", "const float* w")
_VALUES = row_loop(
    "cross_entropy.h",
    "log_probabilities",
    *_LOGITS,
    *(f"float* {name}" for name in ("log_p", "rest", "even", "log_z")),
    "int64_t* counted",
)
_GRADIENT = row_loop(
    "cross_entropy.h",
    "softmax_gradient",
    *_LOGITS,
    *(f"const float* {name}" for name in "azbd"),
    "int64_t step",
    "int64_t mean",
    "T* grad_x",
)


def takes_logits(x: Tensor) -> bool:
    """Whether ``x`` is as the loops take logits, (N, C), where nobody differentiates; they may not be compiled."""
    return (
        many(x)
        and _library.at_hand()
        and x.dim() == 2
        and x.dtype in NAMES
        and x.is_contiguous()
        and visible(x)
    )


def over_log_probabilities(
    x: Tensor, target: Tensor, ignored: int, w: Tensor | None = None, *, weighted: bool = False
) -> tuple[Tensor, Tensor | None, int] | None:
    """Return log p_t and Σ_c w_c log p_c of each row, and how many rows count; ``None`` where there is no loop.

    Args:
        x: Logits ``(N, C)``.
        target: Class indices ``(N,)``; where one is no class, ``None`` is returned too.
        ignored: The index whose rows have the value 0.
        w: ``(C,)``, for ``weighted``; ``None`` for ones.
        weighted: Whether the second is wanted.

    Returns:
        Both ``(N,)`` in float32, the second ``None`` where it is not wanted.
    """
    run = _run(_VALUES, x, target, w)
    if run is None:
        return None
    log_p = _of_rows(x)
    even = _of_rows(x) if weighted else None
    counted = c_int64()
    call(run, x, x, target, ignored, wide(w), log_p, None, even, None, byref(counted))
    return None if counted.value < 0 else (log_p, even, counted.value)


def over_probabilities(x: Tensor, target: Tensor, ignored: int) -> tuple[Tensor, Tensor] | None:
    """Return log p_t and 1 - p_t, of all its digits, of each row, as :func:`over_log_probabilities` does.

    They are for a gradient by :func:`over_softmax_gradient`: ``None`` where that has no loop, too.
    """
    run, of_gradient = _run(_VALUES, x, target), _run(_GRADIENT, x, target)
    if run is None or of_gradient is None:
        return None
    log_p, rest, counted = _of_rows(x), _of_rows(x), c_int64()
    call(run, x, x, target, ignored, None, log_p, rest, None, None, byref(counted))
    return None if counted.value < 0 else (log_p, rest)


def over_log_partition(x: Tensor) -> Tensor | None:
    """Return log Σ_c exp x_c of each row of logits ``(N, C)``, in float32; ``None`` where there is no loop."""
    run = _run(_VALUES, x)
    if run is None:
        return None
    log_z = _of_rows(x)
    call(run, x, x, None, 0, None, None, None, None, log_z, byref(c_int64()))
    return log_z


def over_softmax_gradient(
    x: Tensor,
    by_p: Tensor | None,
    target: Tensor | None = None,
    ignored: int = 0,
    w: Tensor | None = None,
    *,
    by_partition: Tensor | None = None,
    even: Tensor | None = None,
    peak: Tensor | None = None,
    mean: bool = False,
) -> Tensor | None:
    """Return p_j (a + z log Σ exp x) - b w_j - d [j = t] of each row, rounded once; ``None`` where there is no loop.

    Args:
        x: Logits ``(N, C)``.
        by_p: a, as the three others a number or one for each row; ``None`` is 0.
        target: Class indices t ``(N,)``, which :func:`over_log_probabilities` has looked at; ``None`` for none.
        ignored: The index whose rows are 0.
        w: ``(C,)``; ``None`` for ones.
        by_partition: z.
        even: b.
        peak: d.
        mean: Whether all four are divided by the number of rows that are not ignored.
    """
    factors = [
        None if t is None else as_dtype(t, torch.float32) for t in (by_p, by_partition, even, peak)
    ]
    run = _run(_GRADIENT, x, target, w, *factors)
    if run is None:
        return None
    step = int(any(t is not None and t.dim() > 0 for t in factors))
    if step:
        factors = [None if t is None else t.expand(x.shape[0]).contiguous() for t in factors]
    grad_x = torch.empty_like(x)
    call(run, x, x, target, ignored, wide(w), *factors, step, int(mean), grad_x)
    return grad_x


def _run(
    loop: Loop,
    x: Tensor,
    target: Tensor | None = None,
    w: Tensor | None = None,
    *factors: Tensor | None,
) -> Run | None:
    if not takes_logits(x):
        return None
    if target is not None and not (
        target.dtype == torch.int64 and target.shape == x.shape[:1] and target.is_contiguous()
    ):
        return None
    if w is not None and not (w.dtype == x.dtype and w.shape == x.shape[1:]):
        return None
    return taken(loop, x, target, w, *factors)


def _of_rows(x: Tensor) -> Tensor:
    return torch.empty(x.shape[0], dtype=torch.float32)
