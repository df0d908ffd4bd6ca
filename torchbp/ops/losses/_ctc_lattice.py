"""The lattice of times and labels that ``ctc_loss`` sums over: its file derives what is computed here.

T times, N sequences, S labels at most, L = 2S + 1 with the blanks around them.
"""

import torch
from torch import Tensor

__all__ = ["emitted", "forward_sums", "input_gradient", "losses", "skips", "with_blanks"]

_NEVER = -1e30  # log 0, but finite: second derivatives of log(0 + 0) would be NaN


def with_blanks(labels: Tensor, blank: int) -> Tensor:
    """Return l, (N, 2S + 1)."""
    blanks = torch.full_like(labels, blank)
    between = torch.stack([blanks, labels], 2).reshape(labels.shape[0], -1)
    return (
        torch.cat([between, torch.full_like(labels[:, :1], blank)], 1)
        if labels.shape[1]
        else (labels.new_full((labels.shape[0], 1), blank))
    )


def emitted(x: Tensor, extended: Tensor) -> Tensor:
    """Return e, (T, N, L)."""
    return x.gather(2, extended.expand(x.shape[0], *extended.shape))


def skips(extended: Tensor, blank: int) -> Tensor:
    """Return 0 where s may be reached from s - 2, else log 0; (N, L)."""
    before = torch.cat([torch.full_like(extended[:, :2], blank), extended[:, :-2]], 1)
    before = before[:, : extended.shape[1]]
    nothing = torch.zeros(extended.shape, dtype=torch.float32, device=extended.device)
    return nothing.masked_fill((extended == blank) | (extended == before), _NEVER)


def forward_sums(emissions: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
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


def losses(alpha: Tensor, times: Tensor, lengths: Tensor) -> Tensor:
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


def input_gradient(
    x: Tensor,
    s: Tensor,
    labels: Tensor,
    times: Tensor,
    lengths: Tensor,
    blank: int,
    zero_infinity: bool,
) -> Tensor:
    extended = with_blanks(labels, blank)
    emissions = emitted(x, extended)
    steps, batch, width = emissions.shape
    # The reversed sequences run as more rows of the same loop.
    t = torch.arange(steps, device=x.device)[:, None]
    back_t = times[None, :] - 1 - t  # (T, N)
    back_s = 2 * lengths[:, None] - torch.arange(width, device=x.device)  # (N, L)
    index_t = back_t.clamp(min=0)[:, :, None].expand(emissions.shape)
    index_s = back_s.clamp(min=0).expand(emissions.shape)
    turned = emissions.gather(0, index_t).gather(2, index_s)
    both = torch.cat([extended, extended.gather(1, back_s.clamp(min=0))])
    reached, alpha = forward_sums(torch.cat([emissions, turned], 1), skips(both, blank))
    alpha, rest = alpha[:, :batch], reached[:, batch:].gather(0, index_t).gather(2, index_s)  # (3)
    loss = losses(alpha, times, lengths)
    inside = (back_t >= 0)[:, :, None] & (back_s >= 0)
    lost = loss.isinf()
    s = s.masked_fill(lost, 0.0 if zero_infinity else torch.nan)
    posterior = alpha + rest + loss.masked_fill(lost, 0)[:, None]
    share = posterior.masked_fill(~inside, _NEVER).exp()
    weighted = share * -s[:, None]
    index = extended.expand(emissions.shape)
    return torch.zeros_like(x).scatter_add(2, index, weighted.to(x.dtype))  # (4)
