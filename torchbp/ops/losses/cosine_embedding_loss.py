r"""Cosine embedding: ℓ = 1 - c where t = 1, max(0, c - m) where t = -1, c the cosine of a and b, then reduced.

c = a·b / √(A B), A = a·a + ε, B = b·b + ε, ε = 1e-12. Any other t gives 0.

Derivation, with s the gradient of each ℓ (grad for "none" and "sum", grad / N for "mean"):
    k = ∂ℓ/∂c = -[t = 1] + [t = -1] [c > m]
    ∂c/∂a = b / √(A B) - c a / A
    grad_a = s k · (b / √(A B) - c a / A)                                                     (1)
    grad_b = s k · (a / √(A B) - c b / B)                                                     (2)
    tangent_ℓ = Σ over the row of gradient · tangent, for a and b, with s = 1                 (3)

Saves:
    a, b and t, which are inputs, and three sums of each row, which only the eager backward reads.

Edge values:
    a = 0: c = 0 and the slope b / √(ε B).   c = m, t = -1: [c > m] is torch's, 1 until
    torch 2.13, then 0 (_clamp.py).   No rows: the mean is NaN.

Sources:
    torch.nn.CosineEmbeddingLoss, whose values, gradients and reductions these are.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._clamp import above
from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import (
    Context,
    as_dtype,
    entry,
    fused,
    in_float32,
    in_place,
    is_half,
    public,
    widened,
)
from torchbp.ops._numbers import number
from torchbp.ops._op import Op, rounded_once
from torchbp.ops._pieces import row_pieces
from torchbp.ops._range import in_float64, in_range
from torchbp.ops._reduction import FEW, broadcast, in_common_dtype, named, reduce, spread
from torchbp.ops._samples import Make, Sample, square, stored
from torchbp.ops.kernels import ROWS, in_one_loop, looped

__all__ = ["CosineEmbeddingLoss", "CosineEmbeddingLossFunction", "cosine_embedding_loss"]

_NAME = "cosine_embedding_loss"
_EPS = 1e-12  # torch's
Sums = Tensor | tuple[Tensor, Tensor, Tensor]  # a·b, A and B


class CosineEmbeddingLossFunction(Function):
    """Cosine embedding with hand-written gradients. Call it through :func:`cosine_embedding_loss`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        a: Tensor, b: Tensor, target: Tensor, margin: float, reduction: str
    ) -> tuple[Tensor, Tensor | None]:  # (N, D), (N, D), (N,) -> () or (N,); sums: (3, N)
        wide = _sums_in_one_loop(a, b)
        if wide is None and in_place(a, b):
            wide = _sums(a, b)
        if wide is not None:
            sums = torch.stack(wide)
            loss = reduce(_values(sums, target, margin).to(a.dtype), reduction)
            return loss, None if is_half(a) else sums.to(a.dtype)
        formula = lambda a, b: _values(_sums(a, b), target, margin)  # noqa: E731
        return reduce(in_float32(formula, a, b), reduction), None

    @staticmethod
    def setup_context(
        ctx: Context,
        inputs: tuple[Tensor, Tensor, Tensor, float, str],
        output: tuple[Tensor, Tensor | None],
    ) -> None:
        a, b, target, ctx.margin, ctx.reduction = inputs
        _, sums = output
        if sums is not None:
            ctx.mark_non_differentiable(sums)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, b, target, sums)
        ctx.save_for_forward(a, b, target)

    @staticmethod
    def backward(
        ctx: Context, grad: Tensor | None, _sums_grad: None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if grad is None:
            return None, None, None, None, None
        a, b, target, sums = ctx.saved_tensors
        need_a, need_b, *_ = ctx.needs_input_grad
        s = spread(grad, ctx.reduction, target.numel())
        if looped(a, b):
            made = _gradients_in_one_loop(a, b, target, sums, s, ctx.margin)
            if made is not None:
                return *made, None, None, None
        wide_a, wide_b, s = (widened(v) for v in (a, b, s))
        again = sums is None or not fused(grad, a, b)
        sums = _sums(wide_a, wide_b) if again else sums.double()
        across, of_a, of_b = _coefficients(sums, s, target, ctx.margin, wide_a.dtype)
        grad_a = (
            as_dtype(_combined(wide_b, across, wide_a, of_a), a.dtype) if need_a else None
        )  # (1)
        grad_b = (
            as_dtype(_combined(wide_a, across, wide_b, of_b), b.dtype) if need_b else None
        )  # (2)
        return grad_a, grad_b, None, None, None

    @staticmethod
    def jvp(
        ctx: Context, tangent_a: Tensor | None, tangent_b: Tensor | None, *_: None
    ) -> tuple[Tensor, None]:
        a, b, target = ctx.saved_tensors[:3]
        one = a.new_ones(())
        across, of_a, of_b = _coefficients(_sums(a, b), one, target, ctx.margin, a.dtype)
        values = torch.zeros_like(a)
        if tangent_a is not None:
            values = values + _combined(b, across, a, of_a) * tangent_a
        if tangent_b is not None:
            values = values + _combined(a, across, b, of_b) * tangent_b
        return reduce(values.sum(-1), ctx.reduction), None  # (3)


def _products(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return a * b, a * a, b * b


def _sums_in_one_loop(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return what :func:`_sums` does, in float64."""
    sums = in_one_loop(_products, a, b, outputs=(ROWS, ROWS, ROWS))
    if sums is None:
        return None
    dot, big_a, big_b = (of.double() for of in sums)
    return dot, big_a + _EPS, big_b + _EPS


def _gradients(
    a: Tensor, b: Tensor, across: Tensor, of_a: Tensor, of_b: Tensor
) -> tuple[Tensor, Tensor]:
    return b * across + a * of_a, a * across + b * of_b  # (1), (2)


def _gradients_in_one_loop(
    a: Tensor, b: Tensor, target: Tensor, sums: Tensor | None, s: Tensor, margin: float
) -> tuple[Tensor, Tensor] | None:
    again = _sums_in_one_loop(a, b) if sums is None else sums.double()
    if again is None:
        again = _sums(a.float(), b.float())
    per_row = _coefficients(again, s, target, margin, torch.float32)
    return in_one_loop(_gradients, a, b, *per_row, outputs=(None, None))


def _sums(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a·b, A and B, each of the shape of the rows."""
    if not in_place(a, b):
        return (a * b).sum(-1), a.square().sum(-1) + _EPS, b.square().sum(-1) + _EPS
    if a.numel() <= FEW:
        pairs = ((a, b), (a, a), (b, b))
        dot, big_a, big_b = ((u * v).sum(-1, dtype=torch.float64) for u, v in pairs)
        eps = number(_EPS, dot)
        return dot, big_a + eps, big_b + eps
    width = a.shape[-1]
    sums: tuple[list[Tensor], ...] = ([], [], [])
    for u, v in row_pieces(a.reshape(-1, width), b.reshape(-1, width)):
        product = u * v
        sums[0].append(product.sum(-1))
        sums[1].append(torch.mul(u, u, out=product).sum(-1))
        sums[2].append(torch.mul(v, v, out=product).sum(-1))
    # what there is one of per row in float64, which costs nothing
    dot, big_a, big_b = (torch.cat(of).double().view(a.shape[:-1]) for of in sums)
    return dot, big_a + _EPS, big_b + _EPS


def _values(sums: Sums, target: Tensor, margin: float) -> Tensor:
    dot, big_a, big_b = sums
    c = dot * (big_a * big_b).rsqrt()
    zero, one, m = number(0, c), number(1, c), number(margin, c)
    like = torch.where(target == one, one - c, zero)
    return like + torch.where(target == number(-1, c), torch.relu(c - m), zero)


def _coefficients(
    sums: Sums,
    s: Tensor,
    target: Tensor,
    margin: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factor of the other vector in both gradients, that of a in a's, and that of b in b's; (N, 1) each."""
    dot, big_a, big_b = sums
    inverse = (big_a * big_b).rsqrt()
    c = dot * inverse
    far = (target == number(-1, c)) & above(c, number(margin, c))
    k = far.to(c.dtype) - (target == number(1, c)).to(c.dtype)
    sk = s * k
    skc = sk * -c
    per_row = sk * inverse, skc / big_a, skc / big_b
    across, of_a, of_b = (as_dtype(v, dtype).unsqueeze(-1) for v in per_row)
    return across, of_a, of_b


def _combined(other: Tensor, across: Tensor, own: Tensor, of_own: Tensor) -> Tensor:
    product = other * across
    return product.addcmul_(own, of_own) if in_place(product, own) else product + own * of_own


_cosine_embedding_loss = entry(CosineEmbeddingLossFunction)


@public
def cosine_embedding_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Cosine embedding: :math:`1 - c` where :math:`t = 1`, :math:`\max(0, c - m)` where :math:`t = -1`, reduced.

    Args:
        input1: Vectors ``(N, D)``, or one ``(D,)``, floating point.
        input2: The same, of a shape that can be broadcast with ``input1``.
        target: 1 for like pairs, -1 for unlike ones; ``(N,)``, or ``()`` for one pair.
        margin: The cosine m below which unlike pairs cost nothing.
        size_average: Deprecated in torch; see ``reduction``.
        reduce: Deprecated in torch; see ``reduction``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        The loss, in ``[0, 2]`` a pair: a scalar, or ``(N,)`` for ``"none"``.

    Raises:
        ValueError: An unknown reduction.
        RuntimeError: Shapes that do not fit.

    Example:
        >>> import torch
        >>> from torchbp.functional import cosine_embedding_loss
        >>> one, two = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
        >>> cosine_embedding_loss(one, two, torch.tensor([1]))
        tensor(0.2929)
    """
    reduction = named(_NAME, reduction, size_average, reduce)
    if target.dim() > 1 or not input1.dim() == input2.dim() == target.dim() + 1:
        rule = "inputs (N, D) with target (N,), or (D,) with ()"
        got = f"{shape(input1)}, {shape(input2)} with {shape(target)}"
        raise RuntimeError(wrong(_NAME, rule, got, "flatten the other dimensions"))
    if not (input1.is_floating_point() and input2.is_floating_point()):  # no angle: torch's own
        return F.cosine_embedding_loss(input1, input2, target, margin, reduction=reduction)
    a, b = broadcast(*in_common_dtype(input1, input2))
    if target.shape != a.shape[:-1]:
        target = target.expand(a.shape[:-1])
    loss = _cosine_embedding_loss(a, b, target, margin, reduction)[0]
    if in_range(a, b):
        return loss
    return in_float64(cosine_embedding_loss, a, b, target, margin, reduction=reduction)


class CosineEmbeddingLoss(nn.CosineEmbeddingLoss):
    """Module form of :func:`cosine_embedding_loss`."""

    __module__ = "torchbp.nn"

    def forward(self, input1: Tensor, input2: Tensor, target: Tensor) -> Tensor:
        return cosine_embedding_loss(
            input1, input2, target, margin=self.margin, reduction=self.reduction
        )


def _samples(make: Make) -> Iterator[Sample]:
    for reduction in ("mean", "sum", "none"):
        args = (make.normal(5, 4), make.normal(5, 4), make.integers([1, -1, -1, 1, 0]))
        yield Sample(args, {"reduction": reduction, "margin": -0.2}, reduction)
    yield Sample((make.normal(4), make.normal(4), make.integers(1)), name="1d")
    b = make.normal(5, 4, requires_grad=False)
    yield Sample((make.normal(5, 4), b, make.integers([1, -1, 1, -1, 1])), name="data")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    args = (make.normal(3, 4), make.normal(3, 4), make.integers([1, -1, 1]))
    yield CosineEmbeddingLoss, Sample(), Sample(args)
    kwargs = {"margin": 0.3, "reduction": "sum"}
    yield CosineEmbeddingLoss, Sample((), kwargs), Sample(args, name="margin")


def _errors(make: Make) -> Iterator[Sample]:
    x, target = make.normal(3, 4), make.integers([1, -1, 1])
    yield Sample((x, x, target), {"reduction": "average"}, name="reduction")
    yield Sample((x, x, target[:2]), name="rows")
    yield Sample((x[None], x[None], target), name="dimensions")
    yield Sample((x, make.normal(3, 5), target), name="shape")


def _benchmark(make: Make, n: int) -> Sample:
    (x,) = square(make, n).args
    return Sample((x, make.normal(*x.shape), 2 * make.labels(x.shape[0], classes=2) - 1))


def _saved_bytes(a: Tensor, *others: object, **_: object) -> int:
    rows = a.shape[:-1].numel()
    return stored(a, *others) + (0 if is_half(a) else 3 * rows * a.element_size())


OP = Op(
    function=cosine_embedding_loss,
    modules=(CosineEmbeddingLoss,),
    reference=rounded_once(F.cosine_embedding_loss),
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=_saved_bytes,
    benchmark=_benchmark,
)
