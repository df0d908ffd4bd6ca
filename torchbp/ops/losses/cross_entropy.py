r"""Cross entropy of logits: ℓ = -Σ_c w_c q_c log p_c with p = softmax(x), then reduced.

x (N, C, *) are the logits, w the class weights, q the target distribution, smoothed by ε ("label_smoothing").
Of probabilities q': q = (1 - ε) q' + ε/C. Of a class index t, where the weight is that of the class t:
    ℓ = -(1 - ε) w_t log p_t - ε/C Σ_c w_c log p_c,  and ℓ = 0 where t is ignored.
"softcap" is the activation of that name, "z_loss" is in _z_loss.py.
"mean" divides by the number of positions, for indices by the sum of w_t over those not ignored.

Derivation, with ∂log p_c/∂x_j = [c = j] - p_j and s the gradient of each ℓ:
    of indices (_index_cross_entropy.py, and many: _softmax_cross_entropy.py), with a = s (1 - ε) w_t and b = s ε/C,
    both 0 where ignored:
    grad_x_j  = p_j (a + b Σ_c w_c) - b w_j - a [j = t]                                       (1)
    of probabilities (_probability_cross_entropy.py):
    grad_x_j  = s · (p_j Σ_c w_c q_c - w_j q_j)                                               (2)
    grad_q'_j = -s · (1 - ε) w_j log p_j                                                      (3)
    grad_w_j  = -Σ over positions of s · q_j log p_j                                          (4)
    tangent_ℓ = Σ_j gradient_j · tangent_j, with s = 1                                        (5)

Saves:
    x (4 bytes per float32 element), the target, w. torch keeps log p instead of x: as much. Of 2¹⁴ to 2²³ float32
    logits with neither weights nor smoothing nor ignored positions p instead of x, but under ``lean`` and with compiled
    kernels, which make p again; a second derivative goes through p, which is an output that no caller sees.

Edge values:
    All ignored, or N = 0: the mean is NaN, the gradient 0.   A logit of -∞: p = 0, grad 0.   x = +∞: NaN.

Sources:
    Bridle, "Probabilistic Interpretation of Feedforward Classification Network Outputs", 1990,
    doi:10.1007/978-3-642-76153-9_28.  Smoothing: Szegedy et al., 2015, arXiv:1512.00567.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops._errors import wrong
from torchbp.ops._function import in_autocast_float32, is_half, public
from torchbp.ops._op import Op
from torchbp.ops._reduction import named
from torchbp.ops._samples import Make, Sample, against_classes, stored
from torchbp.ops.activations.softcap import softcap as capped
from torchbp.ops.losses._classes import class_dim
from torchbp.ops.losses._index_cross_entropy import of_indices
from torchbp.ops.losses._probability_cross_entropy import of_probabilities
from torchbp.ops.losses._softmax_cross_entropy import of_softmax, suits_softmax
from torchbp.ops.losses._z_loss import log_partition_penalty

__all__ = ["CrossEntropyLoss", "cross_entropy"]


@public
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    r"""Cross entropy of logits against class indices or class probabilities: :math:`\ell = -\log p_t`, reduced.

    Args:
        input: Logits ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``, floating point.
        target: Class indices of the shape of ``input`` without ``C``, int64 or uint8; or probabilities of the shape
            of ``input``, floating point.
        weight: A factor of each class, ``(C,)``.
        size_average: Deprecated in torch; see ``reduction``.
        ignore_index: The class index whose positions count for nothing.
        reduce: Deprecated in torch; see ``reduction``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``; the mean is weighted.
        label_smoothing: The share :math:`\epsilon` of the target that is spread evenly over all classes, in ``[0, 1]``.
        z_loss: The factor of :math:`\log^2 \sum_c e^{x_c}`, added at each position that counts and reduced like
            the loss, but without class weights; it keeps the logits from drifting.
        softcap: The bound c, positive, of the logits: :math:`c \tanh(x / c)` takes their place.

    Returns:
        The loss in nats: a scalar, or the shape of ``input`` without ``C`` for ``"none"``.

    Raises:
        IndexError: A class index outside ``[0, C)``.
        ValueError: ``target`` of another batch size, an unknown reduction, or a ``softcap`` that is not positive.
        RuntimeError: Other shapes or dtypes that do not fit; a smoothing outside ``[0, 1]``; ``ignore_index`` with
            probabilities; a ``weight`` that requires grad with indices.

    Example:
        >>> import torch
        >>> from torchbp.functional import cross_entropy
        >>> cross_entropy(torch.tensor([[0.0, 2.0], [0.0, 0.0]]), torch.tensor([1, 0]))
        tensor(0.4100)
    """
    reduction = named("cross_entropy", reduction, size_average, reduce)
    if softcap is not None:
        if not softcap > 0:
            rule = "a positive softcap"
            raise ValueError(wrong("cross_entropy", rule, softcap, "None does not cap"))
        input = capped(input, softcap)
    loss = _cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
    if z_loss == 0:
        return loss
    counts = None if target.shape == input.shape else target != ignore_index
    return loss + log_partition_penalty(input, counts, z_loss, reduction)


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    if target.shape == input.shape:
        if not target.is_floating_point():
            rule = "floating-point probabilities where target has the input's shape"
            raise RuntimeError(
                wrong("cross_entropy", rule, target.dtype, "indices have no class dimension")
            )
        if ignore_index >= 0:
            rule = "no ignore_index with class probabilities"
            raise RuntimeError(
                wrong("cross_entropy", rule, ignore_index, "mask with reduction='none'")
            )
        if not input.is_cpu:  # there autocast takes the logarithm in float32, and with it all
            (input,) = in_autocast_float32(input)
        return of_probabilities(input, target, weight, reduction, label_smoothing)
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        rule = "a weight without requires_grad for class indices, as in torch"
        raise RuntimeError(wrong("cross_entropy", rule, "one that requires it", "detach it"))
    if weight is None and label_smoothing == 0.0 and suits_softmax(input, target, ignore_index):
        return of_softmax(input, target, reduction)[0]
    return of_indices(input, target, weight, reduction, ignore_index, label_smoothing)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """Module form of :func:`cross_entropy`; the weight is a buffer."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


def _samples(make: Make) -> Iterator[Sample]:
    for reduction in ("mean", "sum", "none"):
        for shape in ((5, 4), (4,), (2, 4, 3), (2, 4, 3, 2), (1, 1)):
            dims = "x".join(map(str, shape))
            positions, classes = (*shape[:-1][:1], *shape[2:]), shape[min(1, len(shape) - 1)]
            target = make.labels(*positions, classes=classes)
            kwargs = {"reduction": reduction}
            yield Sample((make.normal(*shape), target), kwargs, f"{dims}-{reduction}")
            q = make.probabilities(*shape, dim=min(1, len(shape) - 1), requires_grad=True)
            yield Sample((make.normal(*shape), q), kwargs, f"{dims}-{reduction}-probabilities")
        for smoothing in (0.0, 0.1, 1.0):
            kwargs = {"reduction": reduction, "label_smoothing": smoothing}
            weighted = {"weight": make.uniform(4, low=0.2), **kwargs}
            name = f"{reduction}-smoothing{smoothing}"
            target = make.labels(5, 3, classes=4)
            target[1, 2] = 3
            yield Sample((make.normal(5, 4, 3), target), kwargs, name)
            ignoring = {"ignore_index": 3, **weighted}
            yield Sample((make.normal(5, 4, 3), target), ignoring, f"{name}-weight-ignored")
            q = make.probabilities(5, 4, 3, dim=1)
            yield Sample((make.normal(5, 4, 3), q), weighted, f"{name}-weight-probabilities")
        w = make.uniform(4, low=0.2, requires_grad=True)
        q = make.probabilities(5, 4, dim=1)
        kwargs = {"weight": w, "reduction": reduction}
        yield Sample((make.normal(5, 4), q), kwargs, f"{reduction}-trained-weight")
        ignored = torch.full((5,), -100, device=make.device)
        if reduction != "mean":  # the mean of nothing is NaN: a test of its own
            kwargs = {"reduction": reduction}
            yield Sample((make.normal(5, 4), ignored), kwargs, f"{reduction}-all-ignored")
            yield Sample((make.normal(0, 4), ignored[:0]), kwargs, f"{reduction}-empty")
    yield Sample((make.normal(5, 4), make.labels(5, classes=4).to(torch.uint8)), name="uint8")
    for reduction in ("mean", "none"):
        kwargs = {"z_loss": 0.1, "ignore_index": 1, "reduction": reduction}
        yield Sample((make.normal(5, 4), make.labels(5, classes=4)), kwargs, f"z-loss-{reduction}")
    kwargs = {"z_loss": 0.1, "softcap": 2.0, "reduction": "sum"}
    probabilities = make.probabilities(2, 4, 3, dim=1)
    yield Sample((make.normal(2, 4, 3), probabilities), kwargs, "z-loss-softcap-probabilities")
    kwargs = {"softcap": 2.0, "weight": make.uniform(4, low=0.2)}
    yield Sample((make.normal(5, 4), make.labels(5, classes=4)), kwargs, "softcap")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    sample = Sample((make.normal(5, 4), make.labels(5, classes=4)))
    yield CrossEntropyLoss, Sample(), sample
    kwargs = {"weight": make.uniform(4), "label_smoothing": 0.1, "ignore_index": 2}
    yield CrossEntropyLoss, Sample((), kwargs), Sample(sample.args, name="all-arguments")


def _errors(make: Make) -> Iterator[Sample]:
    x, target = make.normal(5, 4), make.labels(5, classes=4)
    yield Sample((x, target + 4), name="index-above")
    yield Sample((x, target - 4), name="index-below")
    yield Sample((x, target[:3]), name="batch")
    yield Sample((x, target.double()), name="target-dtype")
    yield Sample((x, target), {"reduction": "average"}, name="reduction")
    yield Sample((x, target), {"label_smoothing": 2.0}, name="smoothing")
    yield Sample((x, target), {"weight": make.uniform(3)}, name="weight")
    yield Sample((x, target), {"weight": make.uniform(4, requires_grad=True)}, name="weight-grad")
    yield Sample((x, x.softmax(1)), {"ignore_index": 1}, name="ignored-probabilities")
    yield Sample((x, make.labels(5, 4, classes=2)), name="integer-probabilities")
    yield Sample((make.labels(5, 4, classes=3), target), name="integers")


def _saved_bytes(x: Tensor, target: Tensor, **kwargs: object) -> int:
    mask = target.numel() if "z_loss" in kwargs and target.shape != x.shape else 0
    uncapped = x if "softcap" in kwargs and is_half(x) else None
    return mask + stored(x, target, kwargs.get("weight"), uncapped)


def _reference(
    input: Tensor,
    target: Tensor,
    *args: Any,
    z_loss: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> Tensor:
    """Torch's, and the two additions as they are usually written."""
    if softcap is not None:
        input = softcap * torch.tanh(input / softcap)
    loss = F.cross_entropy(input, target, *args, **kwargs)
    if z_loss == 0:
        return loss
    penalty = z_loss * input.logsumexp(class_dim(input)).square()
    if target.shape != input.shape:
        ignore = target == kwargs.get("ignore_index", -100)
        penalty = penalty.masked_fill(ignore, 0)
        count = (~ignore).sum()
    else:
        count = penalty.numel()
    reduction = kwargs.get("reduction", "mean")
    if reduction == "none":
        return loss + penalty
    return loss + (penalty.sum() / count if reduction == "mean" else penalty.sum())


OP = Op(
    function=cross_entropy,
    modules=(CrossEntropyLoss,),
    reference=_reference,
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=_saved_bytes,
    benchmark=against_classes,
)
