r"""Dynamic tanh: y = tanh(α · x) · w + b, in the place of a normalization; α is one learnt number.

Derivation, with z = tanh(α x), dz/d(α x) = 1 - z², and s = grad_y · w · (1 - z²), the gradient of α x:
    grad_x = α · s                                                                            (1)
    grad_α = Σ s · x                                                                          (2)
    grad_w = Σ over rows of grad_y · z                                                        (3)
    grad_b = Σ over rows of grad_y                                                            (4)
    tangent_y = w · (1 - z²) · (α · tangent_x + x · tangent_α) + z · tangent_w + tangent_b    (5)
    In half precision 1 - z² is taken in float32: in bfloat16 it would be 0 from α x = 3.47 on.

Saves:
    x (4 bytes per float32 element, 2 in half precision), α and w; z is made again. Autograd keeps x and z.

Edge values:
    x → ±∞: y → b ± w, grad_x → 0; at ±∞ itself grad_α is NaN (0 · ∞).

Sources:
    Zhu, Chen, He, LeCun, Liu, "Transformers without Normalization", 2025, arXiv:2503.10622.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._errors import wrong
from torchbp.ops._function import Context, as_dtype, entry, fused, public, widened
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample, square
from torchbp.ops.activations._tanh import TORCHS_IS_FAST, tanh
from torchbp.ops.kernels import in_one_loop
from torchbp.ops.normalization._dyt_rows import gradients_along_rows
from torchbp.ops.normalization._standardize import affine

__all__ = ["DyT", "DyTFunction", "dyt"]


class DyTFunction(Function):
    """Dynamic tanh with hand-written gradients. Call it through :func:`dyt`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # (*, D), (), (D,), (D,) -> (*, D)
        x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        given = [t for t in (weight, bias) if t is not None]
        if len(given) != 1:
            y = in_one_loop(_affine_tanh if given else _tanh, x, alpha, *given)
            if y is not None:
                return y
        u = widened(x) * alpha
        y = u.tanh_() if TORCHS_IS_FAST and fused(u) else tanh(u)
        return as_dtype(affine(y, weight, bias), x.dtype)

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None], output: Tensor
    ) -> None:
        x, alpha, weight, bias = inputs
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        ctx.along_rows = x.numel() > 0 and _is_vector(weight, x) and _is_vector(bias, x)
        ctx.save_for_backward(x, alpha, weight)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha, weight = ctx.saved_tensors
        need_x, need_alpha, need_weight, need_bias = ctx.needs_input_grad
        if ctx.along_rows:
            needs = ctx.needs_input_grad
            made = gradients_along_rows(grad_y, x, alpha, weight, needs, ctx.bias)
            if made is not None:
                return made
        grad_x = grad_alpha = grad_weight = grad_bias = None
        g, wide = widened(grad_y), widened(x)
        z = torch.tanh(wide * alpha)
        if need_weight:
            grad_weight = (g * z).sum_to_size(weight.shape).to(weight.dtype)  # (3)
        if need_bias:
            bias_shape, bias_dtype = ctx.bias
            grad_bias = g.sum_to_size(bias_shape).to(bias_dtype)  # (4)
        if need_x or need_alpha:
            s = (g if weight is None else g * weight) * (1 - z * z)
            grad_x = (s * alpha).to(x.dtype) if need_x else None  # (1)
            if need_alpha:
                grad_alpha = (s * wide).sum_to_size(alpha.shape).to(alpha.dtype)  # (2)
        return grad_x, grad_alpha, grad_weight, grad_bias

    @staticmethod
    def jvp(ctx: Context, *tangents: Tensor | None) -> Tensor:
        x, alpha, weight = ctx.saved_tensors
        tangent_x, tangent_alpha, tangent_weight, tangent_bias = tangents
        wide = widened(x)
        z = torch.tanh(wide * alpha)
        change = torch.zeros_like(z)  # (5)
        if tangent_x is not None:
            change = change + alpha * tangent_x
        if tangent_alpha is not None:
            change = change + wide * tangent_alpha
        tangent_y = change * (1 - z * z)
        tangent_y = tangent_y if weight is None else tangent_y * weight
        if tangent_weight is not None:
            tangent_y = tangent_y + z * tangent_weight
        if tangent_bias is not None:
            tangent_y = tangent_y + tangent_bias
        return tangent_y.to(x.dtype)


def _tanh(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.tanh(x * alpha)


def _affine_tanh(x: Tensor, alpha: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(x * alpha) * w + b


def _is_vector(t: Tensor | None, x: Tensor) -> bool:
    """Whether ``t`` has one element for each of a row of ``x``."""
    return t is None or (t.dim() == 1 and x.dim() > 0 and t.size(0) == x.size(-1))


_dyt = entry(DyTFunction, again=DyTFunction.forward)


@public
def dyt(
    input: Tensor, alpha: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    r"""Dynamic tanh: :math:`y = \tanh(\alpha x) \cdot w + b`.

    Args:
        input: ``(*, D)``, floating point.
        alpha: One number, ``()`` or ``(1,)``: the slope at 0.
        weight: ``(D,)``, or what can be expanded to ``input``; ``None`` for ones.
        bias: As ``weight``; ``None`` for zeros.

    Returns:
        Tensor of the shape and dtype of ``input``, within ``b ± |w|``.

    Raises:
        RuntimeError: Shapes do not fit.
        NotImplementedError: ``input`` is no floating-point tensor.

    Example:
        >>> import torch
        >>> from torchbp.functional import dyt
        >>> dyt(torch.tensor([[0.0, 2.0]]), torch.tensor(0.5))
        tensor([[0.0000, 0.7616]])
    """
    _check(input)
    return _dyt(input, alpha, weight, bias)


def _check(input: Tensor) -> None:
    if not input.is_floating_point():
        rule = "floating-point input"
        raise NotImplementedError(wrong("dyt", rule, input.dtype, "cast it first"))


class DyT(nn.Module):
    """Module form of :func:`dyt`, with learnt α, weight and bias.

    Args:
        normalized_shape: Shape of weight and bias: the last dimensions of the input, as of a LayerNorm.
        alpha_init: What α starts from.
        device: Device of the parameters.
        dtype: Their dtype.
    """

    __module__ = "torchbp.nn"

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        alpha_init: float = 0.5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        single = isinstance(normalized_shape, int)
        self.normalized_shape = (normalized_shape,) if single else tuple(normalized_shape)
        self.alpha_init = alpha_init
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(self.normalized_shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(self.normalized_shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set α to ``alpha_init``, weight to 1 and bias to 0."""
        nn.init.constant_(self.alpha, self.alpha_init)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return dyt(input, self.alpha, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, alpha_init={self.alpha_init}"


def _reference(
    input: Tensor, alpha: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    _check(input)
    y = torch.tanh(alpha * input)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _samples(make: Make) -> Iterator[Sample]:
    for dims in ((4, 3), (3,), (2, 4, 3), (0, 3)):
        args = (make.normal(*dims), make.normal(1), make.normal(3), make.normal(3))
        yield Sample(args, name="x".join(map(str, dims)))
    yield Sample((make.normal(4, 3), make.normal()), name="plain")
    args = (make.normal(2, 3, 4), make.normal(1), make.normal(3, 1), make.normal(3, 1))
    yield Sample(args, name="channels")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield DyT, Sample((3,)), Sample((make.normal(4, 3),))
    yield DyT, Sample(((4, 3), 0.8)), Sample((make.normal(2, 4, 3),), name="two-dims")


def _errors(make: Make) -> Iterator[Sample]:
    yield Sample((make.normal(4, 3), make.normal(1), make.normal(4)), name="weight")
    yield Sample((make.labels(4, 3, classes=5), make.normal(1)), name="integers")


def _benchmark(make: Make, n: int) -> Sample:
    (x,) = square(make, n).args
    last = x.shape[-1:]
    return Sample((x, make.normal(1), make.normal(*last), make.normal(*last)))


def _saved_bytes(
    x: Tensor, alpha: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> int:
    elements = x.numel() + alpha.numel() + (0 if weight is None else weight.numel())
    return elements * x.element_size()


OP = Op(
    function=dyt,
    modules=(DyT,),
    reference=_reference,
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=_saved_bytes,
    benchmark=_benchmark,
    fused="aten::tanh_backward",
)
