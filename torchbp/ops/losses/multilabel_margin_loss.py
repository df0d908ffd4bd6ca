r"""Multi-label margin: ℓ = 1/C Σ_{j in T} Σ_{i not in T} max(0, 1 - x_j + x_i), T the row's classes, then reduced.

T is the row of the target up to the first negative index; a class that stands twice counts twice.

Derivation, with s the gradient of each ℓ (grad for "none" and "sum", grad / N for "mean"):
    a_ji = [j in T] [i not in T] [1 - x_j + x_i > 0]
    grad_x_i += s / C Σ_j a_ji                                                                (1)
    grad_x_j -= s / C Σ_i a_ji                                                                (2)
    tangent_ℓ = Σ gradient · tangent, with s = 1                                              (3)

Saves:
    x and the target, which are inputs. torch keeps the membership in T in floating point besides.

Edge values:
    1 - x_j + x_i = 0: slope 0, as in torch.   An empty T: 0.   The formula (torch.func, torch.compile) takes N · C²
    elements; what runs otherwise, torch's kernels or _margin_pairs.py, takes none.

Sources:
    torch.nn.MultiLabelMarginLoss, whose values, gradients and reductions these are.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _nn  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd.function import Function

from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import (
    Context,
    entry,
    fused,
    in_autocast_float32,
    in_float32,
    is_half,
    kernel,
    public,
    visible,
)
from torchbp.ops._op import Op, rounded_once
from torchbp.ops._reduction import REDUCTIONS, named, reduce, spread
from torchbp.ops._samples import Make, Sample, square, stored
from torchbp.ops.kernels import many
from torchbp.ops.losses._margin_pairs import pair_gradient, pair_values, pairs_at_hand

__all__ = ["MultiLabelMarginLoss", "MultiLabelMarginLossFunction", "multilabel_margin_loss"]

_NAME = "multilabel_margin_loss"
_FEW = 1 << 10  # elements; up to these torch's forward makes the membership again, on a CPU
_forward = kernel("multilabel_margin_loss_forward")
_backward = kernel("multilabel_margin_loss_backward")


class MultiLabelMarginLossFunction(Function):
    """Multi-label margin with a hand-written gradient. Call it through :func:`multilabel_margin_loss`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, target: Tensor, reduction: str
    ) -> Tensor:  # (N, C), (N, C) -> () or (N,)
        if fused(x, half=True):
            if x.is_cpu and (x.numel() > _FEW or is_half(x)) and pairs_at_hand(x):
                return in_float32(lambda x: reduce(pair_values(x, target), reduction), x)
            how = REDUCTIONS[reduction]
            return in_float32(lambda x: _nn.multilabel_margin_loss(x, target, how), x)
        return reduce(in_float32(lambda x: _values(x, target), x), reduction)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
        x, target, ctx.reduction = inputs
        ctx.save_for_backward(x, target)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None]:
        x, target = ctx.saved_tensors
        if x.is_cpu and fused(x, grad) and x.numel() <= _FEW:
            how = REDUCTIONS[ctx.reduction]
            members = _forward(x, target, how)[1]
            return _backward(grad, x, target, how, members), None, None
        s = spread(grad, ctx.reduction, x.shape[0]).expand(x.shape[0])
        if target.numel() and fused(x, grad, half=True):
            gradient = pair_gradient if x.is_cpu else _by_gpu
            return in_float32(lambda x, s: gradient(x, s, target), x, s), None, None
        return in_float32(lambda x, s: _gradient(x, s, target), x, s), None, None

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, *_: None) -> Tensor:
        x, target = ctx.saved_tensors
        gradient = _gradient(x, x.new_ones(x.shape[0]), target)
        return reduce((gradient * tangent_x).sum(1), ctx.reduction)  # (3)


def _members(target: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return which entries of the target count, and which classes are in T; (N, C) bools."""
    counts = (target < 0).cumsum(1) == 0
    index = target.clamp(min=0)
    none = target.new_zeros(target.shape[0], classes)
    return counts, none.scatter_add(1, index, counts.to(target.dtype)) > 0


def _by_gpu(x: Tensor, s: Tensor, target: Tensor) -> Tensor:
    """Return (1) and (2) by torch's kernel, with one more class for the last target.

    In the kernel (torch 2.11) one thread adds the last target's share while the others already scale the row, and the
    share may be lost. That class has the score ∞, and no share. What it counts is scaled here, as exactly as can be.
    """
    classes = x.shape[1]
    counts, members = _members(target, classes)
    more = F.pad(x, (0, 1), value=torch.inf)
    end = counts.sum(1, keepdim=True)
    targets = F.pad(target.masked_fill(~counts, -1), (0, 1), value=-1)
    targets = targets.scatter(1, end, classes)
    members = F.pad(members.to(x.dtype), (0, 1), value=1)
    shares = _backward(torch.ones_like(s), more, targets, 0, members)[:, :classes]
    return (shares * (classes + 1)).round_().mul_((s / max(1, classes)).unsqueeze(1))


def _active(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return 1 - x_j + x_i and a; both (N, j, i)."""
    counts, members = _members(target, x.shape[1])
    z = 1 - x.gather(1, target.clamp(min=0))[:, :, None] + x[:, None, :]
    return z, counts[:, :, None] & ~members[:, None, :] & (z > 0)


def _values(x: Tensor, target: Tensor) -> Tensor:
    z, active = _active(x, target)
    return (z * active).sum((1, 2)) / max(1, x.shape[1])


def _gradient(x: Tensor, s: Tensor, target: Tensor) -> Tensor:
    _, active = _active(x, target)
    of_others, of_members = active.sum(1).to(x.dtype), active.sum(2).to(x.dtype)  # (1), (2)
    counts = of_others.scatter_add(1, target.clamp(min=0), -of_members)
    return counts * (s / max(1, x.shape[1]))[:, None]


_multilabel_margin_loss = entry(MultiLabelMarginLossFunction)


@public
def multilabel_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Multi-label margin: :math:`\ell = 1/C \sum_{j \in T} \sum_{i \notin T} \max(0, 1 - x_j + x_i)`, reduced.

    Args:
        input: Scores ``(N, C)`` or ``(C,)``, floating point.
        target: Class indices, int64, the shape of ``input``; in each row those before the first negative one count.
        size_average: Deprecated in torch; see ``reduction``.
        reduce: Deprecated in torch; see ``reduction``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        The loss: a scalar, or ``(N,)`` for ``"none"``.

    Raises:
        ValueError: An unknown reduction.
        RuntimeError: Shapes or dtypes that do not fit; an index outside ``[-1, C)`` (looked for on the CPU only).

    Example:
        >>> import torch
        >>> from torchbp.functional import multilabel_margin_loss
        >>> multilabel_margin_loss(torch.tensor([[0.5, 0.25, 0.75]]), torch.tensor([[0, -1, 1]]))
        tensor(0.6667)
    """
    reduction = named(_NAME, reduction, size_average, reduce)
    if not input.is_floating_point():
        raise NotImplementedError(wrong(_NAME, "floating-point input", input.dtype, "cast it"))
    if input.shape != target.shape or input.dim() > 2 or target.dtype != torch.int64:
        rule = f"int64 target of the input's shape {shape(input)}, (N, C) or (C,)"
        raise RuntimeError(wrong(_NAME, rule, f"{target.dtype} {shape(target)}", "pad with -1"))
    (input,) = in_autocast_float32(input)
    if input.dim() == 2:
        rows, targets = input, target
    else:
        rows, targets = torch.atleast_2d(input), torch.atleast_2d(target)
    try:
        if many(target, _FEW + 1) or is_half(input):
            _check_indices(target, rows.shape[-1])
        loss = _multilabel_margin_loss(rows, targets, reduction)
    except RuntimeError:  # torch's kernel has looked at few indices
        _check_indices(target, rows.shape[-1])
        raise
    return loss.squeeze(0) if input.dim() < 2 and loss.dim() else loss


def _check_indices(target: Tensor, classes: int) -> None:
    if visible(target) and target.numel():
        low, high = (v.item() for v in torch.aminmax(target))
        if low < -1 or high >= classes:
            rule = f"class indices in [-1, {classes})"
            raise RuntimeError(wrong(_NAME, rule, f"[{low}, {high}]", "correct them"))


class MultiLabelMarginLoss(nn.MultiLabelMarginLoss):
    """Module form of :func:`multilabel_margin_loss`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return multilabel_margin_loss(input, target, reduction=self.reduction)


def _samples(make: Make) -> Iterator[Sample]:
    target = make.integers([[1, 3, -1, 0], [0, -1, -1, -1], [-1, 0, 1, 2], [2, 2, 1, -1]])
    for reduction in ("mean", "sum", "none"):
        yield Sample((make.normal(4, 4), target.clone()), {"reduction": reduction}, reduction)
    ends = make.integers([5] * 3 + [-1] * 10)
    yield Sample((make.normal(13), ends), {"reduction": "none"}, "1d")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    args = (make.normal(2, 4), make.integers([[1, 3, -1, 0], [0, -1, -1, -1]]))
    yield MultiLabelMarginLoss, Sample(), Sample(args)
    yield MultiLabelMarginLoss, Sample((), {"reduction": "sum"}), Sample(args, name="sum")


def _errors(make: Make) -> Iterator[Sample]:
    x, target = make.normal(2, 4), make.integers([[1, 3, -1, 0], [0, -1, -1, -1]])
    yield Sample((x, target), {"reduction": "average"}, name="reduction")
    yield Sample((x, target[:, :2]), name="shape")
    yield Sample((x, target + 4), name="range")


def _benchmark(make: Make, n: int) -> Sample:
    (x,) = square(make, n).args
    target = make.labels(*x.shape, classes=x.shape[1])
    target[:, 8:] = -1
    return Sample((x, target))


OP = Op(
    function=multilabel_margin_loss,
    modules=(MultiLabelMarginLoss,),
    reference=rounded_once(F.multilabel_margin_loss),
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=lambda *args, **_: stored(*args),
    benchmark=_benchmark,
    fused="aten::multilabel_margin_loss_backward",
)
