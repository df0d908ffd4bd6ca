"""The alarms of gradcheck on functions that count as right: at most 8, each torch's own, with a reproduction."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Alarm:
    """What is wrong, and a function that shows it in plain torch: true while torch is so."""

    why: str
    holds: Callable[[], bool]


def _logcumsumexp() -> bool:
    x = torch.zeros(3, requires_grad=True)
    (slope,) = torch.autograd.grad(x.logcumsumexp(0), x, torch.full((3,), torch.nan))
    return bool(slope.isfinite().all())


def _cdist() -> bool:
    generator = torch.Generator().manual_seed(0)
    a, b, v = (torch.randn(*n, generator=generator) for n in ((3, 4), (5, 4), (2, 3, 5)))
    a.requires_grad_()
    y = torch.cdist(a, b)

    def pull(t: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(y, a, t, retain_graph=True)[0]

    return not torch.allclose(torch.vmap(pull)(v), torch.stack([pull(t) for t in v]), atol=1e-3)


def _softshrink() -> bool:
    x = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F.softshrink(x, 0.0), x)
    return float(slope) == 0.0  # softshrink(x, 0) is x


def _clipped() -> bool:
    x = torch.ones((), requires_grad=True)
    y = x * 1
    y.register_hook(lambda grad: grad.clamp(-1, 1))
    return float(torch.autograd.grad(y, x, torch.tensor(1024.0))[0]) == 1.0


def _pixel_shuffle() -> bool:
    x = torch.zeros(0, 4, 2, 3, requires_grad=True)
    try:
        F.pixel_shuffle(x, 2).sum().backward()
    except RuntimeError:
        return True
    return False


KNOWN: dict[str, Alarm] = {
    "torchbp softshrink": Alarm(
        "for a threshold of 0 the function is x, its slope at 0 is 1, and torch's, like torchbp's, 0",
        _softshrink,
    ),
    "torchbp gradient_clip": Alarm(
        "clips the incoming gradient by design, as a hook would: not linear in it", _clipped
    ),
    "cdist": Alarm(
        "torch.vmap over its backward gives wrong numbers for all samples but one", _cdist
    ),
    "logcumsumexp0": Alarm(
        "of a grad_output of NaN it makes a gradient of 0: it looks which are positive, which negative",
        _logcumsumexp,
    ),
    "pixel_shuffle_6": Alarm(
        "pixel_unshuffle leaves an empty batch's shape as it is, so the backward fails",
        _pixel_shuffle,
    ),
}
