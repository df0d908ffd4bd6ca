r"""InfoNCE: ℓ_i = -log softmax_j(â_i · b̂_j / τ) at j = i, â = a / ‖a‖, b̂ = b / ‖b‖, then reduced over i.

Row i of b is the positive of row i of a, the other rows of b are its negatives.

Derivation, with z = â b̂ᵀ / τ (N, N), P = softmax of its rows, and s the gradient of each ℓ_i:
    G   = s / τ · (P - 1)          s along the rows, 1 the identity                           (1)
    g_a = G b̂,  g_b = Gᵀ â         the gradients of â and b̂                                   (2)
    grad_a = (g_a - â (â · g_a)) / ‖a‖,  grad_b the same                                      (3)
    tangent_ℓ = Σ gradient · tangent; row by row: Σ_j (P - 1)_ij tangent_z_ij                 (4)

Saves:
    a and b, which are inputs, and log P up to N = 2048 (4 bytes for each of N by N, where autograd keeps 14); beyond,
    and in half precision, it is made again: for a third more time nothing of N by N is kept.

Edge values:
    ‖a‖ below 1e-12 counts as 1e-12.   N = 0: the mean is NaN.   N = 1: ℓ = 0.

Sources:
    van den Oord, Li, Vinyals, "Representation Learning with Contrastive Predictive Coding", 2018, arXiv:1807.03748.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._autocast import autocasts
from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import (
    Context,
    counted_up,
    entry,
    fused,
    is_half,
    plain,
    public,
    scale_fresh,
    widened,
)
from torchbp.ops._op import Op, rounded_once
from torchbp.ops._range import in_float64, in_range
from torchbp.ops._reduction import in_common_dtype, named, reduce, spread
from torchbp.ops._samples import Make, Sample, square, stored

__all__ = ["InfoNCELoss", "InfoNCELossFunction", "info_nce_loss"]

_NAME = "info_nce_loss"
_EPS = 1e-12  # of torch's normalize
_KEPT = 1 << 22  # elements of log P


class InfoNCELossFunction(Function):
    """InfoNCE with hand-written gradients. Call it through :func:`info_nce_loss`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        a: Tensor, b: Tensor, temperature: float, reduction: str
    ) -> tuple[Tensor, Tensor | None]:  # (N, D), (N, D) -> () or (N,); log P (N, N)
        (unit_a, _), (unit_b, _) = _unit(a), _unit(b)
        log_p = torch.log_softmax((unit_a / temperature) @ unit_b.mT, 1)
        own = counted_up(a.shape[0], a, torch.int64).unsqueeze(1)
        loss = reduce(-log_p.gather(1, own).squeeze(1), reduction).to(a.dtype)
        kept = fused(a, b) and log_p.numel() <= _KEPT
        if kept and autocasts(a.device.type):
            kept = False  # it made the product in half precision, backward will not
        return loss, log_p if kept else None

    @staticmethod
    def setup_context(
        ctx: Context,
        inputs: tuple[Tensor, Tensor, float, str],
        output: tuple[Tensor, Tensor | None],
    ) -> None:
        a, b, ctx.temperature, ctx.reduction = inputs
        _, log_p = output
        if log_p is not None:
            ctx.mark_non_differentiable(log_p)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, b, log_p)
        ctx.save_for_forward(a, b)

    @staticmethod
    def backward(
        ctx: Context, grad: Tensor | None, _log_p: None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        if grad is None:
            return None, None, None, None
        a, b, log_p = ctx.saved_tensors
        need_a, need_b, *_ = ctx.needs_input_grad
        s = spread(grad, ctx.reduction, a.shape[0]).expand(a.shape[0])
        (unit_a, norm_a), (unit_b, norm_b) = _unit(a), _unit(b)
        if log_p is None or not fused(grad, a, b):
            log_p = (unit_a / ctx.temperature) @ unit_b.mT
        excess = _excess(log_p)
        # Along the rows: of the narrow matrices, not of N by N.
        s = (s / ctx.temperature).unsqueeze(1)
        grad_a = grad_b = None
        if need_a:
            grad_a = _of_vector(scale_fresh(excess @ unit_b, s), unit_a, norm_a).to(a.dtype)  # (2)
        if need_b:
            grad_b = _of_vector(excess.mT @ (s * unit_a), unit_b, norm_b).to(b.dtype)
        return grad_a, grad_b, None, None

    @staticmethod
    def jvp(
        ctx: Context, tangent_a: Tensor | None, tangent_b: Tensor | None, *_: None
    ) -> tuple[Tensor, None]:
        a, b = ctx.saved_tensors[:2]
        (unit_a, norm_a), (unit_b, norm_b) = _unit(a), _unit(b)
        weights = _excess((unit_a / ctx.temperature) @ unit_b.mT) / ctx.temperature
        tangent = torch.zeros_like(
            weights
        )  # (3) is symmetric: it turns tangents into those of â, b̂
        if tangent_a is not None:
            tangent = tangent + _of_vector(tangent_a, unit_a, norm_a) @ unit_b.mT
        if tangent_b is not None:
            tangent = tangent + unit_a @ _of_vector(tangent_b, unit_b, norm_b).mT
        return reduce((weights * tangent).sum(1), ctx.reduction), None  # (4)


def _unit(v: Tensor) -> tuple[Tensor, Tensor]:
    """Return v / ‖v‖ and ‖v‖, in float32 for half precision."""
    v = widened(v)
    norm = torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp(min=_EPS)
    return v / norm, norm


def _excess(z: Tensor) -> Tensor:
    """Return P - 1 of (1), from z or from log P."""
    p = torch.softmax(z, 1)
    if fused(p) and plain(p):
        p.diagonal().sub_(1)
        return p
    place = counted_up(p.shape[0], p, torch.int64)
    return p - (place.unsqueeze(1) == place).to(p.dtype)


def _of_vector(g: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    return (g - unit * (unit * g).sum(1, keepdim=True)) / norm  # (3)


_info_nce_loss = entry(InfoNCELossFunction)


@public
def info_nce_loss(
    input1: Tensor, input2: Tensor, temperature: float = 0.1, reduction: str = "mean"
) -> Tensor:
    r"""InfoNCE: cross entropy of the cosines :math:`\hat a_i \cdot \hat b_j / \tau` against :math:`j = i`, reduced.

    Args:
        input1: Vectors a, ``(N, D)``, floating point.
        input2: Vectors b, ``(N, D)``; row i is the positive of row i of a, the others are its negatives.
        temperature: :math:`\tau`, positive.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        The loss in nats: a scalar, or ``(N,)`` for ``"none"``.

    Raises:
        NotImplementedError: Integer or complex vectors.
        ValueError: Shapes that differ or are not ``(N, D)``, an unknown reduction, or ``temperature`` not positive.

    Example:
        >>> import torch
        >>> from torchbp.functional import info_nce_loss
        >>> info_nce_loss(torch.eye(2), torch.eye(2), temperature=1.0)
        tensor(0.3133)
    """
    reduction = named(_NAME, reduction, None, None)
    _check(input1, input2, temperature)
    input1, input2 = in_common_dtype(input1, input2)
    loss, _ = _info_nce_loss(input1, input2, temperature, reduction)
    if in_range(input1, input2):
        return loss
    return in_float64(info_nce_loss, input1, input2, temperature, reduction)


def _check(a: Tensor, b: Tensor, temperature: float) -> None:
    if not (a.is_floating_point() and b.is_floating_point()):
        raise NotImplementedError(wrong(_NAME, "floating-point vectors", a.dtype, "cast them"))
    if a.dim() != 2 or a.size() != b.size():
        got = f"{shape(a)} and {shape(b)}"
        raise ValueError(wrong(_NAME, "two inputs (N, D)", got, "one positive for each row"))
    if not temperature > 0:
        raise ValueError(wrong(_NAME, "a positive temperature", temperature, "0.1 is usual"))


class InfoNCELoss(nn.Module):
    """Module form of :func:`info_nce_loss`."""

    __module__ = "torchbp.nn"

    def __init__(self, temperature: float = 0.1, reduction: str = "mean") -> None:
        super().__init__()
        self.temperature, self.reduction = temperature, reduction

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        return info_nce_loss(input1, input2, self.temperature, self.reduction)


def _samples(make: Make) -> Iterator[Sample]:
    for reduction in ("mean", "sum", "none"):
        args = (make.normal(3, 4), make.normal(3, 4))
        yield Sample(args, {"reduction": reduction, "temperature": 0.5}, reduction)


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    args = (make.normal(3, 4), make.normal(3, 4))
    yield InfoNCELoss, Sample(), Sample(args)
    kwargs = {"temperature": 0.7, "reduction": "sum"}
    yield InfoNCELoss, Sample((), kwargs), Sample(args, name="temperature")


def _errors(make: Make) -> Iterator[Sample]:
    x = make.normal(3, 4)
    yield Sample((x, x), {"reduction": "average"}, name="reduction")
    yield Sample((x, x[:2]), name="shape")
    yield Sample((x, x), {"temperature": 0.0}, name="temperature")


def _benchmark(make: Make, n: int) -> Sample:
    rows = square(make, n).args[0].shape[0]
    return Sample((make.normal(rows, 128), make.normal(rows, 128)))


def _reference(
    input1: Tensor, input2: Tensor, temperature: float = 0.1, reduction: str = "mean"
) -> Tensor:
    """The definition, as it is usually written."""
    reduction = named(_NAME, reduction, None, None)
    _check(input1, input2, temperature)
    z = F.normalize(input1) @ F.normalize(input2).mT / temperature
    target = torch.arange(len(z), device=z.device)
    return F.cross_entropy(z, target, reduction=reduction)


def _saved_bytes(a: Tensor, *others: object, **_: object) -> int:
    pairs = 0 if is_half(a) or a.shape[0] ** 2 > _KEPT else a.shape[0] ** 2
    return stored(a, *others) + pairs * a.element_size()


OP = Op(
    function=info_nce_loss,
    modules=(InfoNCELoss,),
    reference=rounded_once(_reference),
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=_saved_bytes,
    benchmark=_benchmark,
)
