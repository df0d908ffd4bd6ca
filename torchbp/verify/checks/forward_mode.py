"""Forward mode: ⟨v, J u⟩ from the jvp equals ⟨Jᵀ v, u⟩ from backward; where not, differences tell which is wrong.

Under vmap, as jacfwd runs it, a batch of tangents gives what a loop gives.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from torchbp.verify._check import Check, Refused
from torchbp.verify.builtin import tangent
from torchbp.verify.cases import Case
from torchbp.verify.duals import Silent, batched, by_hand, jvp, silent
from torchbp.verify.options import nearby, options, others, with_options
from torchbp.verify.raised import is_deliberate, reason
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts
from torchbp.verify.tangents import agree, dot_test
from torchbp.verify.tolerance import compare, largest, rounding

NAME = "forward_mode"
NONE = re.compile("forward AD|forward mode AD")  # in what torch says of that


def _run(case: Case) -> Iterator[Finding]:
    generator = case.generator(NAME)
    u = tangent(case, generator)
    known = None
    try:
        known = _known(case)
        if known and not (by_hand(case) or case.draws):
            return  # of torch's own rules, for a batch
        tangents = known.tangents if known else jvp(case, u)
    except Exception as error:
        yield from _refuse(case, error)
        raise Refused(reason(error)) from error
    u = known.u if known else u
    wrong = dot_test(NAME, case, u, tangents) if not known else None
    if wrong:
        yield wrong
        return
    if not case.draws:
        yield from _batch(case, u, tangents)
    if by_hand(case):  # and so the jvp
        yield from islice(_elsewhere(case, u), 1)


def _known(case: Case) -> Silent | None:
    """Return the call on dual numbers that was made for `memory`, where its tangents are right."""
    made = silent(case)
    if isinstance(made, Exception):
        if isinstance(made, NotImplementedError) or NONE.search(str(made)):
            raise made  # whatever the batch
        return None
    right = made and agree(case, made.u, made.tangents, case.plain.grads)
    return made if right else None


def _elsewhere(case: Case, u: list[Tensor]) -> Iterator[Finding]:
    """Look at a tangent of some inputs only, and at other arguments."""
    n = len(u)
    for chosen in (range(0, n, 2), range(1, n, 2)) if n > 1 else ():
        some = [d if i in chosen else torch.zeros_like(d) for i, d in enumerate(u)]
        names = " and ".join(case.names[i] for i in chosen)
        yield from _again(case, some, chosen, f" where {names} alone has a tangent")
    values = options(case)
    reals = {i: nearby(x) for i, x in values.items() if isinstance(x, float)}
    rest = {i: ys[0] for i, x in values.items() if i not in reals and (ys := others(case, x))}
    for change in filter(None, (reals, rest)):
        other = with_options(case, change)
        if accepts(other):
            now = " and ".join(
                f"{i if isinstance(i, str) else case.name_at[i]} is {x!r}"
                for i, x in change.items()
            )
            yield from _again(other, u, range(n), f" where {now}")


def _again(case: Case, u: list[Tensor], chosen: Sequence[int], when: str) -> Iterator[Finding]:
    try:
        wrong = dot_test(NAME, case, u, jvp(case, u, chosen), when)
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, (TypeError, AttributeError)) and not is_deliberate(cause):
            yield Finding(
                check=NAME,
                severity="wrong",
                message=f"jvp raised {reason(cause)}{when}",
                cause="an input without a tangent is None: set_materialize_grads(False) asks for that",
            )
        return
    if wrong:
        yield wrong


def _batch(case: Case, u: list[Tensor], tangents: list[Tensor | None]) -> Iterator[Finding]:
    """Compare the batch (u, -2u) of tangents with what u gave alone."""
    try:
        _, got = batched(case, u)
    except Exception as error:  # a refusal
        if case.options["check_batched_forward_grad"]:
            message = f"check_batched_forward_grad: a batch of tangents raises {reason(error)}"
            yield Finding(check=NAME, severity="wrong", message=message)
        return
    for k, (batch, alone) in enumerate(zip(got, tangents, strict=True)):
        expected = torch.zeros_like(batch) if alone is None else torch.stack([alone, -2 * alone])
        wrong = compare(
            NAME,
            f"output {k}",
            batch,
            expected,
            rounding(case, expected) * (largest(expected) + 1 / 16),
            what="tangent of",
            when=" under vmap over a batch of tangents",
            cause="forward mode mixes a batch of tangents",
        )
        if wrong:
            yield wrong
            return


def _refuse(case: Case, error: Exception) -> Iterator[Finding]:
    if case.options["check_forward_ad"]:
        yield Finding(
            check=NAME,
            severity="wrong",
            message=f"check_forward_ad: forward mode raises {reason(error)}",
        )


CHECK = Check(
    name=NAME,
    tests="the jvp agrees with backward and with differences",
    run=_run,
    order=72,
    needs=("same values",),
    level="full",
    differences=True,
)
