"""Calls in which some inputs require no grad: as few as tell every two of them apart.

Sources:
    E. Sperner, "Ein Satz über Untermengen einer endlichen Menge", Mathematische Zeitschrift 27, 1928,
    doi:10.1007/BF01171114: k combinations tell apart so, both ways, k over ⌊k/2⌋ inputs.
"""

from collections.abc import Sequence
from itertools import combinations, count
from math import comb

import torch
from torch import Tensor

from torchbp.verify.cases import Case
from torchbp.verify.report import Finding
from torchbp.verify.tolerance import compare_outputs

__all__ = ["FROZEN", "changed", "combinations_of", "gradients"]

FROZEN = "gradients are right whichever other inputs require one"  # in the memo of a case


def combinations_of(n: int) -> list[set[int]]:
    """Return which of n inputs require grad, in each of k calls: for n up to 3 one alone."""
    k = next(k for k in count(1) if comb(k, k // 2) >= n)
    # The calls of each input: no two are contained in each other.
    calls = list(combinations(range(k), k // 2 or 1))[:n]
    return [{i for i, chosen in enumerate(calls) if call in chosen} for call in range(k)]


def gradients(
    case: Case, outputs: Sequence[Tensor], leaves: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return the gradients for the case's grad_output, zeros where no output depends on what requires grad."""
    if any(y.requires_grad for y in outputs):
        return case.backward(outputs, leaves, case.plain.cotangents)
    return tuple(torch.zeros_like(leaf) for leaf in leaves)


def changed(check: str, case: Case, outputs: Sequence[Tensor], when: str) -> list[Finding]:
    """Return the first output that is another than in the sample, because something else requires grad."""
    cause = "forward asks an input for requires_grad, and computes something else"
    return compare_outputs(check, case, outputs, when=when, cause=cause)[:1]
