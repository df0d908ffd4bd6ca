r"""Sparsemax along a dimension: y = max(x - τ, 0), with the τ for which Σ y = 1: the nearest point to x of the simplex.

Derivation, with the support S = {i: y_i > 0} of k elements:
    τ = (Σ over S of x - 1) / k, so ∂τ/∂x_j = [j in S] / k
    grad_x = grad_y - mean over S of grad_y inside S, and 0 outside                            (1)
    The Jacobian is symmetric, so tangent_y is (1) of tangent_x.

Saves:
    y (4 bytes per float32 element).

Edge values:
    x_i = -∞: y_i = 0, grad_x_i = 0.   NaN or +∞: NaN.
    On the border of the support: the derivative of the side where y_i = 0.

Sources:
    Martins, Astudillo, "From Softmax to Sparsemax", 2016, arXiv:1602.02068.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._function import Context, counted_up, entry, in_float32, public
from torchbp.ops._jagged import row_by_row
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample

__all__ = ["Sparsemax", "SparsemaxFunction", "sparsemax"]


class SparsemaxFunction(Function):
    """Sparsemax with a hand-written gradient. Call it through :func:`sparsemax`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:  # x, y: (*)
        return _value(x, dim)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, int], output: Tensor) -> None:
        _, ctx.dim = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return _project(grad_y, y, ctx.dim), None

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, _: None) -> Tensor:
        (y,) = ctx.saved_tensors
        return _project(tangent_x, y, ctx.dim)


def _value(input: Tensor, dim: int = -1) -> Tensor:
    def formula(x: Tensor) -> Tensor:
        if x.dim() == 0:
            return formula(x.unsqueeze(0)).squeeze(0)
        if x.shape[dim] == 0:
            return x * 1
        x = x - x.amax(dim, keepdim=True)  # τ is then in [-1, 0): no cancellation
        descending = x.sort(dim, descending=True).values
        sums = descending.cumsum(dim) - 1
        steps = [1] * x.dim()
        steps[dim] = -1
        k = (counted_up(x.shape[dim], x, x.dtype) + 1).view(steps)
        size = (k * descending > sums).sum(dim, keepdim=True).clamp(min=1)
        tau = sums.gather(dim, size - 1) / size
        return torch.relu(x - tau)

    return in_float32(formula, input)


def _project(v: Tensor, y: Tensor, dim: int) -> Tensor:
    def formula(v: Tensor, y: Tensor) -> Tensor:
        support = (y > 0).to(v.dtype)
        mean = (v * support).sum(dim, keepdim=True) / support.sum(dim, keepdim=True)
        return support * (v - mean)  # (1)

    return in_float32(formula, v, y)


_sparsemax = entry(SparsemaxFunction, again=SparsemaxFunction.forward)


@public
@row_by_row()
def sparsemax(input: Tensor, dim: int = -1) -> Tensor:
    r"""Sparsemax along a dimension: the point of the probability simplex nearest to ``input``; many values are 0.

    Args:
        input: Any shape ``(*)``, floating point.
        dim: The dimension whose values sum to 1.

    Returns:
        Tensor of the shape and dtype of ``input``; values are in ``[0, 1]``.

    Raises:
        IndexError: ``input`` has no dimension ``dim``.

    Example:
        >>> import torch
        >>> from torchbp.functional import sparsemax
        >>> sparsemax(torch.tensor([0.0, 1.0, 1.5]))
        tensor([0.0000, 0.2500, 0.7500])
    """
    return _sparsemax(input, dim)


class Sparsemax(nn.Module):
    """Module form of :func:`sparsemax`."""

    __module__ = "torchbp.nn"

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def extra_repr(self) -> str:
        return f"dim={self.dim}"

    def forward(self, input: Tensor) -> Tensor:
        return sparsemax(input, self.dim)


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield Sparsemax, Sample(), Sample((make.normal(3, 4),))
    yield Sparsemax, Sample((0,)), Sample((make.normal(3, 4),), name="dim")


def _errors(make: Make) -> Iterator[Sample]:
    yield Sample((make.normal(2, 3), 2), name="no-such-dim")


OP = Op(
    function=sparsemax,
    modules=(Sparsemax,),
    reference=_value,
    samples=_samples.along_dims,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=_samples.along_rows,
)
