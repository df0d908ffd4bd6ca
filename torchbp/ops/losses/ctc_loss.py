r"""Connectionist temporal classification: ℓ = -log of the summed probability of all paths that spell the target.

x (T, N, C) are log probabilities. A path names a class at each time; it spells the target once repeats are merged and
then blanks dropped. l (L = 2S + 1) is the target with a blank before, between and after its labels.

Derivation, for one sequence, with e_t(s) = x_t(l_s), and sums of probabilities taken as log Σ exp:
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

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import Context, eager, entry, in_autocast_float32, is_half, public
from torchbp.ops._op import Op, rounded_once
from torchbp.ops._reduction import named, reduce, spread
from torchbp.ops._samples import Make, Sample, stored

__all__ = ["CTCLoss", "CTCLossFunction", "ctc_loss"]

_NEVER = -1e30  # log 0, but finite: second derivatives of log(0 + 0) would be NaN


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
        extended = _extended(labels, blank)
        emissions = _emissions(_wide(x), extended)
        _, alpha = _recursion(emissions, _may_skip(extended, blank))
        values = _loss(alpha, times, lengths)  # (2)
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
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        x, labels, times, lengths = ctx.saved_tensors
        s = spread(grad, ctx.reduction, times.numel())
        s = s / lengths.clamp(min=1) if ctx.reduction == "mean" else s.expand(times.shape)
        grad_x = _gradient(_wide(x), s, labels, times, lengths, ctx.blank, ctx.zero_infinity)
        return grad_x.to(x.dtype), None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, *_: None) -> Tensor:
        x, labels, times, lengths = ctx.saved_tensors
        one = x.new_ones(times.shape)
        gradient = _gradient(_wide(x), one, labels, times, lengths, ctx.blank, ctx.zero_infinity)
        values = (gradient * tangent_x).sum((0, 2))  # (5)
        values = values / lengths.clamp(min=1) if ctx.reduction == "mean" else values
        return reduce(values, ctx.reduction).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.float() if is_half(x) else x


def _extended(labels: Tensor, blank: int) -> Tensor:
    """Return l, (N, 2S + 1)."""
    blanks = torch.full_like(labels, blank)
    between = torch.stack([blanks, labels], 2).reshape(labels.shape[0], -1)
    return (
        torch.cat([between, torch.full_like(labels[:, :1], blank)], 1)
        if labels.shape[1]
        else (labels.new_full((labels.shape[0], 1), blank))
    )


def _emissions(x: Tensor, extended: Tensor) -> Tensor:
    """Return e, (T, N, L)."""
    return x.gather(2, extended.expand(x.shape[0], *extended.shape))


def _may_skip(extended: Tensor, blank: int) -> Tensor:
    """Return 0 where s may be reached from s - 2, else log 0; (N, L)."""
    before = torch.cat([torch.full_like(extended[:, :2], blank), extended[:, :-2]], 1)
    before = before[:, : extended.shape[1]]
    return torch.zeros(extended.shape, device=extended.device).masked_fill(
        (extended == blank) | (extended == before), _NEVER
    )


def _recursion(emissions: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    """Return a and α, (T, N, L), by (1)."""
    steps, batch, width = emissions.shape
    skip = skip.to(emissions.dtype)
    never = emissions.new_full((batch, 2), _NEVER)
    first = torch.cat(
        [emissions.new_zeros(batch, 2), emissions.new_full((batch, width), _NEVER)], 1
    )
    reached, alpha = [first[:, :width]], [first[:, :width] + emissions[0]]
    for t in range(1, steps):
        padded = torch.cat([never, alpha[-1]], 1)
        a = torch.logaddexp(padded[:, 2:], padded[:, 1:-1])
        reached.append(torch.logaddexp(a, padded[:, :-2] + skip))
        alpha.append(reached[-1] + emissions[t])
    return torch.stack(reached), torch.stack(alpha)


def _loss(alpha: Tensor, times: Tensor, lengths: Tensor) -> Tensor:
    """Return (2), (N,)."""
    batch, width = alpha.shape[1:]
    at = (times - 1).clamp(min=0).view(1, -1, 1).expand(1, batch, width)
    last = alpha.gather(0, at).squeeze(0)
    final = last.gather(1, 2 * lengths[:, None]).squeeze(1)
    label = last.gather(1, (2 * lengths - 1).clamp(min=0)[:, None]).squeeze(1)
    label = label.masked_fill(lengths == 0, _NEVER)
    values = -torch.logaddexp(final, label)
    empty = torch.where(lengths == 0, 0.0, torch.inf).to(values.dtype)
    values = torch.where(times == 0, empty, values)  # no time: only the empty target is spelt
    return torch.where(values > -_NEVER / 2, torch.inf, values)


def _gradient(
    x: Tensor,
    s: Tensor,
    labels: Tensor,
    times: Tensor,
    lengths: Tensor,
    blank: int,
    zero_infinity: bool,
) -> Tensor:
    extended = _extended(labels, blank)
    emissions = _emissions(x, extended)
    steps, batch, width = emissions.shape
    # The reversed sequences run as more rows of the same loop.
    t = torch.arange(steps, device=x.device)[:, None]
    back_t = times[None, :] - 1 - t  # (T, N)
    back_s = 2 * lengths[:, None] - torch.arange(width, device=x.device)  # (N, L)
    index_t = back_t.clamp(min=0)[:, :, None].expand(emissions.shape)
    index_s = back_s.clamp(min=0).expand(emissions.shape)
    turned = emissions.gather(0, index_t).gather(2, index_s)
    both = torch.cat([extended, extended.gather(1, back_s.clamp(min=0))])
    reached, alpha = _recursion(torch.cat([emissions, turned], 1), _may_skip(both, blank))
    alpha, rest = alpha[:, :batch], reached[:, batch:].gather(0, index_t).gather(2, index_s)  # (3)
    loss = _loss(alpha, times, lengths)
    inside = (back_t >= 0)[:, :, None] & (back_s >= 0)
    lost = loss.isinf()
    s = s.masked_fill(lost, 0.0 if zero_infinity else torch.nan)
    posterior = alpha + rest + loss.masked_fill(lost, 0)[:, None]
    share = posterior.masked_fill(~inside, _NEVER).exp()
    weighted = share * -s[:, None]
    index = extended.expand(emissions.shape)
    return torch.zeros_like(x).scatter_add(2, index, weighted.to(x.dtype))  # (4)


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
    times, lengths = (
        torch.as_tensor(v, device=log_probs.device).long().reshape(-1)
        for v in (input_lengths, target_lengths)
    )
    single = log_probs.dim() == 2
    x = log_probs.unsqueeze(1) if single else log_probs
    _check(x, targets, times, lengths, blank)
    targets = targets.long().unsqueeze(0) if single and targets.dim() == 1 else targets.long()
    labels = targets if targets.dim() == 2 else _padded(targets, lengths)
    (x,) = in_autocast_float32(x)
    loss = _ctc_loss(x, labels.to(x.device), times, lengths, blank, zero_infinity, reduction)
    return loss.squeeze(0) if single and loss.dim() else loss


def _check(x: Tensor, targets: Tensor, times: Tensor, lengths: Tensor, blank: int) -> None:
    if not x.is_floating_point():
        raise NotImplementedError(wrong("ctc_loss", "floating-point x", x.dtype, "cast it"))
    if targets.is_floating_point() or targets.is_complex():
        raise RuntimeError(wrong("ctc_loss", "integer targets", targets.dtype, "cast them"))
    if x.dim() != 3 or targets.dim() not in (1, 2):
        rule = "log_probs (T, N, C) or (T, C) with targets (N, S) or (sum,)"
        got = f"{shape(x)} with {shape(targets)}"
        raise RuntimeError(wrong("ctc_loss", rule, got, "reshape them"))
    if not 0 <= blank < x.shape[2]:
        raise RuntimeError(wrong("ctc_loss", f"blank in [0, {x.shape[2]})", blank, "name a class"))
    if not times.numel() == lengths.numel() == x.shape[1]:
        rule, got = f"{x.shape[1]} lengths", f"{times.numel()} and {lengths.numel()}"
        raise RuntimeError(wrong("ctc_loss", rule, got, "one of each for every sequence"))
    if not (eager() and x.is_cpu):
        return
    room = targets.shape[1] if targets.dim() == 2 else targets.numel()
    for name, values, most in (("input", times, x.shape[0]), ("target", lengths, room)):
        if ((values < 0) | (values > most)).any():
            rule = f"{name}_lengths in [0, {most}]"
            raise RuntimeError(wrong("ctc_loss", rule, values.tolist(), "see the tensors' shapes"))


def _padded(targets: Tensor, lengths: Tensor) -> Tensor:
    """Return targets that stand in a row as (N, S)."""
    longest = int(lengths.max()) if eager() and lengths.numel() else targets.numel()
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


def _arguments(make: Make, row: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = make.normal(5, 3, 4, requires_grad=False).double().log_softmax(2).to(make.dtype)
    targets = torch.tensor([[1, 1], [2, 3], [3, 1]])
    times, lengths = torch.tensor([5, 4, 3]), torch.tensor([2, 2, 1])
    targets = torch.cat([v[:n] for v, n in zip(targets, lengths, strict=True)]) if row else targets
    return x.requires_grad_(), targets, times, lengths


def _samples(make: Make) -> Iterator[Sample]:
    for reduction in ("mean", "sum", "none"):
        yield Sample(_arguments(make), {"reduction": reduction}, reduction)
    yield Sample(_arguments(make, row=True), name="row")
    x, targets, _, lengths = _arguments(make)
    short = torch.tensor([2, 4, 1])  # two labels alike need three times
    yield Sample((x, targets, short, lengths), {"zero_infinity": True}, "zero-infinity")
    one = (
        x[:, 0].detach().clone().requires_grad_(),
        targets[1].clone(),
        torch.tensor(5),
        torch.tensor(2),
    )
    yield Sample(one, {"blank": 1, "reduction": "none"}, "1d")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    x, *others = _arguments(make)
    logits = Sample((x.detach(), *others))
    kwargs = {"blank": 0, "reduction": "sum", "zero_infinity": True}
    yield CTCLoss, Sample((), kwargs), logits


def _errors(make: Make) -> Iterator[Sample]:
    x, targets, times, lengths = _arguments(make)
    yield Sample((x, targets, times, lengths), {"reduction": "average"}, name="reduction")
    yield Sample((x, targets, times, lengths), {"blank": 4}, name="blank")
    yield Sample((x, targets, times[:2], lengths), name="lengths")
    yield Sample((x, targets, times + 5, lengths), name="too-long")


def _benchmark(make: Make, n: int) -> Sample:
    steps = max(20, n // (16 * 64))
    x = make.normal(steps, 16, 64, requires_grad=False).log_softmax(2).requires_grad_()
    labels = 1 + make.labels(16, steps // 4, classes=63)
    times, lengths = torch.full((16,), steps), torch.full((16,), steps // 4)
    return Sample((x, labels, times, lengths))


def _reference(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """The sum over all paths, one by one, since torch's gradient is not the derivative by ``log_probs``."""
    rest: tuple[Any, ...] = (input_lengths, target_lengths, blank, reduction, zero_infinity)
    F.ctc_loss(log_probs.detach(), targets, *rest)  # for its errors
    single = log_probs.dim() == 2
    x = log_probs.unsqueeze(1) if single else log_probs
    lengths, times = target_lengths.reshape(-1).tolist(), input_lengths.reshape(-1).tolist()
    values, start = [], 0
    for n, (length, time) in enumerate(zip(lengths, times, strict=True)):
        row = (
            targets.reshape(len(lengths), -1)[n]
            if single or targets.dim() == 2
            else targets[start:]
        )
        start += length
        values.append(-_of_paths(x[:time, n], row[:length].tolist(), blank))
    loss = torch.stack(values)
    if zero_infinity:
        loss = torch.where(loss.isinf(), 0.0, loss)
    if reduction == "mean":
        loss = loss / target_lengths.reshape(-1).clamp(min=1)
    loss = reduce(loss, reduction)
    return loss.squeeze(0) if single and loss.dim() else loss


def _of_paths(x: Tensor, labels: Sequence[int], blank: int) -> Tensor:
    paths = torch.cartesian_prod(*(torch.arange(x.shape[1]),) * x.shape[0]).view(-1, x.shape[0])
    spelt = []
    for path in paths.tolist():
        merged = [c for i, c in enumerate(path) if i == 0 or c != path[i - 1]]
        spelt.append([c for c in merged if c != blank] == list(labels))
    paths = paths[torch.tensor(spelt)]
    if not len(paths):
        return x.sum() * 0 - torch.inf
    return x.gather(1, paths.T).sum(0).logsumexp(0)


def _saved_bytes(x: Tensor, targets: Tensor, times: Tensor, lengths: Tensor, **_: object) -> int:
    padded = lengths.numel() * int(lengths.max()) * targets.element_size()
    in_a_row = x.dim() == 3 and targets.dim() == 1
    return stored(x, times, lengths) + (padded if in_a_row else stored(targets))


OP = Op(
    function=ctc_loss,
    modules=(CTCLoss,),
    reference=rounded_once(_reference),
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=_saved_bytes,
    other_gradient="torch's is that of log_softmax's input, wherever log_probs come from",
    benchmark=_benchmark,
)
