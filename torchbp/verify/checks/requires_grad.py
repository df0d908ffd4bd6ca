"""requires_grad: freezing an input changes no output, and no gradient of the others.

As few combinations as do this: for every two inputs, one requires grad where the other does not. Where all of them were
right in another layout, which `input_layouts` tries so, none is left to ask for.
"""

from collections.abc import Iterator

import torch

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.frozen import FROZEN, changed, combinations_of, gradients
from torchbp.verify.report import Finding
from torchbp.verify.tolerance import compare_all

NAME = "requires_grad"


def _run(case: Case) -> Iterator[Finding]:
    n = len(case.leaves)
    if n < 2:
        raise NotApplicable("one differentiable input")
    for free in combinations_of(n) if FROZEN not in case.memo else ():
        leaves = [leaf.clone().requires_grad_(i in free) for i, leaf in enumerate(case.leaves)]
        outputs = case.forward(leaves)
        names = ", ".join(case.names[i] for i in sorted(free))
        when = f" where only {names} requires grad"
        found = changed(NAME, case, outputs, when)
        yield from found
        if found:
            return
        got = gradients(case, outputs, leaves)
        expected = [g if i in free else torch.zeros_like(g) for i, g in enumerate(case.plain.grads)]
        found = compare_all(
            NAME,
            case,
            got,
            expected,
            when=when,
            cause="the gradient of one input depends on whether another is wanted (needs_input_grad)",
        )
        yield from found
        if found:
            return


CHECK = Check(
    name=NAME,
    tests="each output and gradient is the same whichever other inputs require one",
    run=_run,
    order=35,
    needs=("same values",),
)
