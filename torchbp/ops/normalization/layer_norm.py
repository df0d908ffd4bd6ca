r"""Layer normalization: y = x̂ · w + b with x̂ = (x - μ) · r, over the last dimensions ("normalized_shape", D elements).

Derivation, for one row; μ = mean(x), v = mean((x - μ)²), r = 1/√(v + ε)
    (∂x̂/∂x: _standardize.py),
    with s = grad_y · w, the gradient of x̂:
    grad_x  = r · (s - mean(s) - x̂ · mean(s · x̂))                                            (1)
    grad_w  = Σ over rows of grad_y · x̂                                                       (2)
    grad_b  = Σ over rows of grad_y                                                           (3)
    tangent_y = r · (t - mean(t) - x̂ · mean(t · x̂)) · w + x̂ · tangent_w + tangent_b,  t = tangent_x     (4)

Saves:
    x (4 bytes per float32 element), w, and μ and r, one of each a row, which only the fused kernel uses.
    Half precision: x (2 bytes) and w alone; statistics and sums are made again in float32.

Edge values:
    A constant row: x̂ = 0, r = 1/√ε.   ±inf or NaN in a row: the whole row is NaN, as in torch.   D = 0, no rows: zeros.

Sources:
    Ba, Kiros, Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops import _pieces
from torchbp.ops._function import Context, entry, fused, is_half, public, widened
from torchbp.ops._op import Op
from torchbp.ops._range import in_float64, norms_in_range
from torchbp.ops._samples import Make, Sample
from torchbp.ops._samples import square as _square
from torchbp.ops.kernels import over_rows, over_rows_backward
from torchbp.ops.normalization._standardize import project, standardize

__all__ = ["LayerNorm", "LayerNormFunction", "layer_norm"]


_fused = torch.ops.aten.native_layer_norm_backward
# Rows up to which a GPU's kernel (torch 2.11) sums the parameters' gradients in float32, and rounds once.
_SUMMED_ONCE = 1 << 15


class LayerNormFunction(Function):
    """Layer normalization with hand-written gradients. Call it through :func:`layer_norm`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        made = over_rows(x, len(shape), weight, bias, eps)  # y: (*, D); mean, rstd: (*, 1)
        return torch.native_layer_norm(x, shape, weight, bias, eps) if made is None else made

    @staticmethod
    def setup_context(
        ctx: Context,
        inputs: tuple[Tensor, tuple[int, ...], Tensor | None, Tensor | None, float],
        output: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        x, shape, weight, bias, eps = inputs
        _, mean, rstd = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.shape, ctx.eps = shape, eps
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, *((None, None) if is_half(x) else (mean, rstd)))
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(
        ctx: Context, grad_y: Tensor | None, *_statistics: None
    ) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        if grad_y is None:
            return None, None, None, None, None
        x, weight, mean, rstd = ctx.saved_tensors
        need_x, _, need_weight, need_bias, _ = ctx.needs_input_grad
        if fused(grad_y, x, half=True) and not (need_bias and weight is None):
            need = [need_x, need_weight, need_bias]
            grads = over_rows_backward(grad_y, x, len(ctx.shape), weight, mean, ctx.eps, need)
            if grads is None and not is_half(x):
                grad_x, grad_weight, grad_bias = _fused(
                    grad_y, x, ctx.shape, mean, rstd, weight, weight, need
                )
                return grad_x, None, grad_weight, grad_bias, None
            if grads is None:
                grads = _by_rows(grad_y, x, ctx.shape, weight, ctx.eps, need)
            dtypes = (x.dtype, weight.dtype if need_weight else None, ctx.bias_dtype)
            grad_x, grad_weight, grad_bias = (
                None if g is None else g.to(dtype) for g, dtype in zip(grads, dtypes, strict=True)
            )
            return grad_x, None, grad_weight, grad_bias, None

        grad_x = grad_weight = grad_bias = None
        dims = tuple(range(-len(ctx.shape), 0))
        g = widened(grad_y)
        normalized, r = standardize(x, dims, ctx.eps)
        if need_x:
            s = g if weight is None else g * weight
            grad_x = project(s, normalized, r, dims).to(x.dtype)  # (1)
        if need_weight:
            grad_weight = (g * normalized).sum_to_size(ctx.shape).to(weight.dtype)  # (2)
        if need_bias:
            grad_bias = g.sum_to_size(ctx.shape).to(ctx.bias_dtype)  # (3)
        return grad_x, None, grad_weight, grad_bias, None

    @staticmethod
    def jvp(
        ctx: Context,
        tangent_x: Tensor | None,
        _shape: None,
        tangent_weight: Tensor | None,
        tangent_bias: Tensor | None,
        _eps: None,
    ) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        dims = tuple(range(-len(ctx.shape), 0))
        normalized, r = standardize(x, dims, ctx.eps)
        tangent_y = torch.zeros_like(normalized)  # (4)
        if tangent_x is not None:
            t = project(widened(tangent_x), normalized, r, dims)
            tangent_y = tangent_y + (t if weight is None else t * weight)
        if tangent_weight is not None:
            tangent_y = tangent_y + normalized * tangent_weight
        if tangent_bias is not None:
            tangent_y = tangent_y + tangent_bias
        return tangent_y.to(x.dtype), None, None


def _by_rows(
    grad_y: Tensor,
    x: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    eps: float,
    need: list[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of half precision, those of the parameters in float32.

    Given parameters in float32 the CPU's kernels have statistics in float32, compute so, and round once. But they sum
    the parameters' gradients in the dtype of x: 8192 rows of ones give 256. These are taken from float32, some rows at
    a time, which stay in the cache. The statistics are made again: kept, they would be bytes that torch does not keep.
    """
    width = (math.prod(shape),)
    rows = x.numel() // max(1, width[0])
    flat, g = x.reshape(rows, *width), grad_y.reshape(rows, *width)
    w = None if weight is None else weight.float().reshape(width)
    if not x.is_cpu:  # elsewhere they take one dtype
        dtypes = {t.dtype for t in (x, grad_y, weight) if t is not None}
        if x.is_cuda and rows <= _SUMMED_ONCE and len(dtypes) == 1:
            w = None if weight is None else weight.reshape(width)
        else:
            flat, g = flat.float(), g.float()
        _, mean, rstd = torch.native_layer_norm(flat, width, None, None, eps)
        grads = _fused(g, flat, width, mean, rstd, w, w, need)
        return tuple(
            None if t is None else t.view(s)
            for t, s in zip(grads, (x.shape, shape, shape), strict=True)
        )
    w = x.new_ones(width, dtype=torch.float32) if w is None else w
    _, mean, rstd = torch.native_layer_norm(flat, width, w, w, eps)
    grad_x = grad_weight = grad_bias = None
    if need[0]:
        of_x = _fused(g, flat, width, mean, rstd, w, w, [True, False, False])
        grad_x = of_x[0].view(x.shape)
    if need[1] or need[2]:
        some = max(1, _pieces.length_written(x) // max(1, width[0]))
        terms = [
            _fused(part.float(), wide.float(), width, m, r, w, w, [False, *need[1:]])[1:]
            for part, wide, m, r in zip(
                *(t.split(some) for t in (g, flat, mean, rstd)), strict=True
            )
        ]
        grad_weight, grad_bias = (
            torch.stack(of).sum(0).view(shape) if needed else None
            for of, needed in zip(zip(*terms, strict=True), need[1:], strict=True)
        )
    return grad_x, grad_weight, grad_bias


_layer_norm = entry(LayerNormFunction, again=LayerNormFunction.forward)


@public
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""Normalize over the last dimensions: :math:`y = (x - \mu) / \sqrt{v + \epsilon} \cdot w + b`.

    Args:
        input: ``(*, *normalized_shape)``, floating point.
        normalized_shape: Sizes of the last dimensions, over which mean :math:`\mu` and variance :math:`v` are taken.
        weight: ``normalized_shape``, or ``None`` for ones.
        bias: ``normalized_shape``, or ``None`` for zeros.
        eps: Added to the variance.

    Returns:
        Tensor of the shape and dtype of ``input``. Gradients of half-precision parameters are summed in float32.

    Raises:
        RuntimeError: Shapes do not fit, or ``input`` is no floating-point tensor.

    Example:
        >>> import torch
        >>> from torchbp.functional import layer_norm
        >>> layer_norm(torch.tensor([[1.0, 2.0, 3.0]]), (3,))
        tensor([[-1.2247,  0.0000,  1.2247]])
    """
    shape = tuple(normalized_shape)
    y, _, r = _layer_norm(input, shape, weight, bias, eps)
    return y if norms_in_range(r) else in_float64(layer_norm, input, shape, weight, bias, eps)


class LayerNorm(nn.LayerNorm):
    """Module form of :func:`layer_norm`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


def _samples(make: Make) -> Iterator[Sample]:
    for shape in ((4, 3), (3,), (2, 4, 3), (0, 3), (4, 1)):
        last = shape[-1:]
        args = (make.normal(*shape), last, make.normal(*last), make.normal(*last))
        yield Sample(args, name="x".join(map(str, shape)))
    args = (make.normal(2, 3, 4), (3, 4), make.normal(3, 4), make.normal(3, 4))
    yield Sample(args, name="two-dims")
    yield Sample((make.normal(4, 3), [3]), {"eps": 1e-2}, name="plain")
    yield Sample((make.normal(4, 3), (3,), make.normal(3)), name="no-bias")
    yield Sample((make.normal(4, 3), (3,)), {"bias": make.normal(3)}, name="no-weight")
    frozen = make.normal(3, requires_grad=False)
    yield Sample((make.normal(4, 3), (3,), frozen, make.normal(3)), name="frozen-weight")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    x = make.normal(2, 4, 3)
    yield LayerNorm, Sample((3,)), Sample((x,))
    yield LayerNorm, Sample(((4, 3),), {"eps": 1e-3}), Sample((x,), name="two-dims")
    yield LayerNorm, Sample((3,), {"elementwise_affine": False}), Sample((x,), name="not-affine")
    yield LayerNorm, Sample((3,), {"bias": False}), Sample((x,), name="no-bias")


def _errors(make: Make) -> Iterator[Sample]:
    yield Sample((make.normal(4, 3), (4,)), name="shape")
    yield Sample((make.normal(4, 3), ()), name="no-shape")
    yield Sample((make.normal(4, 3), (3,), make.normal(4)), name="weight")
    yield Sample((make.labels(4, 3, classes=5), (3,)), name="integers")


def _benchmark(make: Make, n: int) -> Sample:
    (x,) = _square(make, n).args
    last = x.shape[-1:]
    return Sample((x, tuple(last), make.normal(*last), make.normal(*last)))


def _saved_bytes(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
) -> int:
    size = x.element_size()
    rows = x[(..., *(0 for _ in shape))].numel() if x.numel() else 0
    statistics = 0 if is_half(x) else 2 * rows * size
    return x.numel() * size + (0 if weight is None else weight.numel() * size) + statistics


OP = Op(
    function=layer_norm,
    modules=(LayerNorm,),
    reference=F.layer_norm,
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=_saved_bytes,
    benchmark=_benchmark,
    fused="aten::native_layer_norm_backward",
)
