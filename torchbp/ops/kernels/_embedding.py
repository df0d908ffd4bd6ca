"""The gradient of an embedding's table as a compiled loop (``embedding.h``)."""

from ctypes import c_int, c_int64, c_void_p

from torch import Tensor, get_num_threads

from torchbp.ops.kernels import _library
from torchbp.ops.kernels._by_hand import Loop, taken
from torchbp.ops.kernels._loop import many

__all__ = ["over_indices"]

_GRADIENT = Loop(
    "embedding.h",
    "int64_t n, int64_t v, int64_t d, int64_t padding, int64_t mean, int threads, "
    "const T* g, const int64_t* index, T* grad_w",
    "embedding_gradient(n, v, d, padding, mean, threads, g, index, grad_w)",
    (*(c_int64,) * 5, c_int, *(c_void_p,) * 3),
)


def over_indices(
    grad_y: Tensor, index: Tensor, count: int, padding: int, *, mean: bool
) -> Tensor | None:
    """Return the sum of those rows of ``grad_y`` that share an index, for each index; ``None`` without the loop.

    Args:
        grad_y: ``(*, D)``.
        index: ``(*)``.
        count: Of the sums, ``(count, D)``: they are float32, and rounded once.
        padding: The index whose sum is 0.
        mean: Whether a sum is divided by how many rows it has.
    """
    if not many(grad_y) or not _library.at_hand():
        return None
    g, i = grad_y.contiguous(), index.long().contiguous()
    run = taken(_GRADIENT, g, i)
    if run is None:
        return None
    width = g.shape[-1]
    made = g.new_empty(count, width)
    pointers = (g.data_ptr(), i.data_ptr(), made.data_ptr())
    run(i.numel(), count, width, padding, int(mean), get_num_threads(), *pointers)
    return made
