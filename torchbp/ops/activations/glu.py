r"""GLU: y = a · σ(b), where a and b are the two halves of x along a dimension.

Derivation, with σ' = σ(b) · σ(-b):
    grad_a = grad_y · σ(b)                                                                     (1)
    grad_b = grad_y · a · σ(b) · σ(-b)                                                         (2)
    tangent_y = σ(b) · tangent_a + a · σ(b) · σ(-b) · tangent_b                                (3)

Saves:
    x, in its own dtype: 4 bytes per float32 element, as torch.

Edge values:
    b → +∞: y → a.   b → -∞: y → 0 (a finite), and both gradients → 0.   NaN gives NaN.

Sources:
    Dauphin, Fan, Auli, Grangier, "Language Modeling with Gated Convolutional Networks", 2016, arXiv:1612.08083.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _nn  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._function import Context, entry, fused, is_half, kernel, public, undifferentiated
from torchbp.ops._op import Op
from torchbp.ops._pieces import in_row_pieces
from torchbp.ops._samples import Make, Sample
from torchbp.ops.activations._gated import halves_in_one_loop
from torchbp.ops.kernels import MANY, in_one_loop, many

__all__ = ["GLU", "GLUFunction", "glu"]

_glu_backward = kernel("glu_backward")


class GLUFunction(Function):
    """Gated linear unit with a hand-written gradient. Call it through :func:`glu`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:  # (*, 2D, *) -> (*, D, *)
        if isinstance(x, Tensor) and many(x, 2 * MANY) and x.size(dim) % 2 == 0:
            y = in_one_loop(_value, *x.unsafe_chunk(2, dim))
            if y is not None:
                return y
        # F.glu asks again who else answers, 0.3 µs; what is no tensor, or has no dimensions, it refuses
        return _nn.glu(x, dim) if isinstance(x, Tensor) and x.dim() else F.glu(x, dim)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, int], output: Tensor) -> None:
        x, ctx.dim = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if many(x, 2 * MANY):
            grad_x = halves_in_one_loop(_in_a_loop, grad_y, x, ctx.dim)
            if grad_x is not None:
                return grad_x, None
        # a GPU's kernel computes half precision in float32, as in_row_pieces would here
        if undifferentiated() and (not is_half(x) or x.is_cuda):
            return _glu_backward(grad_y, x, ctx.dim), None

        def formula(v: Tensor, x: Tensor) -> Tensor:
            if fused(v, x):  # a piece of half precision, in float32
                return _glu_backward(v, x, ctx.dim)
            by_a, by_b = _derivatives(x, ctx.dim)
            return torch.cat([v * by_a, v * by_b], ctx.dim)  # (1), (2)

        return in_row_pieces(formula, ctx.dim, grad_y, x), None

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, _: None) -> Tensor:
        (x,) = ctx.saved_tensors

        def formula(v: Tensor, x: Tensor) -> Tensor:
            by_a, by_b = _derivatives(x, ctx.dim)
            tangent_a, tangent_b = v.chunk(2, ctx.dim)
            return by_a * tangent_a + by_b * tangent_b  # (3)

        return in_row_pieces(formula, ctx.dim, tangent_x, x)


def _value(a: Tensor, b: Tensor) -> Tensor:
    return a * torch.sigmoid(b)


def _in_a_loop(v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    e = torch.exp(-b.abs())
    s = e / (1 + e)  # σ(-|b|), whose complement is exact
    return v * torch.where(b < 0, s, 1 - s), v * a * (s - s * s)  # (1), (2)


def _derivatives(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return ∂y/∂a and ∂y/∂b."""
    a, b = x.chunk(2, dim)
    s = torch.sigmoid(b)
    return s, a * s * torch.sigmoid(-b)


_glu = entry(GLUFunction, again=GLUFunction.forward)


@public
def glu(input: Tensor, dim: int = -1) -> Tensor:
    r"""Gated linear unit: :math:`y = a \cdot \sigma(b)`, the second half of ``input`` gating the first.

    Args:
        input: ``(*, 2D, *)``, floating point.
        dim: The dimension that is halved.

    Returns:
        ``(*, D, *)``, of the dtype of ``input``.

    Raises:
        TypeError: ``input`` is not a tensor.
        RuntimeError: The dimension is odd, ``input`` is a scalar or no floating-point tensor.
        IndexError: ``input`` has no dimension ``dim``.

    Example:
        >>> import torch
        >>> from torchbp.functional import glu
        >>> glu(torch.tensor([1.0, 2.0, 0.0, 3.0]))
        tensor([0.5000, 1.9051])
    """
    return _glu(input, dim)


class GLU(nn.GLU):
    """Module form of :func:`glu`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return glu(input, self.dim)


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield GLU, Sample(), Sample((make.normal(3, 4),))
    yield GLU, Sample((0,)), Sample((make.normal(4, 3),), name="dim")


OP = Op(
    function=glu,
    modules=(GLU,),
    reference=F.glu,
    samples=_samples.halved,
    module_samples=_module_samples,
    errors=_samples.halved_errors,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=_samples.square,
    fused="aten::glu_backward",
)
