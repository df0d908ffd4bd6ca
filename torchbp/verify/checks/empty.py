"""Empty input: where forward takes it, backward does not fail, and gives what there is to give."""

from collections.abc import Iterator

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.elsewhere import check_lines
from torchbp.verify.growth import refuses_alone
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts, runs

NAME = "empty"


def _run(case: Case) -> Iterator[Finding]:
    arguments = [(i, t) for i, t in case.arguments if t.dim() and t.shape[0]]
    if not arguments:
        raise NotApplicable("no dimension in the sample")
    first = arguments[0][1].shape[0]
    rows = tuple(i for i, t in arguments if t.shape[0] == first)
    integers = {i for i, t in case.arguments if not (t.is_floating_point() or t.is_complex())}
    if not integers <= set(rows):  # indices into nothing: undefined, torch itself crashes on some
        raise NotApplicable("integer inputs that do not go with the rows")
    # One row may be broadcast to none, where nobody meant it to be.
    together = integers or first == 1 or refuses_alone(case, rows[0], 0)
    for chosen in (rows,) if together or len(rows) == 1 else (rows[:1], rows):
        other = case.edited(lambda i, t, chosen=chosen: t[:0] if i in chosen else t)
        # A forward that does not look at an input takes what was never meant: backward has to agree.
        if accepts(other) and (chosen is rows or runs(other)):
            break
    else:
        raise NotApplicable("forward takes no empty input")
    for name, leaf, g in zip(other.names, other.leaves, other.plain.grads, strict=True):
        if not bool(g.isfinite().all()):
            yield Finding(
                check=NAME,
                severity="wrong",
                input=name,
                message=f"grad of {name} {tuple(leaf.shape)} is not finite at shapes {other.shapes}",
                got=float("nan"),
                cause="a division by a count of 0",
            )
            return
    nothing = not any(y.numel() for y in other.plain.outputs)
    if nothing and not any(bool(g.any()) for g in other.plain.grads):
        return  # 0, the slope of nothing
    found = check_lines(other, NAME, f" at shapes {other.shapes}")
    if found:
        yield found


CHECK = Check(
    name=NAME,
    tests="backward of an empty input does not fail",
    run=_run,
    order=82,
    level="full",
    differences=True,
)
