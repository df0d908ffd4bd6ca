r"""Bilinear: y_o = x₁ᵀ W_o x₂ + b_o.

Derivation, per row n of x₁ (N, I) and x₂ (N, J), with W (O, I, J), b (O,); p = x₁ ⊗ x₂ is (N, I · J), and W (O, I · J):
    y[n, o] = Σ_ij p[n, ij] · W[o, ij] + b[o]                             y = p · Wᵀ + b
    grad_p[n, ij]  = Σ_o grad_y[n, o] · conj(W[o, ij])                    grad_p = grad_y · conj(W)       (1)
    grad_x₁[n, i]  = Σ_j grad_p[n, ij] · conj(x₂[n, j])                                                   (2)
    grad_x₂[n, j]  = Σ_i grad_p[n, ij] · conj(x₁[n, i])                                                   (3)
    grad_W[o, ij]  = Σ_n grad_y[n, o] · conj(p[n, ij])                    grad_W = grad_yᵀ · conj(p)      (4)
    grad_b[o]      = Σ_n grad_y[n, o]                                                                     (5)
    tangent_y      = y(tangent_x₁, x₂, W) + y(x₁, tangent_x₂, W) + y(x₁, x₂, tangent_W) + tangent_b       (6)

Saves:
    x₁, x₂, W: what the products need. p is made again, some rows at a time, so that it never takes more than 16 MiB in
    float32.

Edge values:
    None of its own. N = 0 gives zero gradients for W and b. Half precision is computed and summed in float32.

Sources:
    Tenenbaum, Freeman, "Separating Style and Content with Bilinear Models", 2000, doi:10.1162/089976600300015349.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._autocast import autocasts
from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import Context, entry, in_float32, public, widened
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample

__all__ = ["Bilinear", "BilinearFunction", "bilinear"]

_PRODUCTS_AT_ONCE = 2**22


class BilinearFunction(Function):
    """Bilinear map with hand-written gradients. Call it through :func:`bilinear`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # (N, I), (N, J), (O, I, J), (O,) -> (N, O)
        x1: Tensor, x2: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        tensors = (x1, x2, weight) if bias is None else (x1, x2, weight, bias)
        return in_float32(_value, *tensors)

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor
    ) -> None:
        x1, x2, weight, bias = inputs
        need_1, need_2, need_weight, _ = ctx.needs_input_grad
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.weight_shape = weight.shape
        ctx.save_for_backward(
            x1 if need_2 or need_weight else None,
            x2 if need_1 or need_weight else None,
            weight if need_1 or need_2 else None,
        )
        ctx.save_for_forward(x1, x2, weight)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x1, x2, weight = (t if t is None else widened(t) for t in ctx.saved_tensors)
        need_1, need_2, need_weight, need_bias = ctx.needs_input_grad
        g = widened(grad_y)
        _, rows, columns = ctx.weight_shape
        parts: list[list[Tensor]] = [[], [], []]
        for part in _parts(g.shape[0], rows * columns):
            if need_1 or need_2:
                grad_p = g[part] @ weight.reshape(-1, rows * columns).conj()  # (1)
                grad_p = grad_p.reshape(-1, rows, columns)
                if need_1:
                    parts[0].append((grad_p * x2[part].unsqueeze(1).conj()).sum(2))  # (2)
                if need_2:
                    parts[1].append((grad_p * x1[part].unsqueeze(2).conj()).sum(1))  # (3)
            if need_weight:
                p = _products(x1[part], x2[part])
                parts[2].append((g[part].mT @ p.conj()).reshape(ctx.weight_shape))  # (4)
        grads = [
            _joined(parts[0]) if need_1 else None,
            _joined(parts[1]) if need_2 else None,
            sum(parts[2][1:], parts[2][0]) if need_weight else None,
        ]
        grad_bias = g.sum(0).to(ctx.bias_dtype) if need_bias else None  # (5)
        return *(None if t is None else t.to(grad_y.dtype) for t in grads), grad_bias

    @staticmethod
    def jvp(ctx: Context, *tangents: Tensor | None) -> Tensor:
        saved = ctx.saved_tensors
        x1, _, weight = saved
        tangent_y = torch.zeros_like(x1[:, :1] * weight[:, 0, 0])  # (6)
        for i, tangent in enumerate(tangents[:3]):
            if tangent is not None:
                changed = [tangent if i == j else t for j, t in enumerate(saved)]
                tangent_y = tangent_y + in_float32(_value, *changed)
        return tangent_y if tangents[3] is None else tangent_y + tangents[3]


def _parts(count: int, width: int) -> list[slice]:
    """Return slices of the rows, of at most ``_PRODUCTS_AT_ONCE`` products each; one at least."""
    step = max(1, _PRODUCTS_AT_ONCE // max(1, width))
    if count <= step:
        return [slice(None)]
    return [slice(start, start + step) for start in range(0, count, step)]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _products(x1: Tensor, x2: Tensor) -> Tensor:  # (N, I), (N, J) -> (N, I * J)
    return (x1.unsqueeze(2) * x2.unsqueeze(1)).reshape(x1.shape[0], x1.shape[1] * x2.shape[1])


def _value(x1: Tensor, x2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    flat = weight.reshape(weight.shape[0], weight.shape[1] * weight.shape[2])
    parts = _parts(x1.shape[0], flat.shape[1])
    kind = x1.device.type
    # autocast would round the products, which F.bilinear leaves in float32
    exact = torch.autocast(kind, enabled=False) if autocasts(kind) else nullcontext()
    with exact:
        return _joined([F.linear(_products(x1[part], x2[part]), flat, bias) for part in parts])


_bilinear = entry(BilinearFunction)


@public
def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Bilinear form of two vectors: :math:`y_o = x_1^T W_o x_2 + b_o`.

    Args:
        input1: ``(*, I)``, floating point, complex or integers.
        input2: ``(*, J)``, equal to ``input1`` in all but the last dimension.
        weight: ``(O, I, J)``, of the dtype of the inputs.
        bias: ``(O,)``, or ``None`` for zeros.

    Returns:
        Tensor ``(*, O)``.

    Raises:
        RuntimeError: Shapes or dtypes do not fit.
        IndexError: ``weight`` has fewer than three dimensions.

    Example:
        >>> import torch
        >>> from torchbp.functional import bilinear
        >>> x, y, identity = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.eye(2)
        >>> bilinear(x, y, identity[None])
        tensor([[11.]])
    """
    if weight.dim() < 3:
        rule = "weight of shape (O, I, J)"
        raise IndexError(wrong("bilinear", rule, shape(weight), "O outputs of I and J features"))
    outputs, rows, columns = weight.shape[:3]
    for name, wanted, x in (("input1", rows, input1), ("input2", columns, input2)):
        if x.dim() == 0 or x.shape[-1] != wanted:
            rule = f"{name} of shape (*, {wanted}) for a weight of shape {shape(weight)}"
            advice = "the last dimension holds the features"
            raise RuntimeError(wrong("bilinear", rule, shape(x), advice))
    if input1.shape[:-1] != input2.shape[:-1]:
        rule = f"input2 of shape {(*input1.shape[:-1], columns)}"
        advice = "all dimensions but the last are equal"
        raise RuntimeError(wrong("bilinear", rule, shape(input2), advice))
    if bias is not None and tuple(bias.shape) != (outputs,):
        rule = f"bias of shape {(outputs,)}"
        raise RuntimeError(wrong("bilinear", rule, shape(bias), "one an output"))
    if input1.device.type != "cpu" and autocasts(input1.device.type):
        input1, input2, weight, bias = _promoted(input1, input2, weight, bias)
    dtypes = {t.dtype for t in (input1, input2, weight)}
    if len(dtypes) > 1:
        found = ", ".join(sorted(map(str, dtypes)))
        raise RuntimeError(wrong("bilinear", "one dtype", found, "cast the inputs or the weight"))
    count = math.prod(input1.shape[:-1])
    y = _bilinear(input1.reshape(count, rows), input2.reshape(count, columns), weight, bias)
    return y.reshape(*input1.shape[:-1], outputs)


def _promoted(*tensors: Any) -> tuple[Any, ...]:
    """Cast to the widest dtype, as torch does under autocast."""
    widest = max((t.dtype for t in tensors if t is not None), key=lambda dtype: dtype.itemsize)
    return tuple(None if t is None else t.to(widest) for t in tensors)


class Bilinear(nn.Bilinear):
    """Module form of :func:`bilinear`; initialised as torch's: uniform in ±1/√I."""

    __module__ = "torchbp.nn"

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        return bilinear(input1, input2, self.weight, self.bias)


def _samples(make: Make) -> Iterator[Sample]:
    for dims in ((3,), (), (2, 2), (0,)):
        tensors = (make.normal(*dims, 3), make.normal(*dims, 2), make.normal(4, 3, 2))
        yield Sample((*tensors, make.normal(4)), name="x".join(map(str, dims)) or "vector")
    x1, x2, weight = make.normal(3, 3), make.normal(3, 2), make.normal(4, 3, 2)
    yield Sample((x1, x2, weight), name="no-bias")
    frozen = make.normal(4, 3, 2, requires_grad=False)
    yield Sample((make.normal(3, 3), make.normal(3, 2), frozen), name="frozen-weight")
    data = make.normal(3, 2, requires_grad=False)
    args = (make.normal(3, 3), data, make.normal(4, 3, 2), make.normal(4))
    yield Sample(args, name="data-input")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield Bilinear, Sample((3, 2, 4)), Sample((make.normal(5, 3), make.normal(5, 2)))
    no_bias = Sample((3, 2, 4), {"bias": False})
    yield Bilinear, no_bias, Sample((make.normal(5, 3), make.normal(5, 2)), name="no-bias")


def _errors(make: Make) -> Iterator[Sample]:
    x1, x2, weight = make.normal(4, 3), make.normal(4, 2), make.normal(5, 3, 2)
    yield Sample((x1, x2, make.normal(5, 3, 3)), name="features")
    yield Sample((x1, x2[:1], weight), name="rows")
    yield Sample((x1, x2[0], weight), name="dimensions")
    yield Sample((x1, x2, weight, make.normal(4)), name="bias")
    yield Sample((x1, x2, make.normal(5, 3)), name="weight-2d")
    yield Sample((x1.half(), x2, weight), name="dtypes")


def _benchmark(make: Make, n: int) -> Sample:
    side = max(4, round(n ** (1 / 3)))
    return Sample((*(make.normal(side, side) for _ in range(2)), make.normal(side, side, side)))


def _saved_bytes(x1: Tensor, x2: Tensor, weight: Tensor, bias: Tensor | None = None) -> int:
    kept = (
        (x1, x2.requires_grad or weight.requires_grad),
        (x2, x1.requires_grad or weight.requires_grad),
        (weight, x1.requires_grad or x2.requires_grad),
    )
    return sum(t.numel() * t.element_size() for t, needed in kept if needed)


OP = Op(
    function=bilinear,
    modules=(Bilinear,),
    reference=F.bilinear,
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=_saved_bytes,
    benchmark=_benchmark,
)
