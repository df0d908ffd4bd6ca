"""The gradients of dynamic tanh where α is one number, and w and b have one element for each of a row.

The numbers of lines are those of its derivation (``dyt.py``).
"""

import torch
from torch import Tensor

from torchbp.ops._function import as_dtype, fused, kernel
from torchbp.ops._pieces import row_pieces
from torchbp.ops.activations._tanh import TORCHS_IS_FAST
from torchbp.ops.kernels import SUM, in_one_loop, looped

__all__ = ["gradients_along_rows"]

_FEW = 1 << 12  # elements
_sigmoid_backward_into = kernel("sigmoid_backward", "grad_input")
Needs = tuple[bool, ...]  # of x, α, w and b
Bias = tuple[torch.Size, torch.dtype] | None
Gradients = tuple[Tensor | None, ...]  # of x, α, w and b


def gradients_along_rows(
    grad_y: Tensor, x: Tensor, alpha: Tensor, weight: Tensor | None, needs: Needs, bias: Bias
) -> Gradients | None:
    """Return (1) to (4), those needed: by a loop, at once, or some rows at a time; ``None`` where none will do.

    Args:
        grad_y: ``(*, D)``.
        x: ``(*, D)``, not empty.
        alpha: One number.
        weight: ``(D,)``, or ``None`` for ones.
        needs: Which are needed.
        bias: Shape and dtype of b, ``None`` where there is none.
    """
    if weight is not None and x.dim() > 1 and looped(grad_y, x):
        along = 4 * as_dtype(weight, torch.float32) * as_dtype(alpha, torch.float32)
        made = in_one_loop(_gradients, grad_y, x, alpha, weight, along, outputs=_OUTPUTS)
        if made is not None:
            return _of_loop(made, grad_y, alpha, weight, needs, bias)
    if not fused(grad_y):  # of the dtype of x
        return None
    run = _of_few if x.numel() <= _FEW else _by_rows
    return run(grad_y, x, alpha, weight, needs, bias)


def _gradients(
    g: Tensor, x: Tensor, alpha: Tensor, w: Tensor, along: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    u = x * alpha
    q = torch.sigmoid(-2 * u.abs())
    s = g * (q - q * q)  # 1 - z² = 4 (q - q²) without cancellation, in a loop of one rounding
    return s * along, s * x * w, g * torch.tanh(u)  # (1), and of (2) / 4 and (3) what is summed


_OUTPUTS = (None, SUM, torch.float32)


def _of_loop(
    made: tuple[Tensor, Tensor, Tensor],
    grad_y: Tensor,
    alpha: Tensor,
    weight: Tensor,
    needs: Needs,
    bias: Bias,
) -> Gradients:
    """Return (1) to (4) from what the loop made: sums over rows are torch's, in float32."""
    need_x, need_alpha, need_weight, need_bias = needs
    grad_x, along, products = made
    rows = tuple(range(products.dim() - 1))
    grad_alpha = (4 * along).to(alpha.dtype).reshape(alpha.shape) if need_alpha else None
    grad_weight = as_dtype(products.sum(rows), weight.dtype) if need_weight else None  # (3)
    grad_bias = None
    if need_bias and bias is not None:
        grad_bias = as_dtype(grad_y.sum(rows, dtype=torch.float32), bias[1])  # (4)
    return grad_x if need_x else None, grad_alpha, grad_weight, grad_bias


def _of_few(
    grad_y: Tensor,
    x: Tensor,
    alpha: Tensor,
    weight: Tensor | None,
    needs: Needs,
    bias: Bias,
) -> Gradients:
    """Return (1) to (4) as :func:`_by_rows`, in as few calls as there can be."""
    need_x, need_alpha, need_weight, need_bias = needs
    grad_x = grad_alpha = grad_weight = grad_bias = None
    v = x * alpha
    rows = (0,) if x.dim() == 2 else tuple(range(x.dim() - 1))
    if need_weight:
        product = grad_y * torch.tanh(v)
        grad_weight = product.sum(rows) if rows else product  # (3)
    if need_bias and bias is not None:
        grad_bias = as_dtype(grad_y.sum(rows) if rows else grad_y, bias[1])  # (4)
    if need_x or need_alpha:
        c = v.cosh_()  # 1 - z² = 1 / cosh², without cancellation
        s = grad_y / c if weight is None else (grad_y * weight).div_(c)
        s.div_(c)
        if need_alpha:
            product = s * x
            if alpha.dim() == 1:  # a sum as above, and one more: 2 µs less than a view of it
                product = product.sum(rows) if rows else product
                grad_alpha = product.sum(0, keepdim=True)  # (2)
            else:
                grad_alpha = product.sum().reshape(alpha.shape)
        if need_x:
            grad_x = s * alpha  # (1)
    return grad_x, grad_alpha, grad_weight, grad_bias


def _by_rows(
    grad_y: Tensor,
    x: Tensor,
    alpha: Tensor,
    weight: Tensor | None,
    needs: Needs,
    bias: Bias,
) -> Gradients:
    """Return (1) to (4), some rows at a time; w, one for each column, is left to their sums, and to α's product.

    By q = σ(-2|α x|): 1 - z² = 4 q (1 - q), without the cancellation of the former for large x.
    """
    need_x, need_alpha, need_weight, need_bias = needs
    width = x.shape[-1]
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    flat = (grad_y.reshape(-1, width), x.reshape(-1, width), grad_x.view(-1, width))
    w = x.new_tensor(4)
    w = w if weight is None else w * weight
    along = w * alpha
    sums: tuple[list[Tensor], ...] = ([], [], [])
    for g, rows, part in row_pieces(*flat):
        if x.is_cpu and not TORCHS_IS_FAST:
            q, z = _by_one_function(rows * alpha)
        else:
            v = torch.mul(rows, alpha, out=part)
            z = torch.tanh(v)
            q = v.abs_().mul_(-2).sigmoid_()
        if need_weight:
            sums[1].append(z.mul_(g).sum(0))  # (3)
        if need_bias:
            sums[2].append(g.sum(0))  # (4)
        if need_x or need_alpha:
            _sigmoid_backward_into(g, q, grad_input=part)
            if need_alpha:
                sums[0].append(torch.mul(part, rows, out=z).sum(0))  # (2)
            part.mul_(along)  # (1)
    grad_alpha, grad_weight, grad_bias = (torch.stack(of).sum(0) if of else None for of in sums)
    if grad_alpha is not None:
        grad_alpha = (grad_alpha * w).sum().reshape(alpha.shape)
    if grad_weight is not None and weight is not None:
        grad_weight = grad_weight.reshape(weight.shape)
    if grad_bias is not None and bias is not None:
        grad_bias = grad_bias.sum_to_size(bias[0]).to(bias[1])
    return grad_x if need_x else None, grad_alpha, grad_weight, grad_bias


def _by_one_function(v: Tensor) -> tuple[Tensor, Tensor]:
    """Return q, and z by it, where a sigmoid takes a sixth of tanh's time; v = α x is written over.

    |z| = 1 - 2 q is as good as tanh where there are large |v| among those that (3) sums.
    """
    q = v.abs()
    small = bool(q.amax() < 1)
    q.mul_(-2).sigmoid_()
    if small:
        return q, v.tanh_()
    sign = torch.sign(v, out=v)
    return q, torch.addcmul(sign, sign, q, value=-2, out=v)
