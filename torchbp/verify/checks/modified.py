"""Modified tensors: a tensor that backward needs and that was changed must raise, never give a wrong gradient.

autograd checks the version of what went through `save_for_backward`. A tensor kept as an attribute of ctx is not
checked.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchbp.verify._check import Check
from torchbp.verify.cases import Case
from torchbp.verify.raised import BackwardRaised, ForwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.tensors import graph
from torchbp.verify.tolerance import compare_all

NAME = "modified"


def _run(case: Case) -> Iterator[Finding]:
    case, leaves, outputs = _spare(case)
    raised = _modify(case, leaves, outputs, outputs)
    found = _compare(case, raised, "an output") if isinstance(raised, tuple) else []
    yield from found
    if found or raised is None:  # backward needs an output: its graph is of no more use
        leaves, outputs = case.graph()
    inputs = [] if case.copies_leaves else leaves
    keeps = len(inputs) > 1 and _keeps_tensors(outputs)  # no view says so once its base is modified
    raised = _modify(case, leaves, outputs, inputs)
    if isinstance(raised, tuple):
        yield from _compare(case, raised, "an input")
    elif keeps:
        yield from islice(_one_by_one(case), 1)


def _keeps_tensors(outputs: Sequence[Tensor]) -> bool:
    """Whether a Function behind the outputs keeps a tensor as an attribute of its ctx."""
    kept = [getattr(node, "__dict__", {}) for node in graph(outputs)]
    return any(isinstance(x, Tensor) for x in pytree.tree_leaves(kept))


def _one_by_one(case: Case) -> Iterator[Finding]:
    """Change one input of a call: where all are changed, what is saved of others raises."""
    for k, name in enumerate(case.names):
        leaves, outputs = case.graph()
        raised = _modify(case, leaves, outputs, [leaves[k]])
        if isinstance(raised, tuple):
            yield from _compare(case, raised, name)


def _spare(case: Case) -> tuple[Case, list[Tensor], tuple[Tensor, ...]]:
    """Return a case and a graph of it that nobody needs any more."""
    if not case.runs_again:
        return case, *case.graph()
    try:
        _ = case.nearby.plain
    except (ForwardRaised, BackwardRaised):  # beside the sample, outside of the domain
        return case, *case.graph()
    return case.nearby, *case.nearby.kept


def _modify(
    case: Case, leaves: list[Tensor], outputs: tuple[Tensor, ...], targets: Sequence[Tensor]
) -> tuple[Tensor, ...] | None:
    """Change ``targets`` in place and return the gradients; ``None`` where backward raises, as it should."""
    try:
        with torch.no_grad():
            for t in targets:
                t.mul_(0.5).add_(0.25)
    except RuntimeError:  # expanded, or a view that refuses: nobody can modify it
        return case.plain.grads
    try:
        return case.backward(outputs, leaves, case.plain.cotangents, retain_graph=True)
    except BackwardRaised:
        return None


def _compare(case: Case, got: Sequence[Tensor], what: str) -> list[Finding]:
    when = f" after {what} was modified in place; an error was due"
    cause = "a tensor kept as ctx attribute, or through .data or numpy: save_for_backward checks its version"
    return compare_all(NAME, case, got, case.plain.grads, when=when, cause=cause)[:1]


CHECK = Check(
    name=NAME,
    tests="backward raises after a tensor it needs was modified in place",
    run=_run,
    order=45,
)
