"""Long reductions: a gradient summed over many rows in bfloat16 or float16 does not stall.

A running sum in bfloat16 stops growing at 256 addends of its own size: 256 + 1 rounds to 256. The sample is lengthened
to 2048 along each dimension that can be, and made positive so that nothing cancels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.conditioning import in_dtype, is_real, rounded_norm_error, terms
from torchbp.verify.raised import BackwardRaised, ForwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.resize import fits, free_sizes, resized

NAME = "long_reductions"
LENGTH = 2048
LARGEST = 2**16
OFF = 0.1  # of the norm: rounding of 2048 addends in another order stays below 0.02
DTYPES = (torch.bfloat16, torch.float16)  # the second where the first is refused


def _run(case: Case) -> Iterator[Finding]:
    if case.draws or not case.steady or not is_real(case):
        raise NotApplicable("forward draws random numbers, or works with complex ones")
    tested = False
    positive = case.variant(lambda t: t.abs() if t.is_floating_point() else t, parameters=True)
    for n in free_sizes(case):
        if not fits(case, {n: LENGTH}, LARGEST):
            continue
        long = resized(positive, {n: LENGTH})
        for dtype in DTYPES:
            try:
                found = _compare(long, dtype)
            except (ForwardRaised, BackwardRaised):
                continue  # refuses this dtype
            tested = True
            if found:
                yield found
                return
            break
    if not tested:
        raise NotApplicable("no dimension can be lengthened in low precision")


def _compare(long: Case, dtype: torch.dtype) -> Finding | None:
    low, exact = in_dtype(long, dtype)
    if not all(bool(y.isfinite().all()) for y in low.plain.outputs):
        return None
    got, expected, single = (_for_ones(c) for c in (low, exact, _single(low)))
    pairs = zip(low.plain.outputs, exact.plain.outputs, strict=True)
    if any(rounded_norm_error(y, e) > 2 * torch.finfo(dtype).eps for y, e in pairs):
        return None  # forward loses as much: a recurrence or a sum in this dtype, by its own definition
    floor = terms(exact) / 3
    for name, g, e, s in zip(long.names, got, expected, single, strict=True):
        error = rounded_norm_error(g, e, floor)
        if error > OFF and rounded_norm_error(s, e, floor) < OFF / 100 and bool(g.isfinite().all()):
            return Finding(
                check=NAME,
                severity="wrong",
                input=name,
                message=f"grad of {name} in {str(dtype)[6:]} with a dimension of {LENGTH} is off by {error:.2g} "
                "of its norm",
                got=error,
                expected=0.0,
                cause="a running sum kept in low precision stalls: sum in float32",
            )
    return None


def _for_ones(case: Case) -> tuple[Tensor, ...]:
    return case.vjps([[torch.ones_like(y) for y in case.kept[1]]])[0]


def _single(case: Case) -> Case:
    return case.variant(lambda t: t.float() if t.is_floating_point() else t, parameters=True)


CHECK = Check(
    name=NAME,
    tests="gradients summed over 2048 rows in low precision do not stall",
    run=_run,
    order=88,
    level="full",
)
