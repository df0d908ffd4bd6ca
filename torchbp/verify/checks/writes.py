"""Writes: backward leaves inputs, their .grad, grad_output and saved tensors as they are; forward the inputs.

Others hold the same tensors: grad_output goes to another branch of the graph too, a saved tensor is somebody's weight.
"""

from collections.abc import Iterator

from torchbp.verify._check import Check
from torchbp.verify.cases import Case
from torchbp.verify.observed import Write
from torchbp.verify.report import Finding

NAME = "writes"


def _run(case: Case) -> Iterator[Finding]:
    for write in case.again.writes:
        yield Finding(
            check=NAME,
            severity="note" if write.meant else "wrong",
            message=_message(write),
            input=write.name,
            index=write.index,
            got=write.now,
            expected=write.was,
            cause=_cause(write),
        )
    _ = case.plain
    for name, leaf in zip(case.names, case.first[0], strict=True):
        if leaf.grad is not None:
            yield _added(name, name)
    for name in case.again.added[:1]:
        yield _added(name)


def _cause(write: Write) -> str:
    if write.meant:
        return "an in-place operation on a tensor of the caller's: is that meant, as of a running mean?"
    missing = " (forward: mark_dirty is missing)" if write.phase == "forward" else ""
    return f"an in-place operation on a tensor that others hold{missing}"


def _added(name: str, argument: str | None = None) -> Finding:
    return Finding(
        check=NAME,
        severity="wrong",
        message=f"backward writes to .grad of {name}",
        input=argument,
        cause="torch adds what backward returns to .grad: it is counted twice, or where nobody asked for it",
    )


def _message(write: Write) -> str:
    what = f"{write.phase} writes to {write.name}"
    if write.shape:
        return f"{write.phase} resizes {write.name}{write.shape}"
    if write.index is None:
        return f"{what} in place, here what was there before"
    return f"{what}: element {list(write.index)} was {write.was:.4g}, is {write.now:.4g}"


CHECK = Check(
    name=NAME,
    tests="backward writes to no input, grad_output or saved tensor; forward to no input",
    run=_run,
    order=12,
)
