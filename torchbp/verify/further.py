"""Forward mode and second derivatives at other samples than the user's, from calls that are made there anyway.

The step with which the gradient is tested is made with dual numbers, where a jvp is written by hand, and the gradient
at its end has a graph. Either disagreement is looked into, at the sample itself, before anything is said.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchbp.verify._check import Refused
from torchbp.verify.cases import Case
from torchbp.verify.curvature import second_derivative
from torchbp.verify.duals import by_hand, jvp, tangents_along
from torchbp.verify.lines import Lines
from torchbp.verify.otherwise import asked_otherwise, differs_otherwise
from torchbp.verify.raised import BackwardRaised, ForwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.tangents import agree, dot_test
from torchbp.verify.tensors import Directions, graph, real, signed_like
from torchbp.verify.tolerance import compare_all

__all__ = ["further"]

EXACT = 1e-12  # precision of what is differentiated twice
RELATIVE = 1e-3  # a second derivative at one end of a short step, and the mean over it


def further(
    case: Case, lines: Lines, direction: Directions, check: str, when: str
) -> Finding | None:
    """Return what is wrong with tangents or second derivatives, where ``lines`` found the gradient to be right."""
    if not lines.at_once or not by_hand(case):
        return None
    try:
        if lines.tangents is None:
            (leaves, _), first = lines.end, lines.there
            rise = _rise(case, case.plain.grads, first)
        else:
            found = _of_tangents(case, lines, direction, check, when)
            leaves, outputs = case.kept
            first = asked_otherwise(case, outputs, leaves)  # which the step's end was not
            if not found and compare_all(check, case, first, case.plain.grads, relative=RELATIVE):
                found = differs_otherwise(case, check, when)
            if found:
                return found
            rise = _rise(case, first, lines.there)
        if (
            case.wrong_twice
            or case.epsilon > EXACT
            or _goes_on(case, lines, direction, leaves, first, rise)
        ):
            return None
        return next(iter(second_derivative(case, check, when)), None)
    except (ForwardRaised, BackwardRaised, Refused):
        return None


def _of_tangents(
    case: Case, lines: Lines, direction: Directions, check: str, when: str
) -> Finding | None:
    """Return what is wrong with the tangents at the sample, if those at the step's end seem to be."""
    u = tangents_along(case, direction)
    if agree(case, u, lines.tangents or [], lines.there):
        return None
    try:
        tangents = jvp(case, u)
    except Exception:  # a refusal
        return None
    return dot_test(check, case, u, tangents, when)


def _weights(case: Case) -> list[Tensor]:
    generator = case.generator("further")
    return [signed_like(g, generator) for g in case.plain.grads]


def _rise(case: Case, before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return by how much a random combination of the gradients is larger after the step."""
    return sum(
        float((real(w) * (real(b.detach()) - real(a.detach()))).sum())
        for w, a, b in zip(_weights(case), before, after, strict=True)
    )


def _goes_on(
    case: Case,
    lines: Lines,
    direction: Directions,
    leaves: Sequence[Tensor],
    first: Sequence[Tensor],
    rise: float,
) -> bool:
    """Whether the gradients rise, over the step, as their own gradient at one end says; or that is refused."""
    weights = _weights(case)
    pairs = [(g, w) for g, w in zip(first, weights, strict=True) if g.requires_grad]
    if any("Error" in node.name() for node in graph([g for g, _ in pairs])):
        return True  # once_differentiable
    second: Sequence[Tensor | None] = [None] * len(leaves)
    if pairs:
        case.calls.count(backward=1)
        try:
            second = torch.autograd.grad(
                [g for g, _ in pairs],
                leaves,
                [w for _, w in pairs],
                allow_unused=True,
                retain_graph=True,
            )
        except Exception:
            return True
    parts = [real(s.detach()).cpu() * direction[i] for i, s in enumerate(second) if s is not None]
    slope = sum(float(p.sum()) for p in parts)
    size = sum(float(p.square().sum()) for p in parts) ** 0.5
    noise = sum(
        float((w.abs() * g.abs()).sum()) for w, g in zip(weights, case.plain.grads, strict=True)
    )
    norms = [max(float(t.norm()) for t in some) for some in (weights, case.plain.cotangents)]
    floor = 16 * case.epsilon * noise / lines.near + 1e5 * case.epsilon * norms[0] * norms[1]
    off = abs(rise / lines.near - slope)
    return not off > RELATIVE * size + floor  # NaN is another check's
