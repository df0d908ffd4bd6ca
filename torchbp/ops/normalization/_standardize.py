"""x̂ = (x - μ) · r, the step that layer, group, instance and batch normalization share, and its derivative.

Over the D elements that share their statistics, with μ = mean(x), v = mean((x - μ)²), r = 1/√(v + ε):
    ∂μ/∂x_i = 1/D,   ∂v/∂x_i = 2 (x_i - μ)/D,   ∂r/∂x_i = -r³ (x_i - μ)/D = -r² x̂_i/D
    ∂x̂_j/∂x_i = r (δ_ij - 1/D) - r x̂_i x̂_j/D                         which is symmetric in i and j
"""

import torch
from torch import Tensor

from torchbp.ops._function import fused, widened

__all__ = ["affine", "along_channels", "channel_sum", "project", "standardize"]


def standardize(x: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor]:
    """Return x̂ and r over ``dims``; half precision in float32."""
    x = widened(x)
    centred = x - x.mean(dims, keepdim=True)
    r = torch.rsqrt((centred * centred).mean(dims, keepdim=True) + eps)
    return centred * r, r


def project(s: Tensor, normalized: Tensor, r: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Apply ∂x̂/∂x to ``s``: takes out what the mean and the scale absorb."""
    along = (s * normalized).mean(dims, keepdim=True)
    return r * (s - s.mean(dims, keepdim=True) - normalized * along)


def affine(y: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """Return y · w + b, written into ``y``, which was just made; under ``vmap`` w may be batched where y is not."""
    if fused(y, half=True):
        y = y if weight is None else y.mul_(weight)
        return y if bias is None else y.add_(bias)
    affine = y if weight is None else y * weight
    affine = affine if bias is None else affine + bias
    return affine.to(y.dtype)


def along_channels(t: Tensor, x: Tensor) -> Tensor:
    """Return ``t`` (C,) as (C, 1, ...), which meets x (N, C, *) in its channels."""
    return t.reshape(-1, *(1 for _ in x.shape[2:]))


def channel_sum(t: Tensor) -> Tensor:
    """Sum over all but the channels: (N, C, *) -> (C,)."""
    return t.sum((0, *range(2, t.dim())))
