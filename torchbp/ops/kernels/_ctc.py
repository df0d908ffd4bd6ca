"""CTC as compiled loops over sequences, a thread for each (``ctc.h``): ``ctc_loss.py`` derives what they compute."""

from ctypes import byref, c_int, c_int64, c_void_p

import torch
from torch import Tensor, get_num_threads

from torchbp.ops.kernels import _library
from torchbp.ops.kernels._by_hand import Loop, Run, taken
from torchbp.ops.kernels._loop import many

__all__ = ["over_sequences", "over_sequences_backward"]


def _loop(name: str, *parameters: str) -> Loop:
    sizes = ("steps", "n", "c", "width", "blank")
    tensors = ("const T* x", *(f"const int64_t* {of}" for of in ("labels", "times", "lengths")))
    parameters = (*tensors, *parameters, "int64_t* odd")
    arguments = ", ".join((*sizes, "threads", *(p.split()[-1] for p in parameters)))
    types = (c_void_p if "*" in p else c_int64 for p in parameters)
    return Loop(
        "ctc.h",
        f"{', '.join(f'int64_t {size}' for size in sizes)}, int threads, {', '.join(parameters)}",
        f"{name}({arguments})",
        (*(c_int64,) * len(sizes), c_int, *types),
    )


_VALUES = _loop("ctc_values", "float* values")
_GRADIENT = _loop("ctc_gradient", "const float* g", "int64_t zero", "T* grad_x")


def over_sequences(
    x: Tensor, labels: Tensor, times: Tensor, lengths: Tensor, blank: int
) -> Tensor | None:
    """Return each sequence's loss ``(N,)`` in float32, ∞ where no path spells its target.

    ``None`` where there is no loop, or one has to do that tells of NaN, or of labels that are no classes.
    """
    run = _run(_VALUES, x, labels, times, lengths)
    if run is None:
        return None
    values = torch.empty(x.shape[1], dtype=torch.float32)
    return values if _call(run, x, labels, times, lengths, blank, values) else None


def over_sequences_backward(
    x: Tensor,
    g: Tensor,
    labels: Tensor,
    times: Tensor,
    lengths: Tensor,
    blank: int,
    *,
    zero_infinity: bool,
) -> Tensor | None:
    """Return the gradient of x for g ``(N,)``, that of each loss; ``None`` as :func:`over_sequences`, and for NaN."""
    run = _run(_GRADIENT, x, labels, times, lengths, g)
    if run is None:
        return None
    grad_x = torch.empty_like(x)
    g = g.to(torch.float32).contiguous()
    made = _call(run, x, labels, times, lengths, blank, g, int(zero_infinity), grad_x)
    return grad_x if made else None


def _run(loop: Loop, x: Tensor, *others: Tensor) -> Run | None:
    if not many(x) or not _library.at_hand():
        return None
    if not all(t.is_contiguous() for t in (x, *others[:3])):
        return None
    return taken(loop, x, *others)


def _call(
    run: Run,
    x: Tensor,
    labels: Tensor,
    times: Tensor,
    lengths: Tensor,
    blank: int,
    *others: Tensor | int,
) -> bool:
    odd = c_int64()
    given = (x, labels, times, lengths, *others)
    pointers = (t.data_ptr() if isinstance(t, Tensor) else t for t in given)
    run(*x.shape, labels.shape[1], blank, get_num_threads(), *pointers, byref(odd))
    return odd.value == 0
