"""Linearity: the gradient is linear in grad_output, whatever the function.

backward(v) = Jᵀ v, so backward(-1000 v) = -1000 backward(v), backward(v / 1000) = backward(v) / 1000, and
backward(v + w) = backward(v) + backward(w), no differences needed. torch.autograd.gradcheck sends grad_outputs of 0 and
1 only, and so misses a backward that clamps grad_output or takes its magnitude.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from torchbp.verify._check import Check
from torchbp.verify.cases import Case
from torchbp.verify.raised import BackwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.tolerance import compare_all
from torchbp.verify.work import Bounded

NAME = "linearity"
SIXTEENTHS = 16  # whose sums are exact, in whatever precision
RELATIVE = 1e-10  # of what is summed in another order for another grad_output; a rounded grad_output is off by 1e-8


def _run(case: Case) -> Iterator[Finding]:
    v = case.plain.cotangents
    g = case.plain.grads
    large = 2.0**24 if case.epsilon < 1e-12 else 2.0**10
    small = 2.0**-70 if case.epsilon < 1e-12 else 2.0**-30
    scales = {
        # Powers of 2: exact.
        -large: "grad_output clamped or rounded, or |·| of it, or one of its signs dropped",
        small: "something added to grad_output, or a small one dropped",
    }
    w = [_half_zero(t) for t in case.cotangents(case.plain.outputs, NAME)]
    both = [a + b for a, b in zip(v, w, strict=True)]
    *scaled, of_w, of_both = case.vjps([*([s * t for t in v] for s in scales), w, both])
    for (scale, cause), got in zip(scales.items(), scaled, strict=True):
        expected = [scale * t for t in g]
        when = f" for grad_output times {scale:g}"
        found = compare_all(
            NAME,
            case,
            got,
            expected,
            when=when,
            cause=cause,
            also=2 * abs(scale),
            relative=RELATIVE
            if scale != -large
            else 1e4 * RELATIVE,  # some choose their steps by its size
        )
        yield from found
        if found:
            return
    expected = [a + b for a, b in zip(g, of_w, strict=True)]
    when = " for the sum of two grad_outputs"
    found = compare_all(NAME, case, of_both, expected, when=when, also=3.0, relative=RELATIVE)
    yield from found or _not_a_number(case)


def _not_a_number(case: Case) -> Iterator[Finding]:
    """Look at a grad_output of NaN: a loss scaler waits for it, to leave out the step."""
    v = [torch.full_like(t, torch.nan) for t in case.plain.cotangents]
    if not any(bool(g.any()) for g in case.plain.grads):
        return
    leaves, outputs = case.kept
    try:
        with Bounded():  # what is repeated until a number is small never ends
            got = case.backward(outputs, leaves, v, retain_graph=True)
    except BackwardRaised:  # loud, or of a graph that can be run once only
        return
    if all(bool(t.isfinite().all()) for t in got):
        yield Finding(
            check=NAME,
            severity="wrong",
            message="for a grad_output of NaN all gradients are finite",
            cause="NaN made a number in backward: a loss scaler cannot see the overflow",
        )


def _half_zero(t: Tensor) -> Tensor:
    """Return ``t`` with zeros in every other place and in the first row, rounded so that all adds up to 0 exactly.

    What is divided by grad_output shows, and what looks at its sum.
    """
    if t.numel() < 2:
        return t
    keep = torch.arange(t.numel(), device=t.device).view(t.shape) % 2 == 1
    if t.dim() > 1 and t.shape[-2] > 1:
        keep[..., 0, :] = False
    if t.is_complex() or int(keep.sum()) < 2:
        return t * keep
    flat = torch.where(keep, (t * SIXTEENTHS).round() / SIXTEENTHS, 0).reshape(-1)
    flat[keep.reshape(-1).nonzero()[-1]] -= flat.sum()
    return flat.view(t.shape)


CHECK = Check(
    name=NAME,
    tests="the gradient is linear in grad_output: negative, large, small, a sum, NaN",
    run=_run,
    order=20,
)
