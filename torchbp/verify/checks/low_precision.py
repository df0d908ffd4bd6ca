"""Low precision: in float32, bfloat16 and float16 the gradient is that of float64, but for rounding.

How far rounding may take it is measured, not assumed: the float64 gradient is taken at the rounded sample, and again
at samples moved by one rounding; that movement, many times over, is the tolerance. A function that refuses a dtype, or
whose forward is not finite in it, is not blamed for its gradient there.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.conditioning import in_dtype, rounded_norm_error, spread, terms
from torchbp.verify.raised import BackwardRaised, ForwardRaised, is_deliberate
from torchbp.verify.report import Finding, Severity
from torchbp.verify.tolerance import largest

NAME = "low_precision"
LARGE = 512.0
GROSS = 0.25
SMALL = 1e-4  # float16 has subnormal numbers, of fewer bits, below 6e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _run(case: Case) -> Iterator[Finding]:
    if case.epsilon > 1e-12:
        raise NotApplicable("the function does not compute in float64")
    lost = [float("inf")] * len(case.leaves)  # ulps in float32
    for dtype in DTYPES:
        low, exact = in_dtype(case, dtype)
        try:
            outputs, same = low.plain.outputs, exact.plain.outputs
            expected = exact.vjps([[v.double() for v in low.plain.cotangents]])[0]
        except ForwardRaised:
            continue
        except BackwardRaised as error:
            if dtype is torch.float32 and not is_deliberate(error.__cause__ or error):
                raise
            continue
        if dtype is torch.float32:
            lost = [
                rounded_norm_error(g, e, terms(exact)) / torch.finfo(dtype).eps
                for g, e in zip(low.plain.grads, expected, strict=True)
            ]
        if not all(bool(y.isfinite().all()) for y in outputs):
            continue
        if max(rounded_norm_error(y, e) for y, e in zip(outputs, same, strict=True)) > 0.1:
            continue  # forward itself lost its precision: the domain of this dtype is left
        yield from _compare(low, exact, expected, lost)
    yield from _large(case)


def _large(case: Case) -> Iterator[Finding]:
    """Note what float16 makes of inputs 512 times as large, whose squares it does not hold."""
    low, exact = in_dtype(
        case.variant(lambda t: LARGE * t if t.is_floating_point() else t), torch.float16
    )
    try:
        outputs = low.plain.outputs
        if not all(bool(y.isfinite().all()) for y in outputs) or all(
            map(_plausible, low.plain.grads)
        ):
            return
        same = exact.plain.outputs
        expected = exact.vjps([[v.double() for v in low.plain.cotangents]])[0]
    except (ForwardRaised, BackwardRaised):
        return
    if max(rounded_norm_error(y, e) for y, e in zip(outputs, same, strict=True)) > 0.1:
        return
    for name, g, e in zip(case.names, low.plain.grads, expected, strict=True):
        error = rounded_norm_error(g, e)  # infinite where g is not finite
        if largest(e) > torch.finfo(torch.float16).max / 4 or largest(e) < SMALL or error < GROSS:
            continue
        if error > GROSS + 64 * max(spread(exact, torch.float16)):
            where = f"float16 for inputs {LARGE:g} times as large"
            yield _overflow(name, where, error, largest(e), "note")  # not the sample's domain
            return


def _plausible(grad: Tensor) -> bool:
    """Whether nothing in ``grad`` went over or under: an exact gradient need not be asked for."""
    return bool(grad.isfinite().all() and grad.any())


def _overflow(
    name: str, where: str, error: float, size: float, severity: Severity = "wrong"
) -> Finding:
    return Finding(
        check=NAME,
        severity=severity,
        input=name,
        message=f"grad of {name} in {where} is off by {error:.2g} of its norm, where forward is right and float64's "
        f"gradient is at most {size:.3g}",
        cause="an intermediate beyond the range of the dtype: compute it in float32",
    )


def _compare(
    low: Case, exact: Case, expected: Sequence[Tensor], lost: list[float]
) -> Iterator[Finding]:
    dtype = low.plain.grads[0].dtype
    eps = torch.finfo(dtype).eps
    name_of = str(dtype).removeprefix("torch.")
    for which, (name, g, e, ulps) in enumerate(
        zip(low.names, low.plain.grads, expected, lost, strict=True)
    ):
        if not bool(g.isfinite().all()):
            if (
                float(e.abs().max()) < torch.finfo(dtype).max / 4
            ):  # else about to overflow by itself
                yield _overflow(name, name_of, float("inf"), float(e.abs().max()))
            continue
        error = rounded_norm_error(g, e, terms(exact))
        # What float32 loses too is the formula's conditioning, not this dtype's fault.
        kept = 1000 if dtype is torch.float32 else 8 * ulps
        allowed = eps * (16 * g.numel() ** 0.5 + kept)
        if error <= allowed:
            continue
        limit = spread(exact, dtype)[which]  # asked for only here: it costs calls
        if error > allowed + 64 * limit:
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
    needs=("no random numbers", "same values", "real numbers"),
    level="full",
)
