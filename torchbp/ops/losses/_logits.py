r"""What keeps logits small, for the cross entropy: softcap y = c · tanh(x / c), z-loss ℓ = λ z², z = log Σ_c exp(x_c).

Derivation:
    dy/dx = 1 - tanh²(x / c) = 1 - (y / c)²                                                   (1)
    ∂z/∂x_j = p_j, p = softmax(x), so with s the gradient of each ℓ
    grad_x_j = 2 λ s z p_j                                                                    (2)
    "mean" divides the sum of ℓ by the number of positions that count.

Saves:
    The softcap its output, the z-loss its input: the tensor that the cross entropy behind keeps anyway.

Edge values:
    x → ±∞: y → ±c, slope 0.   A logit of -∞: p = 0, grad 0.   Nothing counts: the mean is NaN, the gradient 0.

Sources:
    z-loss: Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, arXiv:2204.02311 (λ = 1e-4).
    Softcap: Gemma Team, "Gemma 2: Improving Open Language Models at a Practical Size", 2024, arXiv:2408.00118.
"""

import torch
from torch import Tensor
from torch.autograd.function import Function

from torchbp.ops._function import Context, entry, in_float32, is_half
from torchbp.ops._reduction import reduce, spread
from torchbp.ops.losses._classes import class_dim, positions

__all__ = ["LogPartitionPenaltyFunction", "SoftcapFunction", "capped", "log_partition_penalty"]


class SoftcapFunction(Function):
    """c · tanh(x / c) with a hand-written derivative, from the output."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cap: float) -> Tensor:
        return in_float32(lambda x: torch.tanh(x / cap) * cap, x)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, float], output: Tensor) -> None:
        x, ctx.cap = inputs
        kept = x if is_half(x) else output  # in half precision the output has lost 1 - tanh²
        ctx.save_for_backward(kept)
        ctx.save_for_forward(kept)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return _times_slope(grad_y, kept, ctx.cap), None

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, _: None) -> Tensor:
        (kept,) = ctx.saved_tensors
        return _times_slope(tangent_x, kept, ctx.cap)


def _times_slope(v: Tensor, kept: Tensor, cap: float) -> Tensor:
    if is_half(kept):
        return in_float32(lambda v, x: v / torch.cosh(x / cap).square(), v, kept)
    return v * (1 - (kept / cap).square())  # (1)


class LogPartitionPenaltyFunction(Function):
    """λ log² Σ exp x with a hand-written gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, counts: Tensor | None, factor: float, reduction: str) -> Tensor:
        z = _wide(x).logsumexp(class_dim(x))  # (N, C, *) -> () or (N, *)
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
        ctx.save_for_forward(x, counts)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, counts = ctx.saved_tensors
        s = spread(grad, ctx.reduction, _count(x, counts))
        if counts is not None:
            s = s.expand(counts.shape).masked_fill(~counts, 0)
        return _gradient(x, s, ctx.factor).to(x.dtype), None, None, None

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, *_: None) -> Tensor:
        x, counts = ctx.saved_tensors
        wide = _wide(x)
        gradient = _gradient(x, wide.new_ones(()), ctx.factor)
        values = (gradient * tangent_x).sum(class_dim(x))
        values = values if counts is None else values.masked_fill(~counts, 0)
        values = values if ctx.reduction == "none" else values.sum()
        return spread(values, ctx.reduction, _count(x, counts)).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.float() if is_half(x) else x


def _count(x: Tensor, counts: Tensor | None) -> int | Tensor:
    return positions(x) if counts is None else counts.sum()


def _gradient(x: Tensor, s: Tensor, factor: float) -> Tensor:
    dim, x = class_dim(x), _wide(x)
    scale = 2 * factor * s * x.logsumexp(dim)
    return torch.softmax(x, dim) * scale.unsqueeze(dim)  # (2)


capped = entry(SoftcapFunction)
log_partition_penalty = entry(LogPartitionPenaltyFunction)
