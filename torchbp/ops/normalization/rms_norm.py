r"""Root mean square normalization: y = x̂ · w with x̂ = x · r, over the last dimensions ("normalized_shape", D elements).

Derivation, for one row; q = mean(x²), r = 1/√(q + ε), no mean is subtracted:
    ∂r/∂x_i = -r³ x_i/D,   ∂x̂_j/∂x_i = r δ_ij - r x̂_i x̂_j/D
    with s = grad_y · conj(w), the gradient of x̂:
    grad_x  = conj(r) · (s - conj(x̂) · mean(s · conj(x̂)))                                     (1)
    grad_w  = Σ over rows of grad_y · conj(x̂)                                                 (2)
    tangent_y = r · (t - x̂ · mean(t · x̂)) · w + x̂ · tangent_w,   t = tangent_x                (3)
    Complex: q is the mean of x², as in torch, not of |x|².

Saves:
    x and w: 4 bytes per float32 element, 2 in half precision. r is made again: one reading of x.

Edge values:
    A row of zeros: y = 0, r = 1/√ε.   x² overflows: in float64.   ±inf or NaN: NaN in that row.

Sources:
    Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import Context, eager, entry, fused, is_half, public, widened
from torchbp.ops._op import Op
from torchbp.ops._range import in_float64, in_range
from torchbp.ops._samples import Make, Sample, square
from torchbp.ops.kernels import over_rows, over_rows_backward
from torchbp.ops.normalization._rms_rows import by_rows, of_few, rstd
from torchbp.ops.normalization._standardize import affine

__all__ = ["RMSNorm", "RMSNormFunction", "rms_norm"]

_forward = torch.ops.aten._fused_rms_norm
_backward = torch.ops.aten._fused_rms_norm_backward
_FEW = 1 << 12  # elements


class RMSNormFunction(Function):
    """Root mean square normalization with hand-written gradients. Call it through :func:`rms_norm`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # (*, D), (D,) -> (*, D)
        x: Tensor, dims: tuple[int, ...], weight: Tensor | None, eps: float
    ) -> Tensor:
        if eager() and _on_gpu(x, weight):
            return _forward(x.contiguous(), x.shape[-len(dims) :], weight, eps)[0]
        made = over_rows(x, len(dims), weight, None, eps, centred=False)
        if made is not None:
            return made[0]
        wide = widened(x)
        y = wide * rstd(wide, dims, eps)
        y = affine(y, weight).contiguous()  # as torch's, whatever the layout of x
        return y if wide is x else y.to(x.dtype)

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, tuple[int, ...], Tensor | None, float], output: Tensor
    ) -> None:
        x, ctx.dims, weight, ctx.eps = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(
        ctx: Context, grad_y: Tensor | None
    ) -> tuple[Tensor | None, None, Tensor | None, None]:
        if grad_y is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        need_x, _, need_weight, _ = ctx.needs_input_grad
        if _on_gpu(x, weight) and fused(grad_y, half=True):
            grad_x, grad_weight = _by_gpu(grad_y, x, weight, ctx.dims, ctx.eps)
            return grad_x if need_x else None, None, grad_weight if need_weight else None, None
        grads = over_rows_backward(
            grad_y,
            x,
            len(ctx.dims),
            weight,
            None,
            ctx.eps,
            (need_x, need_weight, False),
            centred=False,
        )
        if grads is not None:
            grad_x, grad_weight, _ = grads
            if grad_weight is not None:
                grad_weight = grad_weight.to(weight.dtype)
            return grad_x, None, grad_weight, None
        if fused(grad_y, x) and not x.is_complex() and x.numel():
            made = of_few if x.numel() <= _FEW and need_x else by_rows
            grad_x, grad_weight = made(grad_y, x, weight, ctx.dims, ctx.eps, need_x, need_weight)
            return grad_x, None, grad_weight, None

        g, wide = widened(grad_y), widened(x)
        r = rstd(wide, ctx.dims, ctx.eps)
        normalized = wide * r
        grad_x = grad_weight = None
        if need_x:
            s = g if weight is None else g * weight.conj()
            grad_x = _project(s, normalized.conj(), r.conj(), ctx.dims).to(x.dtype)  # (1)
        if need_weight:
            grad_weight = (g * normalized.conj()).sum_to_size(weight.shape).to(weight.dtype)  # (2)
        return grad_x, None, grad_weight, None

    @staticmethod
    def jvp(
        ctx: Context, tangent_x: Tensor | None, _dims: None, tangent_weight: Tensor | None, _: None
    ) -> Tensor:
        x, weight = ctx.saved_tensors
        wide = widened(x)
        r = rstd(wide, ctx.dims, ctx.eps)
        normalized = wide * r
        tangent_y = torch.zeros_like(normalized)  # (3)
        if tangent_x is not None:
            t = _project(widened(tangent_x), normalized, r, ctx.dims)
            tangent_y = tangent_y + (t if weight is None else t * weight)
        if tangent_weight is not None:
            tangent_y = tangent_y + normalized * tangent_weight
        return tangent_y.to(x.dtype)


def _on_gpu(x: Tensor, weight: Tensor | None) -> bool:
    """Whether a GPU's kernels take these: they compute and sum half precision in float32."""
    one_dtype = weight is None or weight.dtype == x.dtype
    return x.is_cuda and x.is_floating_point() and x.numel() > 0 and one_dtype


def _by_gpu(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, dims: tuple[int, ...], eps: float
) -> tuple[Tensor, Tensor]:
    """Return (1) and (2); r is made again, in one pass over x."""
    shape = x.shape[-len(dims) :]
    dtype = torch.float32 if is_half(x) else x.dtype
    norm = torch.linalg.vector_norm(x, 2, dims, keepdim=True, dtype=dtype)
    r = torch.rsqrt(norm.square() / math.prod(shape) + eps)
    needs = [True, weight is not None]
    return _backward(grad_y.contiguous(), x.contiguous(), shape, r, weight, needs)


def _project(s: Tensor, normalized: Tensor, r: Tensor, dims: tuple[int, ...]) -> Tensor:
    return r * (s - normalized * (s * normalized).mean(dims, keepdim=True))


_rms_norm = entry(RMSNormFunction, again=RMSNormFunction.forward)


@public
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    r"""Divide by the root mean square of the last dimensions: :math:`y = x / \sqrt{\overline{x^2} + \epsilon} \cdot w`.

    Args:
        input: ``(*, *normalized_shape)``, floating point or complex.
        normalized_shape: Sizes of the last dimensions, over which the mean square is taken.
        weight: ``normalized_shape``, or ``None`` for ones.
        eps: Added to the mean square; ``None`` for the machine epsilon of ``input``, of float32 in half precision.

    Returns:
        Tensor of the shape and dtype of ``input``. Half precision is computed and summed in float32.

    Raises:
        RuntimeError: Shapes do not fit.
        NotImplementedError: ``input`` is of integers.

    Example:
        >>> import torch
        >>> from torchbp.functional import rms_norm
        >>> rms_norm(torch.tensor([[3.0, 4.0]]), (2,))
        tensor([[0.8485, 1.1314]])
    """
    last = tuple(normalized_shape)
    if not last or tuple(input.shape[-len(last) :]) != last:
        rule = f"input of shape (*, {', '.join(map(str, last)) or 'at least one size'})"
        advice = "normalized_shape holds the sizes of its last dimensions"
        raise RuntimeError(wrong("rms_norm", rule, shape(input), advice))
    if weight is not None and tuple(weight.shape) != last:
        rule = f"weight of the normalized shape {last}"
        raise RuntimeError(wrong("rms_norm", rule, shape(weight), "one factor an element of a row"))
    if not (input.is_floating_point() or input.is_complex()):
        rule = "floating-point or complex input"
        raise NotImplementedError(wrong("rms_norm", rule, input.dtype, "cast it first"))
    if eps is None:
        eps = torch.finfo(torch.float32 if is_half(input) else input.dtype).eps
    y = _rms_norm(input, tuple(range(-len(last), 0)), weight, eps)
    return y if in_range(input) else in_float64(rms_norm, input, last, weight, eps)


class RMSNorm(nn.RMSNorm):
    """Module form of :func:`rms_norm`."""

    __module__ = "torchbp.nn"

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)


def _samples(make: Make) -> Iterator[Sample]:
    for dims in ((4, 3), (3,), (2, 4, 3), (0, 3), (4, 1)):
        last = dims[-1:]
        args = (make.normal(*dims), last, make.normal(*last), 1e-5)
        yield Sample(args, name="x".join(map(str, dims)))
    yield Sample((make.normal(2, 3, 4), (3, 4), make.normal(3, 4)), {"eps": 1e-3}, name="two-dims")
    yield Sample((make.normal(4, 3), [3]), name="plain")
    frozen = make.normal(3, requires_grad=False)
    yield Sample((make.normal(4, 3), (3,), frozen), name="frozen-weight")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    x = make.normal(2, 4, 3)
    yield RMSNorm, Sample((3,)), Sample((x,))
    yield RMSNorm, Sample(((4, 3), 1e-3)), Sample((x,), name="two-dims")
    yield RMSNorm, Sample((3,), {"elementwise_affine": False}), Sample((x,), name="not-affine")


def _errors(make: Make) -> Iterator[Sample]:
    yield Sample((make.normal(4, 3), (4,)), name="shape")
    yield Sample((make.normal(4, 3), ()), name="no-shape")
    yield Sample((make.normal(4, 3), (3,), make.normal(4)), name="weight")
    yield Sample((make.labels(4, 3, classes=5), (3,)), name="integers")


def _benchmark(make: Make, n: int) -> Sample:
    (x,) = square(make, n).args
    return Sample((x, x.shape[-1:], make.normal(*x.shape[-1:])))


def _saved_bytes(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, *_: object, **__: object
) -> int:
    return (x.numel() + (0 if weight is None else weight.numel())) * x.element_size()


OP = Op(
    function=rms_norm,
    modules=(RMSNorm,),
    reference=F.rms_norm,
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=_saved_bytes,
    benchmark=_benchmark,
)
