r"""Connectionist temporal classification: ℓ = -log of the summed probability of all paths that spell the target.

x (T, N, C) are log probabilities. A path names a class at each time; it spells the target once repeats are merged and
then blanks dropped. l (L = 2S + 1) is the target with a blank before, between and after its labels.

Derivation, for one sequence, with e_t(s) = x_t(l_s), and sums of probabilities taken as log Σ exp (_ctc_lattice.py):
    α_t(s) = e_t(s) + a_t(s),  a_t(s) = log Σ exp of α_{t-1}(s), α_{t-1}(s-1) and, where l_s is neither a blank nor
             l_{s-2}, α_{t-1}(s-2);  a_0(0) = a_0(1) = 0                                      (1)
    ℓ = -log(exp α_{T-1}(2S) + exp α_{T-1}(2S-1))                                             (2)
    b_t(s), the log probability of the rest of the path behind (t, s), is a of the sequence and the target reversed,
    at T-1-t and 2S-s                                                                         (3)
    grad_x_t(k) = -s Σ over l_s = k of exp(α_t(s) + b_t(s) + ℓ)                               (4)
    tangent_ℓ = Σ gradient · tangent, with s = 1                                              (5)
    "mean" divides ℓ by the target's length (at least 1), then averages.

    (4) is the derivative by x. torch returns it with exp(x_t(k)) added, which comes to the same behind a log_softmax,
    and only there.

Saves:
    x, the target and the lengths (4 bytes per float32 element); α and b are made again in one loop over T. torch keeps
    α, and its result, beside x.

Edge values:
    No path spells the target: ℓ = ∞ and a gradient of NaN; with "zero_infinity" both are 0.

Sources:
    Graves, Fernández, Gomez, Schmidhuber, "Connectionist Temporal Classification: Labelling Unsegmented Sequence Data
    with Recurrent Neural Networks", 2006, doi:10.1145/1143844.1143891.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import Context, eager, entry, in_autocast_float32, plain, public, widened
from torchbp.ops._op import Op, rounded_once
from torchbp.ops._reduction import named, reduce, spread
from torchbp.ops._samples import Make, Sample
from torchbp.ops.kernels import over_sequences, over_sequences_backward
from torchbp.ops.losses import _ctc_samples
from torchbp.ops.losses._ctc_lattice import (
    emitted,
    forward_sums,
    input_gradient,
    losses,
    skips,
    with_blanks,
)

__all__ = ["CTCLoss", "CTCLossFunction", "ctc_loss"]


class CTCLossFunction(Function):
    """CTC with a hand-written gradient. Call it through :func:`ctc_loss`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        labels: Tensor,
        times: Tensor,
        lengths: Tensor,
        blank: int,
        zero_infinity: bool,
        reduction: str,
    ) -> Tensor:  # (T, N, C), (N, S), (N,), (N,) -> () or (N,)
        values = over_sequences(x, labels, times, lengths, blank)
        if values is None:
            extended = with_blanks(labels, blank)
            emissions = emitted(widened(x), extended)
            _, alpha = forward_sums(emissions, skips(extended, blank))
            values = losses(alpha, times, lengths)  # (2)
        if zero_infinity:
            values = values.masked_fill(values.isinf(), 0)
        if reduction == "mean":
            values = values / lengths.clamp(min=1)
        return reduce(values, reduction).to(x.dtype)

    @staticmethod
    def setup_context(
        ctx: Context,
        inputs: tuple[Tensor, Tensor, Tensor, Tensor, int, bool, str],
        output: Tensor,
    ) -> None:
        *tensors, ctx.blank, ctx.zero_infinity, ctx.reduction = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        x, labels, times, lengths = ctx.saved_tensors
        s = spread(grad, ctx.reduction, times.numel())
        s = s / lengths.clamp(min=1) if ctx.reduction == "mean" else s.expand(times.shape)
        which = (labels, times, lengths, ctx.blank)
        grad_x = over_sequences_backward(x, s, *which, zero_infinity=ctx.zero_infinity)
        if grad_x is None:
            grad_x = input_gradient(widened(x), s, *which, ctx.zero_infinity)
        return grad_x.to(x.dtype), None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, *_: None) -> Tensor:
        x, labels, times, lengths = ctx.saved_tensors
        one = x.new_ones(times.shape)
        gradient = input_gradient(
            widened(x), one, labels, times, lengths, ctx.blank, ctx.zero_infinity
        )
        values = (gradient * tangent_x).sum((0, 2))  # (5)
        values = values / lengths.clamp(min=1) if ctx.reduction == "mean" else values
        return reduce(values, ctx.reduction).to(x.dtype)


_ctc_loss = entry(CTCLossFunction)


@public
def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    r"""Connectionist temporal classification: minus the log probability of all paths that spell the target, reduced.

    Args:
        log_probs: Log probabilities ``(T, N, C)`` or ``(T, C)``, floating point.
        targets: Labels, int64, without the blank: ``(N, S)`` padded, or all in a row ``(sum(target_lengths),)``.
        input_lengths: How many of the T times count, ``(N,)``, or ``()`` for one sequence; a sequence of int will do.
        target_lengths: How many labels count, in the same form.
        blank: The class that stands for nothing.
        reduction: ``"mean"`` (each loss first divided by its target's length), ``"sum"`` or ``"none"``.
        zero_infinity: Whether targets that no path spells cost 0, with a gradient of 0, instead of infinity.

    Returns:
        The loss in nats: a scalar, or ``(N,)`` for ``"none"``.

    Raises:
        ValueError: An unknown reduction.
        NotImplementedError: Integer or complex ``log_probs``.
        RuntimeError: Shapes or lengths that do not fit, a blank outside ``[0, C)``, or inputs of a wrong dtype.

    Example:
        >>> import torch
        >>> from torchbp.functional import ctc_loss
        >>> even = torch.full((2, 1, 2), 0.5).log()
        >>> ctc_loss(even, torch.tensor([[1]]), torch.tensor([2]), torch.tensor([1]))
        tensor(0.2877)
    """
    reduction = named("ctc_loss", reduction, None, None)
    for name, v in (("input", input_lengths), ("target", target_lengths)):
        if isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex()):
            raise RuntimeError(wrong("ctc_loss", f"integer {name}_lengths", v.dtype, "cast them"))
    times, lengths = (
        torch.as_tensor(v, device=log_probs.device).long().reshape(-1)
        for v in (input_lengths, target_lengths)
    )
    single = log_probs.dim() == 2
    x = log_probs.unsqueeze(1) if single else log_probs
    longest = _check(x, targets, times, lengths, blank)
    targets = targets.to(x.device).long()
    targets = targets.unsqueeze(0) if single and targets.dim() == 1 else targets
    labels = targets if targets.dim() == 2 else _padded(targets, lengths, longest)
    (x,) = in_autocast_float32(x)
    loss = _ctc_loss(x, labels, times, lengths, blank, zero_infinity, reduction)
    return loss.squeeze(0) if single and loss.dim() else loss


def _check(x: Tensor, targets: Tensor, times: Tensor, lengths: Tensor, blank: int) -> int:
    """Raise for what does not fit; return the length of the longest target, or where nothing is looked at, of all.

    The lengths are looked at on every device, as in torch, which waits for them, too: one beyond its tensor would be
    read from memory that is not the tensor's.
    """
    if not x.is_floating_point():
        raise NotImplementedError(wrong("ctc_loss", "floating-point x", x.dtype, "cast it"))
    if x.dim() != 3 or targets.dim() not in (1, 2):
        rule = "log_probs (T, N, C) or (T, C) with targets (N, S) or (sum,)"
        got = f"{shape(x)} with {shape(targets)}"
        raise RuntimeError(wrong("ctc_loss", rule, got, "reshape them"))
    if not 0 <= blank < x.shape[2]:
        raise RuntimeError(wrong("ctc_loss", f"blank in [0, {x.shape[2]})", blank, "name a class"))
    if not times.numel() == lengths.numel() == x.shape[1]:
        rule, got = f"{x.shape[1]} lengths", f"{times.numel()} and {lengths.numel()}"
        raise RuntimeError(wrong("ctc_loss", rule, got, "one of each for every sequence"))
    room = targets.shape[1] if targets.dim() == 2 else targets.numel()
    if not (eager() and plain(lengths) and plain(times)):
        return room
    known = lengths.tolist()
    for name, values, most in (("input", times.tolist(), x.shape[0]), ("target", known, room)):
        if not all(0 <= v <= most for v in values):
            rule = f"{name}_lengths in [0, {most}]"
            raise RuntimeError(wrong("ctc_loss", rule, values, "see the tensors' shapes"))
    if targets.dim() == 1 and x.shape[1] != 1 and sum(known) != room:
        rule = f"target_lengths that sum to the {room} labels in a row"
        raise RuntimeError(wrong("ctc_loss", rule, known, "cut the labels, or pad them to (N, S)"))
    return max(known, default=room)


def _padded(targets: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """Return targets that stand in a row as (N, S), S the longest."""
    start = lengths.cumsum(0) - lengths
    index = start[:, None] + torch.arange(longest, device=targets.device)
    return targets[index.clamp(max=max(0, targets.numel() - 1))]


class CTCLoss(nn.CTCLoss):
    """Module form of :func:`ctc_loss`."""

    __module__ = "torchbp.nn"

    def forward(
        self, log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor
    ) -> Tensor:
        return ctc_loss(
            log_probs,
            targets,
            input_lengths,
            target_lengths,
            self.blank,
            self.reduction,
            self.zero_infinity,
        )


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    x, *others = _ctc_samples.arguments(make)
    logits = Sample((x.detach(), *others))
    kwargs = {"blank": 0, "reduction": "sum", "zero_infinity": True}
    yield CTCLoss, Sample((), kwargs), logits


OP = Op(
    function=ctc_loss,
    modules=(CTCLoss,),
    reference=rounded_once(_ctc_samples.reference),
    samples=_ctc_samples.samples,
    module_samples=_module_samples,
    errors=_ctc_samples.errors,
    saved_bytes=_ctc_samples.saved_bytes,
    other_gradient="torch's is that of log_softmax's input, wherever log_probs come from",
    benchmark=_ctc_samples.benchmark,
)
