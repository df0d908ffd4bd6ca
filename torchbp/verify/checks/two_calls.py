"""Two calls: what one forward keeps is its own, whatever runs before its backward."""

from collections.abc import Iterator

from torchbp.verify._check import Check
from torchbp.verify.cases import Case
from torchbp.verify.report import Finding
from torchbp.verify.tolerance import compare_all

NAME = "two_calls"
CAUSE = "state shared between calls: something kept on the class, the module or a global"


def _run(case: Case) -> Iterator[Finding]:
    other = case.nearby
    v, expected = other.plain.cotangents, other.plain.grads  # alone, before any mixing
    here, mine = case.kept if case.runs_again else case.graph()
    there, its = other.kept if case.runs_again else other.graph()
    first = case.backward(mine, here, case.plain.cotangents, retain_graph=True)
    second = other.backward(its, there, v, retain_graph=True)
    when = " after another call of the function"
    yield from compare_all(NAME, case, first, case.plain.grads, when=when, cause=CAUSE)
    when = " in the second of two calls"
    yield from compare_all(NAME, case, second, expected, when=when, cause=CAUSE)


CHECK = Check(
    name=NAME,
    tests="two calls in flight at once do not disturb each other",
    run=_run,
    order=40,
)
