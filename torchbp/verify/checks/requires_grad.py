"""requires_grad: freezing an input changes nothing for the others.

As few combinations as do this: for every two inputs, one requires grad where the other does not.

Sources:
    E. Sperner, "Ein Satz über Untermengen einer endlichen Menge", Mathematische Zeitschrift 27, 1928,
    doi:10.1007/BF01171114: k combinations tell apart so, both ways, k over ⌊k/2⌋ inputs.
"""

from collections.abc import Iterator
from itertools import combinations, count
from math import comb

import torch

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.report import Finding
from torchbp.verify.tolerance import compare_all

NAME = "requires_grad"


def _run(case: Case) -> Iterator[Finding]:
    n = len(case.leaves)
    if n < 2:
        raise NotApplicable("one differentiable input")
    for free in _combinations(n):
        leaves = [leaf.clone().requires_grad_(i in free) for i, leaf in enumerate(case.leaves)]
        outputs = case.forward(leaves)
        names = ", ".join(case.names[i] for i in sorted(free))
        if any(y.requires_grad for y in outputs):
            got = case.backward(outputs, leaves, case.plain.cotangents)
        else:
            got = [torch.zeros_like(leaf) for leaf in leaves]
        expected = [g if i in free else torch.zeros_like(g) for i, g in enumerate(case.plain.grads)]
        found = compare_all(
            NAME,
            case,
            got,
            expected,
            when=f" where only {names} requires grad",
            cause="the gradient of one input depends on whether another is wanted (needs_input_grad)",
        )
        yield from found
        if found:
            return


def _combinations(n: int) -> list[set[int]]:
    """Return which of n inputs require grad, in each of k calls: for n up to 3 one alone."""
    k = next(k for k in count(1) if comb(k, k // 2) >= n)
    # The calls of each input: no two are contained in each other.
    calls = list(combinations(range(k), k // 2 or 1))[:n]
    return [{i for i, chosen in enumerate(calls) if call in chosen} for call in range(k)]


CHECK = Check(
    name=NAME,
    tests="each gradient is the same whichever other inputs require one",
    run=_run,
    order=35,
)
