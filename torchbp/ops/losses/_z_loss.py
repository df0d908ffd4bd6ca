r"""z-loss, which keeps the logits of a cross entropy small: ℓ = λ z², z = log Σ_c exp(x_c).

Derivation:
    ∂z/∂x_j = p_j, p = softmax(x), so with s the gradient of each ℓ
    grad_x_j = 2 λ s z p_j                                                                    (1)
    "mean" divides the sum of ℓ by the number of positions that count.

Saves:
    Its input: the tensor that the cross entropy behind keeps anyway.

Edge values:
    A logit of -∞: p = 0, grad 0.   Nothing counts: the mean is NaN, the gradient 0.

Sources:
    Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, arXiv:2204.02311 (λ = 1e-4).
"""

import torch
from torch import Tensor
from torch.autograd.function import Function

from torchbp.ops._function import Context, entry, widened
from torchbp.ops._reduction import reduce, spread
from torchbp.ops.kernels import over_log_partition, over_softmax_gradient, takes_logits
from torchbp.ops.losses._classes import class_dim, positions

__all__ = ["LogPartitionPenaltyFunction", "gradient_of_penalty", "log_partition_penalty"]


class LogPartitionPenaltyFunction(Function):
    """λ log² Σ exp x with a hand-written gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, counts: Tensor | None, factor: float, reduction: str) -> Tensor:
        z = over_log_partition(x)  # (N, C, *) -> () or (N, *)
        z = widened(x).logsumexp(class_dim(x)) if z is None else z
        values = z.square() * factor
        values = values if counts is None else values.masked_fill(~counts, 0)
        values = values if reduction == "none" else reduce(values, "sum")
        return spread(values, reduction, _count(x, counts)).to(x.dtype)

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, Tensor | None, float, str], output: Tensor
    ) -> None:
        x, counts, ctx.factor, ctx.reduction = inputs
        ctx.save_for_backward(x, counts)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, counts = ctx.saved_tensors
        grad_x = None
        if takes_logits(x):
            s = 2 * ctx.factor * _of_values(x, grad, counts, ctx.reduction)
            grad_x = over_softmax_gradient(x, None, by_partition=s)  # (1)
        if grad_x is None:
            grad_x = gradient_of_penalty(x, grad, counts, ctx.factor, ctx.reduction).to(x.dtype)
        return grad_x, None, None, None

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, *_: None) -> Tensor:
        x, counts = ctx.saved_tensors
        one = torch.ones((), dtype=x.dtype, device=x.device)
        product = gradient_of_penalty(x, one, counts, ctx.factor, ctx.reduction) * tangent_x
        values = product.sum(class_dim(x)) if ctx.reduction == "none" else product.sum()
        return values.to(x.dtype)


def _count(x: Tensor, counts: Tensor | None) -> int | Tensor:
    return positions(x) if counts is None else counts.sum()


def _of_values(x: Tensor, grad: Tensor, counts: Tensor | None, reduction: str) -> Tensor:
    """Return s, 0 where a position does not count."""
    s = spread(grad, reduction, _count(x, counts))
    return s if counts is None else s.expand(counts.shape).masked_fill(~counts, 0)


def gradient_of_penalty(
    x: Tensor, grad: Tensor, counts: Tensor | None, factor: float, reduction: str
) -> Tensor:
    """Return (1) for the gradient ``grad`` of the reduced penalty, in float32 for half precision."""
    s = _of_values(x, grad, counts, reduction)
    dim, x = class_dim(x), widened(x)
    scale = 2 * factor * s * x.logsumexp(dim)
    return torch.softmax(x, dim) * scale.unsqueeze(dim)  # (1)


log_partition_penalty = entry(LogPartitionPenaltyFunction)
