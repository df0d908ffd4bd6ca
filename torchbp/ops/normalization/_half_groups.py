"""Group normalization of half precision on a GPU, each formula one kernel: torch's own rounds μ and r to x's dtype.

With m the mean over the L positions of a channel and the K channels of a group, x̂ = (x - μ) r and s = grad_y · w:
    y      = x̂ · w + b                                                                        (1)
    grad_w = Σ grad_y · x̂,   grad_b = Σ grad_y                     over samples and positions  (2)
    grad_x = r · (s - m(s) - x̂ · m(s x̂))                                                      (3)
Statistics and sums are float32; half precision is read and written once a kernel.
"""

import torch
from torch import Tensor

from torchbp.ops._function import fused
from torchbp.ops._one_kernel import in_one_kernel

__all__ = ["backward", "forward", "suits"]


def suits(*tensors: Tensor) -> bool:
    """Whether all are on a GPU, contiguous, and not differentiated; and L is even, for two numbers are read at once."""
    return (
        tensors[0].is_cuda
        and tensors[0].numel() > 0
        and tensors[0].shape[2:].numel() % 2 == 0
        and fused(*tensors, half=True)
        and all(t.is_contiguous() and t.dtype == tensors[0].dtype for t in tensors)
    )


def forward(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return y, and μ and r, (N, G) float32; ``None`` where a kernel can't be had."""
    grouped, mean, rstd, w = _parts(x, groups, weight, eps)
    b = torch.zeros_like(w) if bias is None else bias.float().view(w.shape)
    y = in_one_kernel(_normalized, grouped, mean, rstd, w, b)
    if y is None:
        return None
    return y.view(x.shape), mean.flatten(1), rstd.flatten(1)


def backward(
    grad_y: Tensor, x: Tensor, groups: int, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the gradients of x, and in float32 of w and b, (C,); ``None`` where a kernel can't be had."""
    grouped, mean, rstd, w = _parts(x, groups, weight, eps)
    g = grad_y.view(grouped.shape)
    products = in_one_kernel(_product, g, grouped, mean, rstd, summed=True)
    if products is None:
        return None
    by_w = products.sum(3, keepdim=True)
    by_b = g.sum(3, keepdim=True, dtype=torch.float32)
    count = grouped.shape[2] * grouped.shape[3]
    along_x, along_1 = ((by * w).sum(2, keepdim=True) / count for by in (by_w, by_b))
    grad_x = in_one_kernel(_gradient, g, grouped, mean, rstd, w, along_1, along_x)
    if grad_x is None:
        return None
    return grad_x.view(x.shape), by_w.sum(0).flatten(), by_b.sum(0).flatten()  # (2)


def _parts(
    x: Tensor, groups: int, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x as (N, G, K, L), μ and r as (N, G, 1, 1), and w as (1, G, K, 1)."""
    n, channels = x.shape[:2]
    rows = x.view(n * groups, -1)
    _, mean, rstd = torch.native_layer_norm(rows, rows.shape[1:], None, None, eps)
    grouped = x.view(n, groups, channels // groups, -1)
    of_group, of_channel = (n, groups, 1, 1), (1, groups, channels // groups, 1)
    w = x.new_ones(channels, dtype=torch.float32) if weight is None else weight.float()
    return grouped, mean.view(of_group), rstd.view(of_group), w.reshape(of_channel)


def _normalized(x: Tensor, mean: Tensor, rstd: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (x - mean) * rstd * w + b  # (1)


def _product(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return g * ((x - mean) * rstd)


def _gradient(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    w: Tensor,
    along_1: Tensor,
    along_x: Tensor,
) -> Tensor:
    return rstd * (g * w - along_1 - (x - mean) * rstd * along_x)  # (3)
