r"""Negative log likelihood: ℓ = -w_t x_t, x (N, C, *) being log probabilities and t the class, then reduced.

ℓ = 0 where t is ignored. "mean" divides by the sum of w_t over the positions that are not.

Derivation, with s the gradient of each ℓ (grad for "none" and "sum", grad / Σ w_t for "mean"):
    grad_x_j = -s w_t [j = t], 0 where ignored                                                (1)
    tangent_ℓ = -w_t · tangent_x_t                                                            (2)

Saves:
    The target, the weights and their sum: nothing for each element of x, where torch keeps 4 bytes per float32 element.

Edge values:
    x_t = -∞: the loss is +∞, the gradient finite.   All ignored, or N = 0: the mean is NaN, the gradient 0.

Sources:
    Good, "Rational Decisions", 1952, doi:10.1111/j.2517-6161.1952.tb00104.x (the logarithmic score).
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._errors import wrong
from torchbp.ops._function import (
    Context,
    entry,
    fused,
    is_half,
    kernel,
    plain,
    public,
    unviewed,
    visible_in_backward,
)
from torchbp.ops._numbers import constant
from torchbp.ops._op import Op
from torchbp.ops._reduction import REDUCTIONS, named, spread
from torchbp.ops._samples import Make, Sample, against_classes, stored
from torchbp.ops.losses._classes import class_dim, counted

__all__ = ["NLLLoss", "NLLLossFunction", "nll_loss"]

_nll_loss_forward = kernel("nll_loss_forward")
_nll_loss_backward = kernel("nll_loss_backward")


class NLLLossFunction(Function):
    """Negative log likelihood with a hand-written gradient. Call it through :func:`nll_loss`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, target: Tensor, w: Tensor | None, reduction: str, ignored: int
    ) -> tuple[Tensor, Tensor | None]:  # (N, C, *), (N, *) int64, (C,) -> () or (N, *); Σ w_t
        simple = x.dim() == 2 and target.dim() == 1 and target.size(0) == x.size(0)
        simple = simple and target.dtype is torch.int64 and (w is None or w.dtype is x.dtype)
        if simple and fused(x):
            return _nll_loss_forward(x, target, w, REDUCTIONS[reduction], ignored)
        if target.dtype == torch.uint8:  # torch has no batching rule for it
            target = target.long()
        loss = F.nll_loss(x, target, w, ignore_index=ignored, reduction=reduction)
        return loss if x.dim() < 3 else unviewed(loss), None

    @staticmethod
    def setup_context(
        ctx: Context,
        inputs: tuple[Tensor, Tensor, Tensor | None, str, int],
        output: tuple[Tensor, Tensor | None],
    ) -> None:
        x, target, w, ctx.reduction, ctx.ignored = inputs
        _, total = output
        ctx.set_materialize_grads(False)
        ctx.shape = x.shape
        if total is not None:
            ctx.mark_non_differentiable(total)
        ctx.save_for_backward(target, w, total if ctx.reduction == "mean" else None)

    @staticmethod
    def backward(
        ctx: Context, grad: Tensor | None, _: None
    ) -> tuple[Tensor | None, None, None, None, None]:
        if grad is None:
            return None, None, None, None, None
        target, w, total = ctx.saved_tensors
        if len(ctx.shape) == 2 and (w is None or w.dtype is grad.dtype) and fused(grad, half=True):
            grad_x = _by_kernel(grad, target, w, total, ctx)
            if grad_x is not None:
                return grad_x, None, None, None, None
        dim = min(1, len(ctx.shape) - 1)  # of the classes
        index, w_t, total = counted(grad, target, w, ctx.ignored)
        s = spread(grad.to(w_t.dtype), ctx.reduction, total)
        if ctx.reduction == "mean":
            s = s.masked_fill(total == 0, 0)  # nothing counted: 0, as in torch, not 0/0
        zeros = grad.new_zeros(ctx.shape)
        put = zeros.scatter_ if fused(grad, half=True) else zeros.scatter
        values = (-s * w_t).to(grad.dtype)
        grad_x = put(dim, index.unsqueeze(dim), values.unsqueeze(dim))  # (1)
        return grad_x, None, None, None, None

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, *_: None) -> tuple[Tensor, None]:
        target, w = ctx.saved_tensors[:2]
        index, w_t, total = counted(tangent_x, target, w, ctx.ignored)
        dim = class_dim(tangent_x)
        picked = tangent_x.gather(dim, index.unsqueeze(dim)).squeeze(dim)
        values = -w_t * picked  # (2)
        values = values if ctx.reduction == "none" else spread(values.sum(), ctx.reduction, total)
        return values.to(tangent_x.dtype), None


def _by_kernel(
    grad: Tensor, target: Tensor, w: Tensor | None, total: Tensor | None, ctx: Context
) -> Tensor | None:
    """Return (1) by torch's kernel, for x (N, C); ``None`` where it would round more than once."""
    reduction = ctx.reduction
    if is_half(grad):
        if w is not None:
            return None
        if reduction == "mean":
            grad, reduction = _shared(grad, target, ctx.ignored), "sum"
    if reduction != "mean":
        total = grad if grad.dim() == 0 else grad.new_empty(())  # not read
    elif total is None:
        total = counted(grad, target, w, ctx.ignored)[2]
    if grad.dim() or not (grad.is_cpu and plain(grad)):
        like_x = (grad.unsqueeze(1) if grad.dim() else grad).expand(ctx.shape)
    else:
        like_x = _shaped(ctx.shape, grad.dtype)
    if target.dtype is not torch.int64:
        target = target.long()
    return _nll_loss_backward(grad, like_x, target, w, REDUCTIONS[reduction], ctx.ignored, total)


def _shared(grad: Tensor, target: Tensor, ignored: int) -> Tensor:
    """Return grad / N, rounded once; by numbers where they may be looked at, which takes fewer calls."""
    if not (visible_in_backward(grad) and visible_in_backward(target)):
        count = torch.count_nonzero(target != ignored)
        return (grad.float() / count.clamp(min=1)).to(grad.dtype)
    n = target.numel()
    if ignored >= 0 or (n and target.min().item() < 0):  # else all classes are above it
        n = torch.count_nonzero(target != ignored).item()
    value = grad.item() / max(1, n)
    return constant(value, grad.dtype) if value else torch.full_like(grad, value)


@lru_cache(64)
def _shaped(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return one number in a shape: of x the kernel asks for no more, and to expand another takes 3 µs."""
    return torch.zeros((), dtype=dtype, device="cpu").expand(shape)


_nll_loss = entry(NLLLossFunction)


@public
def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Negative log likelihood of class indices: :math:`\ell = -w_t x_t`, reduced.

    Args:
        input: Log probabilities ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``, floating point.
        target: Class indices of the shape of ``input`` without ``C``, int64 or uint8.
        weight: A factor of each class, ``(C,)``.
        size_average: Deprecated in torch; see ``reduction``.
        ignore_index: The class index whose positions count for nothing.
        reduce: Deprecated in torch; see ``reduction``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``; the mean is weighted.

    Returns:
        The loss in nats: a scalar, or the shape of ``input`` without ``C`` for ``"none"``.

    Raises:
        IndexError: A class index outside ``[0, C)``.
        ValueError: ``target`` of another batch size, or an unknown reduction.
        RuntimeError: Other shapes or dtypes that do not fit; a ``weight`` that requires grad.

    Example:
        >>> import torch
        >>> from torchbp.functional import nll_loss
        >>> nll_loss(torch.tensor([[-0.5, -1.5], [-0.2, -1.0]]), torch.tensor([1, 0]))
        tensor(0.8500)
    """
    reduction = named("nll_loss", reduction, size_average, reduce)
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        rule = "a weight without requires_grad, as in torch"
        raise RuntimeError(wrong("nll_loss", rule, "one that requires it", "detach it"))
    loss, _ = _nll_loss(input, target, weight, reduction, ignore_index)
    return loss


class NLLLoss(nn.NLLLoss):
    """Module form of :func:`nll_loss`; the weight is a buffer."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return nll_loss(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )


def _samples(make: Make) -> Iterator[Sample]:
    for reduction in ("mean", "sum", "none"):
        for shape in ((5, 4), (2, 4, 3), (2, 4, 3, 2)):
            target = make.labels(shape[0], *shape[2:], classes=4)
            kwargs = {"reduction": reduction}
            if len(shape) == 3:
                target[0, 0] = 3
                kwargs = {"weight": make.uniform(4, low=0.2), "ignore_index": 3, **kwargs}
            yield Sample((make.normal(*shape), target), kwargs, f"{len(shape)}d-{reduction}")
    some = make.labels(5, classes=4)
    some[1] = -100
    for weights in ({}, {"weight": make.uniform(4, low=0.2)}):
        name = "2d-ignored-weight" if weights else "2d-ignored"
        yield Sample((make.normal(5, 4), some), weights, name)
    yield Sample((make.normal(4), make.labels(classes=4)), name="1d")
    ignored = torch.full((5,), -100, device=make.device)
    yield Sample((make.normal(5, 4), ignored), {"reduction": "sum"}, "all-ignored")
    yield Sample((make.normal(0, 4), ignored[:0]), {"reduction": "none"}, "empty")
    yield Sample((make.normal(5, 4), make.labels(5, classes=4).to(torch.uint8)), name="uint8")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    sample = Sample((make.normal(5, 4), make.labels(5, classes=4)))
    yield NLLLoss, Sample(), sample
    kwargs = {"weight": make.uniform(4), "ignore_index": 2, "reduction": "sum"}
    yield NLLLoss, Sample((), kwargs), Sample(sample.args, name="all-arguments")


def _errors(make: Make) -> Iterator[Sample]:
    x, target = make.normal(5, 4), make.labels(5, classes=4)
    yield Sample((x, target + 4), name="index-above")
    yield Sample((x, target[:3]), name="batch")
    yield Sample((x, target.double()), name="target-dtype")
    yield Sample((x, target), {"reduction": "average"}, name="reduction")
    yield Sample((x, target), {"weight": make.uniform(3)}, name="weight")
    yield Sample((x, target), {"weight": make.uniform(4, requires_grad=True)}, name="weight-grad")


def _saved_bytes(x: Tensor, target: Tensor, **kwargs: object) -> int:
    weight = kwargs.get("weight")
    summed = x.dim() == 2 and target.dtype == torch.int64 and not is_half(x)
    mean = kwargs.get("reduction", "mean") == "mean"
    return stored(target, weight) + (x.element_size() if summed and mean else 0)


OP = Op(
    function=nll_loss,
    modules=(NLLLoss,),
    reference=F.nll_loss,
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=_saved_bytes,
    benchmark=against_classes,
    fused="aten::nll_loss_backward",
)
