"""Cross entropy of class probabilities: the Function behind ``cross_entropy``, in whose file it is derived."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function

from torchbp.ops._function import Context, entry
from torchbp.ops._reduction import spread
from torchbp.ops.losses._classes import along_classes, class_dim, positions
from torchbp.ops.losses._limits import product, with_limits
from torchbp.ops.losses._logits_gradient import gradient_of_probabilities, terms_of_probabilities

__all__ = ["ProbabilityCrossEntropyFunction", "of_probabilities"]


class ProbabilityCrossEntropyFunction(Function):
    """Cross entropy of class probabilities. Call it through ``cross_entropy``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, target: Tensor, w: Tensor | None, reduction: str, smoothing: float
    ) -> Tensor:  # (N, C, *), (N, C, *), (C,) -> () or (N, *)
        def limits() -> Tensor:
            q, log_p, wide_w = terms_of_probabilities(x, target, w, smoothing)
            values = -product(wide_w * q, log_p).sum(class_dim(x))
            if reduction != "none":
                values = spread(values.sum(), reduction, positions(x))
            return values.to(torch.promote_types(x.dtype, target.dtype))

        return with_limits(
            lambda: F.cross_entropy(x, target, w, reduction=reduction, label_smoothing=smoothing),
            limits,
            x,
        )

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, Tensor, Tensor | None, str, float], output: Tensor
    ) -> None:
        *tensors, ctx.reduction, ctx.smoothing = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(
        ctx: Context, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, target, w = ctx.saved_tensors
        need_x, need_target, need_w, *_ = ctx.needs_input_grad
        dim = class_dim(x)
        q, log_p, wide_w = terms_of_probabilities(x, target, w, ctx.smoothing)
        s = spread(grad.to(log_p.dtype), ctx.reduction, positions(x))
        s = s.unsqueeze(dim) if ctx.reduction == "none" else s
        grad_x = grad_target = grad_w = None
        if need_x:
            grad_x = gradient_of_probabilities(s, q, log_p, wide_w, dim).to(x.dtype)  # (2)
        if need_target:
            grad_target = (-s * (1 - ctx.smoothing) * wide_w * log_p).to(target.dtype)  # (3)
        if need_w:
            grad_w = (-s * q * log_p).sum_to_size(wide_w.shape)  # (4)
            grad_w = grad_w.reshape(w.shape).to(w.dtype)
        return grad_x, grad_target, grad_w, None, None

    @staticmethod
    def jvp(
        ctx: Context,
        tangent_x: Tensor | None,
        tangent_target: Tensor | None,
        tangent_w: Tensor | None,
        *_: None,
    ) -> Tensor:
        x, target, w = ctx.saved_tensors
        dim = class_dim(x)
        q, log_p, wide_w = terms_of_probabilities(x, target, w, ctx.smoothing)
        tangent = torch.zeros_like(log_p)  # (5)
        if tangent_x is not None:
            expected = (log_p.exp() * tangent_x).sum(dim, keepdim=True)
            tangent = tangent + wide_w * q * (tangent_x - expected)
        if tangent_target is not None:
            tangent = tangent + wide_w * (1 - ctx.smoothing) * tangent_target * log_p
        if tangent_w is not None:
            tangent = tangent + along_classes(tangent_w, x) * q * log_p
        values = -tangent.sum(dim)
        if ctx.reduction != "none":
            values = spread(values.sum(), ctx.reduction, positions(x))
        return values.to(torch.result_type(x, target))


of_probabilities = entry(ProbabilityCrossEntropyFunction)
