"""The gradient of the first call's graph once more, after calls of another kind: what it keeps is its own."""

from torchbp.verify.cases import Case
from torchbp.verify.report import Finding
from torchbp.verify.tolerance import compare_all

__all__ = ["afterwards"]

CAUSE = (
    "a number kept by the class, or outside of it, where the next call puts its own: keep it in ctx"
)


def afterwards(case: Case, check: str, what: str) -> list[Finding]:
    """Compare that gradient with what it was before calls with other ``what``, where the graph can be run again."""
    if not case.runs_again:
        return []
    (got,) = case.vjps([case.plain.cotangents])
    when = f" after another call with other {what}"
    return compare_all(check, case, got, case.plain.grads, when=when, cause=CAUSE)[:1]
