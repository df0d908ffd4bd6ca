"""Low precision: in float32, bfloat16 and float16 the gradient is that of float64, but for rounding.

How far rounding may take it is measured, not assumed: the float64 gradient is taken at the rounded sample, and again
at samples moved by one rounding; that movement, many times over, is the tolerance. A function that refuses a dtype, or
whose forward is not finite in it, is not blamed for its gradient there.
"""

from collections.abc import Iterator

import torch

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import BackwardRaised, Case, ForwardRaised, is_deliberate
from torchbp.verify.conditioning import in_dtype, is_real, rounded_norm_error, spread, terms
from torchbp.verify.report import Finding

NAME = "low_precision"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _run(case: Case) -> Iterator[Finding]:
    if case.draws or not case.steady or not is_real(case):
        raise NotApplicable("forward draws random numbers, or works with complex ones")
    if case.epsilon > 1e-12:
        raise NotApplicable("the function does not compute in float64")
    single = _errors(case, torch.float32)
    for dtype in DTYPES:
        yield from _compare(case, dtype, single)


def _errors(case: Case, dtype: torch.dtype) -> list[float]:
    """Return the error of each leaf's gradient in ``dtype``, in ulps."""
    low, exact = in_dtype(case, dtype)
    try:
        expected = exact.vjp([v.double() for v in low.plain.cotangents])
    except (ForwardRaised, BackwardRaised):
        return [float("inf")] * len(case.leaves)
    floor = terms(exact)
    eps = torch.finfo(dtype).eps
    return [
        rounded_norm_error(g, e, floor) / eps
        for g, e in zip(low.plain.grads, expected, strict=True)
    ]


def _compare(case: Case, dtype: torch.dtype, single: list[float]) -> Iterator[Finding]:
    low, exact = in_dtype(case, dtype)
    try:
        outputs = low.plain.outputs
        same = exact.plain
    except ForwardRaised:
        return
    except BackwardRaised as error:
        if (
            dtype is torch.float32
            and error.__cause__ is not None
            and not is_deliberate(error.__cause__)
        ):
            raise
        return
    if len(outputs) != len(same.outputs) or not all(bool(y.isfinite().all()) for y in outputs):
        return
    v = [a.double() for a in low.plain.cotangents]
    expected = exact.vjp(v)
    if max(rounded_norm_error(y, e) for y, e in zip(outputs, same.outputs, strict=True)) > 0.1:
        return  # forward itself lost its precision: the domain of this dtype is left
    eps = torch.finfo(dtype).eps
    name_of = str(dtype).removeprefix("torch.")
    for name, g, e, limit, lost in zip(
        case.names, low.plain.grads, expected, spread(exact, dtype), single, strict=True
    ):
        if not bool(g.isfinite().all()) and float(e.abs().max()) < torch.finfo(dtype).max / 4:
            yield Finding(
                check=NAME,
                severity="wrong",
                input=name,
                message=f"grad of {name} is not finite in {name_of}, where forward is and float64's is at most "
                f"{float(e.abs().max()):.3g}",
                cause=f"an intermediate beyond {name_of}'s range: compute it in float32",
            )
            continue
        error = rounded_norm_error(g, e, terms(exact))
        # What float32 loses too is the formula's conditioning, not this dtype's fault.
        kept = 1000 if dtype is torch.float32 else 8 * lost
        allowed = eps * (16 * g.numel() ** 0.5 + kept) + 64 * limit
        if error > allowed:
            yield Finding(
                check=NAME,
                severity="wrong",
                input=name,
                message=f"grad of {name} in {name_of} is off by {error:.2g} of its norm ({error / eps:.0f} ulps); "
                f"rounding the inputs explains {limit / eps:.2g} ulps",
                got=error,
                expected=limit,
                cause=f"computed with fewer bits than {name_of} has"
                if dtype is torch.float32
                else "intermediates rounded, or summed, in low precision: compute in float32, round once",
            )


CHECK = Check(
    name=NAME,
    tests="float32, bfloat16 and float16 gradients are float64's, but for measured rounding",
    run=_run,
    order=87,
    level="full",
)
