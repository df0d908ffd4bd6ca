"""Outputs that change with the inputs, and have no gradient: detached, computed by numpy, made anew from a number."""

from collections.abc import Iterator

import torch

from torchbp.verify.cases import Case
from torchbp.verify.raised import ForwardRaised
from torchbp.verify.report import Finding, Severity
from torchbp.verify.resize import scaled

__all__ = ["lost"]

MOVED = 1.0625  # times


def lost(case: Case, check: str, severity: Severity) -> Iterator[Finding]:
    """Yield a finding for each such output.

    Args:
        case: The function and its sample.
        check: Name of the check that asks.
        severity: A note, where other outputs have a gradient: one without may be meant.
    """
    silent = [
        k
        for k, y in enumerate(case.all_outputs)
        if k not in case.differentiable and (y.is_floating_point() or y.is_complex()) and y.numel()
    ]
    if not silent:
        return
    other = scaled(case, MOVED)
    try:
        pairs = list(zip(case.all_outputs, other.all_outputs, strict=True))
    except (ForwardRaised, ValueError):  # or gives other outputs
        return
    for k in silent:
        here, there = pairs[k]
        if here.shape == there.shape and not torch.allclose(here, there, equal_nan=True):
            yield Finding(
                check=check,
                severity=severity,
                message=f"output {k} changes with the inputs, and has no gradient",
                cause="marked as not differentiable, or computed without a graph: is that meant?",
            )
