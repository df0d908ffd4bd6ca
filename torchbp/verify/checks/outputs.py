"""Several outputs: their gradients add up, and an output that nobody uses is no reason to fail.

An output that depends on the inputs and has no gradient is noted: a loss that holds it learns nothing from it. It may
be meant so, as are a batch's statistics. So is a tensor that requires grad and is not among the inputs: nothing is said
of its gradient.
"""

from collections.abc import Iterator

import torch

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.lost import lost
from torchbp.verify.report import Finding
from torchbp.verify.tensors import graph
from torchbp.verify.tolerance import compare_all

NAME = "outputs"
MOST = 4  # shapes that are named


def _run(case: Case) -> Iterator[Finding]:
    v, g = case.plain.cotangents, case.plain.grads
    yield from _unseen(case)
    silent = list(lost(case, NAME, "note"))
    yield from silent
    if len(v) < 2:
        if silent:
            return
        raise NotApplicable("one output")
    if not case.options["check_undefined_grad"]:
        raise NotApplicable("check_undefined_grad is False")
    alone = case.vjps([[t if i == j else None for j, t in enumerate(v)] for i in range(len(v))])
    summed = [torch.stack(parts).sum(0) for parts in zip(*alone, strict=True)]
    yield from compare_all(
        NAME,
        case,
        g,
        summed,
        when=" for all outputs together; expected is the sum over outputs used alone",
        cause="the gradients of several outputs overwrite each other, or one is dropped",
    )


def _unseen(case: Case) -> Iterator[Finding]:
    """Note the tensors that require grad, are no inputs, and have a part in the outputs."""
    leaves, outputs = case.kept
    ends = (getattr(node, "variable", None) for node in graph(outputs))
    unseen = [t for t in ends if t is not None and not any(t is leaf for leaf in leaves)]
    if unseen:
        shapes = ", ".join(str(tuple(t.shape)) for t in reversed(unseen[-MOST:]))
        yield Finding(
            check=NAME,
            severity="note",
            message=f"the output depends on {len(unseen)} more that require grad, of shapes {shapes}"
            f"{', ...' if len(unseen) > MOST else ''}: they are no inputs, and their gradients are not checked",
            cause="held by the function, or by its Module but not as a parameter: pass them, or the Module itself",
        )


CHECK = Check(
    name=NAME,
    tests="the gradients of several outputs add up, and each output may be unused",
    run=_run,
    order=22,
)
