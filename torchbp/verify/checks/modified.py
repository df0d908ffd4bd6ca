"""Modified tensors: a tensor that backward needs and that was changed must raise, never give a wrong gradient.

autograd checks the version of what went through `save_for_backward`. A tensor kept as an attribute of ctx is not
checked.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from torchbp.verify._check import Check
from torchbp.verify.cases import Case
from torchbp.verify.raised import BackwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.tolerance import compare_all

NAME = "modified"


def _run(case: Case) -> Iterator[Finding]:
    leaves = case.fresh()
    outputs = case.forward(leaves)
    yield from _modify(case, leaves, outputs, list(outputs), "an output")
    leaves = case.fresh()
    outputs = case.forward(leaves)
    inputs = [leaf for leaf in leaves if not case.copies_leaves]
    yield from _modify(case, leaves, outputs, inputs, "an input")


def _modify(
    case: Case, leaves: list[Tensor], outputs: tuple[Tensor, ...], targets: list[Tensor], what: str
) -> Iterator[Finding]:
    try:
        with torch.no_grad():
            for t in targets:
                t.mul_(0.5).add_(0.25)
    except RuntimeError:  # expanded, or a view that refuses: nobody can modify it
        return
    try:
        got = case.backward(outputs, leaves, case.plain.cotangents)
    except BackwardRaised:
        return  # as it should
    found = compare_all(
        NAME,
        case,
        got,
        case.plain.grads,
        when=f" after {what} was modified in place; an error was due",
        cause="a tensor kept as ctx attribute, or through .data or numpy: save_for_backward checks its version",
    )
    yield from found[:1]


CHECK = Check(
    name=NAME,
    tests="backward raises after a tensor it needs was modified in place",
    run=_run,
    order=45,
)
