"""Memory: new values in the same memory are seen, and forward gives the same where no gradient is recorded.

An optimizer writes in the parameters it has: what is cached by address, identity or shape is of the step before.
"""

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torchbp.verify._check import Check
from torchbp.verify.cases import Case
from torchbp.verify.duals import Silent, silent
from torchbp.verify.report import Finding
from torchbp.verify.source import speaks
from torchbp.verify.tensors import tensors_in
from torchbp.verify.tolerance import compare_all, compare_outputs
from torchbp.verify.used import used

NAME = "memory"
ASKS = re.compile(r"\brequires_grad")
CAUSE = "cached by address, identity or shape: an optimizer writes new values in the same memory"
KEPT = "kept from a call of which no gradient was recorded"


def _run(case: Case) -> Iterator[Finding]:
    leaves, got = used(case).leaves, used(case).grads
    when = " after new values were written in the same memory"
    yield from (
        _gathered(case, leaves)
        or compare_all(NAME, case, got, case.plain.grads, when=when, cause=CAUSE)[:1]
    )
    yield from _asked(case)
    made = silent(case)
    if isinstance(made, Silent) and not _differing(case, made.outputs):
        return
    with torch.no_grad():
        every = tensors_in(case.call(leaves))
    yield from _differing(case, [every[k] for k in case.differentiable])[:1]
    if made is None:  # what depends on it may be kept, too
        after = case.backward(case.forward(leaves), leaves, case.plain.cotangents)
        when = " after a call under torch.no_grad"
        yield from compare_all(NAME, case, after, case.plain.grads, when=when, cause=KEPT)[:1]


def _gathered(case: Case, leaves: Sequence[Tensor]) -> list[Finding]:
    """Say of which input backward itself wrote to the `.grad`, which torch.autograd.grad leaves alone."""
    return [
        Finding(
            check=NAME,
            severity="wrong",
            input=name,
            message=f"backward writes to the .grad of {name}",
            cause="a gradient that is added up there is lost to torch.autograd.grad, hooks and whoever clips it",
        )
        for name, leaf in zip(case.names, leaves, strict=True)
        if leaf.grad is not None and bool(leaf.grad.any())
    ][:1]


def _asked(case: Case) -> Iterator[Finding]:
    """Say of which input forward itself asked a gradient, in a call in which nobody wanted one."""
    if speaks(case, ASKS):
        case.call([leaf.clone() for leaf in case.leaves])
    if case.calls.asked:
        yield Finding(
            check=NAME,
            severity="wrong",
            input=case.calls.asked,
            message=f"forward sets requires_grad of {case.calls.asked}, which asked for no gradient",
            cause="requires_grad_() on the caller's tensor: detach it first",
        )


def _differing(case: Case, outputs: Sequence[Tensor]) -> list[Finding]:
    """Return the outputs that are others where no gradient is recorded."""
    cause = "another path where no gradient is recorded"
    return compare_outputs(NAME, case, outputs, when=" under torch.no_grad", cause=cause)


CHECK = Check(
    name=NAME,
    tests="new values in the same memory are seen; forward gives the same under torch.no_grad",
    run=_run,
    order=46,  # after `modified`, which needs their graph
    needs=("same values",),
    level="full",
)
