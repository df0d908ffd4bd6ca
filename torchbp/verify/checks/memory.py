"""Memory: new values in the same memory are seen, and forward gives the same where no gradient is recorded.

An optimizer writes in the parameters it has: what is cached by address, identity or shape is of the step before.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from torchbp.verify._check import Check
from torchbp.verify.cases import Case
from torchbp.verify.raised import BackwardRaised, ForwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.tensors import tensors_in
from torchbp.verify.tolerance import compare, compare_all, largest, rounding

NAME = "memory"
CAUSE = "cached by address, identity or shape: an optimizer writes new values in the same memory"


def _run(case: Case) -> Iterator[Finding]:
    leaves = _used(case)
    with torch.no_grad():
        for leaf, value in zip(leaves, case.leaves, strict=True):
            leaf.copy_(value)
    outputs = case.forward(leaves)
    got = case.backward(outputs, leaves, case.plain.cotangents)
    when = " after new values were written in the same memory"
    yield from compare_all(NAME, case, got, case.plain.grads, when=when, cause=CAUSE)[:1]
    with torch.no_grad():
        every = tensors_in(case.call(leaves))
    for number, (k, y0) in enumerate(zip(case.differentiable, case.plain.outputs, strict=True)):
        found = compare(
            NAME,
            str(number),
            every[k],
            y0,
            rounding(case, y0) * max(largest(y0), *map(largest, case.leaves)),
            what="output",
            when=" under torch.no_grad",
            cause="another path where no gradient is recorded",
        )
        if found:
            yield found
            return


def _used(case: Case) -> list[Tensor]:
    """Return leaves, of other values if possible, that the function was called with already."""
    try:
        _ = case.nearby.plain
    except (ForwardRaised, BackwardRaised):  # beside the sample, outside of the domain
        leaves, outputs = case.graph()
        case.backward(outputs, leaves, case.plain.cotangents)
        return leaves
    return case.nearby.kept[0]


CHECK = Check(
    name=NAME,
    tests="new values in the same memory are seen; forward gives the same under torch.no_grad",
    run=_run,
    order=46,  # after `modified`, which needs their graph
    needs=("same values",),
    level="full",
)
