"""Memory: new values in the same memory are seen, and forward gives the same where no gradient is recorded.

An optimizer writes in the parameters it has: what is cached by address, identity or shape is of the step before.
"""

from collections.abc import Iterator

import torch

from torchbp.verify._check import Check
from torchbp.verify.cases import Case
from torchbp.verify.report import Finding
from torchbp.verify.tensors import tensors_in
from torchbp.verify.tolerance import compare, compare_all, largest, rounding
from torchbp.verify.used import used

NAME = "memory"
CAUSE = "cached by address, identity or shape: an optimizer writes new values in the same memory"


def _run(case: Case) -> Iterator[Finding]:
    leaves, got = used(case).leaves, used(case).grads
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


CHECK = Check(
    name=NAME,
    tests="new values in the same memory are seen; forward gives the same under torch.no_grad",
    run=_run,
    order=46,  # after `modified`, which needs their graph
    needs=("same values",),
    level="full",
)
