"""Extremes: where forward is finite and smooth, so is the gradient: large inputs, all zero, a masked (-inf) element."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.differences import one_sided
from torchbp.verify.lines import Lines
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts
from torchbp.verify.tensors import real, signed_like

NAME = "extremes"


def _first_is(value: float) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        flat = t.clone().reshape(-1)
        flat[0] = value
        return flat.view(t.shape)

    return change


SAMPLES: dict[str, Callable[[Tensor], Tensor]] = {
    "1000 times as large": lambda t: t * 1000,
    "all zero": torch.zeros_like,
}


def _run(case: Case) -> Iterator[Finding]:
    inputs = [
        i
        for i, (name, leaf) in enumerate(zip(case.names, case.leaves, strict=True))
        if not leaf.is_complex() and leaf.numel() and not name.startswith("parameter")
    ]
    tested = False
    for text, change in SAMPLES.items():
        every = _changed(case, inputs, change)
        if len(inputs) > 1 and accepts(every) and _finite(every):
            tested = True
            continue  # each alone leaves no question
        for which in inputs:
            other = _changed(case, [which], change) if len(inputs) > 1 else every
            if not accepts(other):
                continue
            tested = True
            when = f" where {case.names[which]} is {text}, where forward is finite and smooth"
            found = _all_finite(other, when)
            if found:
                yield found
                return
    for which in inputs[:1]:
        masked = _changed(case, [which], _first_is(-torch.inf))
        if accepts(masked):
            tested = True
            yield from _masked(case, masked, which)
    if not tested:
        raise NotApplicable("forward is finite at no extreme")


def _masked(case: Case, masked: Case, which: int) -> Iterator[Finding]:
    """Note a gradient that is not finite for an element of -inf, and is for one of -1e6."""
    deep = _changed(case, [which], _first_is(-1e6))
    if _not_finite(masked, which) and accepts(deep) and not _not_finite(deep, which):
        when = f" where an element of {case.names[which]} is -inf; it is finite at -1e6"
        # A note: a composition of right functions does that too.
        yield replace(_finding(masked, which, when), severity="note")


def _all_finite(case: Case, when: str) -> Finding | None:
    """Return the first gradient that is not finite, of whichever input, though forward is smooth along it."""
    for which in range(len(case.leaves)):
        if _not_finite(case, which) and _smooth(case, which):
            return _finding(case, which, when)
    return None


def _changed(case: Case, chosen: list[int], change: Callable[[Tensor], Tensor]) -> Case:
    where = [case.where[i] for i in chosen]
    return case.edited(lambda i, t: change(t) if i in where else t)


def _finite(case: Case) -> bool:
    return not any(_not_finite(case, i) for i in range(len(case.leaves)))


def _not_finite(case: Case, which: int) -> bool:
    return not bool(case.plain.grads[which].isfinite().all())


def _smooth(case: Case, which: int) -> bool:
    """Whether forward has one finite slope along a random line of this leaf."""
    lines = Lines(case)
    d = real(signed_like(case.leaves[which], case.generator(NAME))).cpu() * lines.scales[which]

    def phi(t: float) -> float:
        return lines.value({which: d}, t)

    (left, left_bound), (right, right_bound) = one_sided(phi, 2.0**-12, lines.noise)
    slack = 0.01 * max(abs(left), abs(right)) + 1e-6 + 2 * (left_bound + right_bound)
    steep = max(left_bound, right_bound) > 0.05 * max(abs(left), abs(right)) + 1e-3
    return not steep and abs(left - right) <= slack


def _finding(case: Case, which: int, when: str) -> Finding:
    g = case.plain.grads[which]
    at = tuple((~g.isfinite()).nonzero()[0].tolist())
    count = int((~g.isfinite()).sum())
    name = case.names[which]
    return Finding(
        check=NAME,
        severity="wrong",
        input=name,
        index=at,
        got=float(g[at]),
        message=f"grad of {name} is not finite in {count}/{g.numel()} elements, "
        f"first {float(g[at])} at {list(at)}{when}",
        cause="NaN or infinity made in backward: an overflow, 0 · inf, or a division by 0",
    )


CHECK = Check(
    name=NAME,
    tests="the gradient is finite where forward is finite and smooth: large, zero, masked",
    run=_run,
    order=85,
    needs=("no random numbers", "same values"),
    level="full",
    differences=True,
)
