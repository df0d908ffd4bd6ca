"""When two numbers contradict each other, and the finding that says so."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchbp.verify.cases import Case
from torchbp.verify.causes import likely_cause
from torchbp.verify.report import Finding

__all__ = ["compare", "compare_all", "compare_outputs", "largest", "rounding"]

EXACT = 1e-12  # the precision of what works in float64 is below it


def rounding(case: Case, *tensors: Tensor) -> float:
    """Return the relative tolerance for one value computed in two ways, by rounding alone.

    4096 ulps at the precision the function works in: a sum of n terms in another order differs by at most n ulps of
    Σ|terms|, by about sqrt(n) in practice (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 4.2).
    16 times as many in float64, where a network of layers still has ten digits that agree.
    """
    eps = max([case.epsilon, *(torch.finfo(t.dtype).eps for t in tensors)])
    return (65536 if eps < EXACT else 4096) * eps


def compare(
    check: str,
    name: str,
    got: Tensor,
    expected: Tensor,
    tolerance: float | Tensor,
    *,
    what: str = "grad of",
    when: str = "",
    known: Tensor | None = None,
    leaf: Tensor | None = None,
    ones: Tensor | None = None,
    sizes: Sequence[int] = (),
    cause: str | None = None,
) -> Finding | None:
    """Return what is wrong with ``got``, or ``None``.

    Args:
        check: Name of the check.
        name: Which tensor this is: ``input 0``.
        got: Value found, shape ``(*)``.
        expected: Value trusted, shape ``(*)``.
        tolerance: Absolute; a number, or one per element.
        what: Begin of the sentence.
        when: End of the sentence: the condition that shows it.
        known: Which elements were tested; by default all.
        leaf: The input's value, for the cause.
        ones: Gradient for a grad_output of ones, for the cause.
        sizes: Sizes of the data, for the cause.
        cause: The cause where the check knows it better.
    """
    if got.shape != expected.shape:
        return Finding(
            check=check,
            severity="wrong",
            input=name,
            message=f"{what} {name} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}{when}",
            cause=cause,
        )
    if known is not None and bool(known.all()):
        known = None  # the shapes tell more of the cause
    got, expected = _wide(got), _wide(expected)
    tolerance, known, leaf, ones = map(_on_cpu, (tolerance, known, leaf, ones))
    if got.is_complex() != expected.is_complex():
        got, expected = got.to(torch.complex128), expected.to(torch.complex128)
    difference = (got - expected).abs()
    same = (got == expected) | (got.isnan() & expected.isnan())
    bad = ~same & ~(difference <= tolerance)
    if known is not None:
        bad &= known
    if not bad.any():
        return None
    flat = torch.where(bad, difference, -1.0).nan_to_num(nan=torch.inf).reshape(-1)
    # numpy's: the first torch.unravel_index of a process imports sympy, half a second
    at = tuple(map(int, np.unravel_index(int(flat.argmax()), got.shape))) if got.dim() else ()
    g, e = got[at].item(), expected[at].item()
    tested = got.numel() if known is None else int(known.sum())
    count = f" in {int(bad.sum())}/{tested} elements" if tested > 1 or got.numel() == 1 else ""
    count += f" measured of {got.numel()}" if count and tested < got.numel() else ""
    place = f"{', worst' if count else ''} at {list(at)}" if at else ""
    if cause is None:
        cause = likely_cause(
            *((got, expected, bad) if known is None else (got[known], expected[known], bad[known])),
            leaf=leaf if known is None or leaf is None else leaf[known],
            ones=ones if known is None or ones is None else ones[known],
            sizes=sizes,
        )
    return Finding(
        check=check,
        severity="wrong",
        message=(
            f"{what} {name} wrong{count}{place}: got {_show(g, e)}, expected {_show(e, g)}{when}"
        ),
        input=name,
        index=at,
        got=g,
        expected=e,
        ratio=g / e if e not in (0, float("inf")) else None,
        cause=cause,
    )


def compare_outputs(
    check: str, case: Case, outputs: Sequence[Tensor], *, when: str, cause: str
) -> list[Finding]:
    """Compare every output with that of the sample, computed in another way, by rounding alone."""
    findings = []
    for k, (y, y0) in enumerate(zip(outputs, case.plain.outputs, strict=True)):
        size = rounding(case, y0) * max(largest(y0), *map(largest, case.leaves))  # y may cancel
        found = compare(check, str(k), y, y0, size, what="output", when=when, cause=cause)
        findings += [found] if found else []
    return findings


def compare_all(
    check: str,
    case: Case,
    got: Sequence[Tensor],
    expected: Sequence[Tensor],
    *,
    when: str = "",
    cause: str | None = None,
    also: float | None = None,
    relative: float = 0.0,
) -> list[Finding]:
    """Compare the gradient of every leaf with one computed in another way, by rounding alone.

    Args:
        check: Name of the check.
        case: The function and its sample.
        got: One gradient a leaf.
        expected: One gradient a leaf.
        when: The condition that shows it.
        cause: The cause where the check knows it better.
        also: Size of what goes into backward; by default of the case's grad_output. A gradient that cancels to 0 is
            rounded at this size, not at its own.
        relative: A wider tolerance than rounding, relative to the largest gradient.
    """
    findings = []
    if also is None:
        also = max(largest(v) for v in case.plain.cotangents)
    also = max([also, *(largest(e) for e in expected)])
    for name, leaf, g, e in zip(case.names, case.leaves, got, expected, strict=True):
        allowed = max(relative, rounding(case, g, e)) * (largest(e) + also / 16)
        found = compare(check, name, g, e, allowed, when=when, cause=cause, leaf=leaf)
        if found:
            findings.append(found)
    return findings


def largest(t: Tensor) -> float:
    """Return the largest finite magnitude in ``t``; 0 where there is none."""
    values = t.detach().abs()
    values = values[values.isfinite()]
    return float(values.max()) if values.numel() else 0.0


def _wide(t: Tensor) -> Tensor:
    return t.detach().to(torch.complex128 if t.is_complex() else torch.float64).cpu()


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _show(value: complex, other: complex) -> str:
    """Show as many digits as tell ``value`` from ``other``, at least four."""
    for digits in range(4, 17):
        if f"{value:.{digits}g}" != f"{other:.{digits}g}":
            return f"{value:.{digits}g}"
    return f"{value!r}"
