"""Floating-point inputs that the sample asks no gradient of: targets, weights, states."""

from torchbp.verify.cases import Case
from torchbp.verify.raised import BackwardRaised, ForwardRaised

__all__ = ["given_unasked", "unasked", "with_all_asked"]


def unasked(case: Case) -> list[int]:
    """Return their positions in ``flat``."""
    return [
        i
        for i, t in case.arguments
        if i not in case.where and (t.is_floating_point() or t.is_complex()) and t.numel()
    ]


def with_all_asked(case: Case) -> Case:
    """Return the case that asks for a gradient of all of them; the same one each time."""
    if "all asked" not in case.memo:
        case.memo["all asked"] = case.asking(unasked(case))
    return case.memo["all asked"]


def given_unasked(case: Case) -> list[int]:
    """Return the positions of those that have a gradient, where forward and backward take the question."""
    positions = unasked(case)
    if not positions:
        return []
    other = with_all_asked(case)
    try:
        grads = dict(zip(other.where, other.plain.grads, strict=True))
    except (ForwardRaised, BackwardRaised):
        return []
    return [i for i in positions if bool((grads[i] != 0).any())]
