r"""Embedding: y[n] = W[i[n]], a row of a table for each index.

Derivation, with V rows of D features:
    ∂y[n]/∂W[v] = 1 where i[n] = v
    grad_W[v]  = Σ grad_y[n] over the n with i[n] = v                                         (1)
    tangent_y[n] = tangent_W[i[n]]                                                            (2)
    By definition, not derivation: the row "padding_idx" gets no gradient, and "scale_grad_by_freq" divides each term of
    (1) by the number of n with the same index: the sum becomes a mean; (2) is that of the same linear map.  (3)

Saves:
    i (8 bytes an index), an input; nothing where W needs no gradient.

Edge values:
    An index that occurs n times gets n terms; they are summed in float32 for half precision, where torch on the CPU
    sums 256 ones at most in bfloat16.

Sources:
    Bengio, Ducharme, Vincent, Jauvin, "A Neural Probabilistic Language Model", 2003, Journal of Machine Learning
    Research 3.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._errors import wrong
from torchbp.ops._function import Context, entry, fused, kernel, public, widened
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample
from torchbp.ops.kernels import over_indices

__all__ = ["Embedding", "EmbeddingFunction", "embedding"]

_embedding_dense_backward = kernel("embedding_dense_backward")


class EmbeddingFunction(Function):
    """Selection of rows with a hand-written gradient. Call it through :func:`embedding`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # (*), (V, D) -> (*, D)
        index: Tensor, weight: Tensor, padding: int, by_frequency: bool, sparse: bool
    ) -> Tensor:
        return torch.embedding(weight, index)

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, Tensor, int, bool, bool], output: Tensor
    ) -> None:
        index, weight, ctx.padding, ctx.by_frequency, ctx.sparse = inputs
        ctx.shape = weight.shape
        ctx.save_for_backward(index if ctx.needs_input_grad[1] else None)
        ctx.save_for_forward(index)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[None, Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[1]:
            return None, None, None, None, None
        (index,) = ctx.saved_tensors
        count, width = ctx.shape
        if not ctx.sparse:
            made = over_indices(grad_y, index, count, ctx.padding, mean=ctx.by_frequency)
            if made is not None:
                return None, made, None, None, None
        g = widened(grad_y)
        if fused(g) and not ctx.sparse and not g.is_complex():
            rule = (count, ctx.padding, ctx.by_frequency)
            grad_weight = _embedding_dense_backward(g, index, *rule)
            return None, grad_weight.to(grad_y.dtype), None, None, None
        i = index.reshape(index.numel())
        rows = _weighted(g.reshape(index.numel(), width), i, count, ctx.padding, ctx.by_frequency)
        if ctx.sparse:
            kept = i != ctx.padding
            at, values = i[kept].long().unsqueeze(0), rows[kept].to(grad_y.dtype)
            grad_weight = torch.sparse_coo_tensor(at, values, ctx.shape, check_invariants=False)
            return None, grad_weight, None, None, None
        grad_weight = g.new_zeros(ctx.shape).index_add(0, i, rows)  # (1)
        return None, grad_weight.to(grad_y.dtype), None, None, None

    @staticmethod
    def jvp(ctx: Context, _: None, tangent_weight: Tensor, *_others: None) -> Tensor:
        (index,) = ctx.saved_tensors
        i = index.reshape(index.numel())
        rows = tangent_weight.index_select(0, i)  # (2)
        rows = _weighted(rows, i, ctx.shape[0], ctx.padding, ctx.by_frequency)
        return rows.reshape(*index.shape, ctx.shape[1])


def _weighted(rows: Tensor, i: Tensor, count: int, padding: int, by_frequency: bool) -> Tensor:
    """Return the rows (N, D) without those of the padding, each over its index's number of occurrences."""
    if padding >= 0:
        rows = rows.masked_fill((i == padding).unsqueeze(1), 0)
    if by_frequency:
        ones = torch.ones_like(i, dtype=rows.dtype)
        times = ones.new_zeros(count).index_add(0, i, ones)
        rows = rows / times.index_select(0, i).unsqueeze(1)
    return rows  # (3)


_embedding = entry(EmbeddingFunction, again=EmbeddingFunction.forward)


@public
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    r"""Select rows of a table: :math:`y = W_i`.

    Args:
        input: Indices ``(*)``, int64 or int32, in ``[0, V)``.
        weight: The table ``(V, D)``.
        padding_idx: Index whose row gets no gradient, or ``None``; negative values count from the end.
        max_norm: Rows that are selected and have a larger norm are first scaled to it, in place; ``None`` for no bound.
        norm_type: Exponent of that norm.
        scale_grad_by_freq: Divide each row's gradient by the number of times that it is selected.
        sparse: Give ``weight`` a sparse gradient, of the selected rows only; differentiable once.

    Returns:
        Tensor ``(*, D)`` of the dtype of ``weight``. Gradients of half-precision rows are summed in float32.

    Raises:
        IndexError: An index is out of range.
        RuntimeError: ``input`` is not of indices, or ``weight`` not of two dimensions.
        AssertionError: ``padding_idx`` is out of range.

    Example:
        >>> import torch
        >>> from torchbp.functional import embedding
        >>> embedding(torch.tensor([2, 0]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
        tensor([[5., 6.],
                [1., 2.]])
    """
    if padding_idx is not None and not -weight.shape[0] <= padding_idx < weight.shape[0]:
        rule = f"padding_idx in [{-weight.shape[0]}, {weight.shape[0]})"
        raise AssertionError(wrong("embedding", rule, padding_idx, "it is an index of weight"))
    padding = -1 if padding_idx is None else padding_idx % max(1, weight.shape[0])
    if max_norm is not None:
        with torch.no_grad():
            torch.embedding_renorm_(weight.detach(), input.contiguous(), max_norm, norm_type)
    return _embedding(input, weight, padding, scale_grad_by_freq, sparse)


class Embedding(nn.Embedding):
    """Module form of :func:`embedding`; initialised as torch's: standard normal, zeros for the padding."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )


def _samples(make: Make) -> Iterator[Sample]:
    for dims in ((4,), (), (2, 3), (0,)):
        index = make.labels(*dims, classes=5)
        yield Sample((index, make.normal(5, 3)), name="x".join(map(str, dims)) or "scalar")
    index = make.labels(2, 3, classes=4)
    yield Sample((index, make.normal(5, 3), 4), name="padding")  # 4 is not among the indices
    yield Sample((index, make.normal(5, 3), -1), name="padding-from-end")
    yield Sample((index.int(), make.normal(5, 3)), name="int32")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    index = make.labels(2, 3, classes=5)
    yield Embedding, Sample((5, 3)), Sample((index,))
    yield Embedding, Sample((5, 3), {"padding_idx": -2}), Sample((index,), name="padding")
    yield Embedding, Sample((5, 3), {"max_norm": 0.5}), Sample((index,), name="max-norm")
    frequency = Sample((5, 3), {"scale_grad_by_freq": True})
    yield Embedding, frequency, Sample((index,), name="frequency")


def _errors(make: Make) -> Iterator[Sample]:
    index, weight = make.labels(2, 3, classes=5), make.normal(5, 3)
    yield Sample((index + 3, weight), name="index")
    yield Sample((index - 3, weight), name="negative")
    yield Sample((index, weight, 5), name="padding")
    yield Sample((index, weight, -6), name="padding-negative")
    yield Sample((index.double(), weight), name="floating-index")
    yield Sample((index, weight[0]), name="vector")


def _benchmark(make: Make, n: int) -> Sample:
    width = min(256, max(8, math.isqrt(n)))
    rows = max(1, n // width)
    return Sample((make.labels(rows, classes=1000), make.normal(1000, width)))


OP = Op(
    function=embedding,
    modules=(Embedding,),
    reference=F.embedding,
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=lambda i, weight, *_: i.numel() * i.element_size() if weight.requires_grad else 0,
    benchmark=_benchmark,
    fused="aten::embedding_dense_backward",
)
