"""Inputs that the sample asks no gradient of: asking changes nothing for the others, and what comes is right.

Targets, weights and states are floating-point numbers, too. A function may refuse them a gradient, loudly; a gradient
that is not the slope is wrong. One that is missing, though the output depends on the input, is noted: it may be meant.
"""

from collections.abc import Iterator

from torchbp.verify._check import Check, NotApplicable, Refused
from torchbp.verify.asking import given_unasked, unasked, with_all_asked
from torchbp.verify.cases import Case
from torchbp.verify.elsewhere import check_lines
from torchbp.verify.frozen import changed
from torchbp.verify.lines import Lines
from torchbp.verify.raised import BackwardRaised, ForwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.tangents import forward_mode
from torchbp.verify.tolerance import compare_all

NAME = "unasked"
MOVED = 2.0**-4  # of the input


def _run(case: Case) -> Iterator[Finding]:
    positions = unasked(case)
    if not positions:
        raise NotApplicable("every floating-point input requires grad")
    other = with_all_asked(case)
    try:
        same = other.differentiable == case.differentiable
        grads = dict(zip(other.where, other.plain.grads, strict=True))
    except (ForwardRaised, BackwardRaised) as error:
        raise Refused(str(error)) from error
    if same:
        names = " and ".join(case.name_at[i] for i in positions)
        when = f" where {names} requires grad too"
        found = changed(NAME, case, other.plain.outputs, when) or compare_all(
            NAME,
            case,
            [grads[i] for i in case.where],
            case.plain.grads,
            when=when,
            cause="the gradient of one input depends on whether another is wanted (needs_input_grad)",
        )
        yield from found
        if found:
            return
    given = given_unasked(case)
    missing = [i for i in positions if i not in given]
    for i in missing:
        if _matters(other, i):
            yield Finding(
                check=NAME,
                severity="note",
                input=case.name_at[i],
                message=f"the output depends on {case.name_at[i]}, whose gradient is none, or 0",
                cause="backward returns None for it: is that meant? forward might refuse one that requires grad",
            )
    if given:
        asked = case.asking(given) if missing else other
        when = " (it requires no grad in the sample)"
        wrong = check_lines(asked, NAME, when, elsewhere=False)
        wrong = wrong or forward_mode(asked, NAME, when, [asked.where.index(i) for i in given])
        if wrong:
            yield wrong


def _matters(case: Case, position: int) -> bool:
    """Whether the output changes with this input."""
    lines = Lines(case)
    which = case.where.index(position)
    rise = lines.value({which: lines.direction(1)[which]}, MOVED)
    return abs(rise) > 1e3 * lines.noise


CHECK = Check(
    name=NAME,
    tests="an input that requires no grad in the sample gets a right one where it does, or is refused",
    run=_run,
    order=36,
    needs=("same values",),
    level="full",
    differences=True,
)
