"""Low precision: in float32, bfloat16 and float16 the gradient is that of float64, but for rounding.

How far rounding may take it is measured, not assumed: the float64 gradient is taken at the rounded sample, and again
at samples moved by one rounding; that movement, many times over, is the tolerance. A function that refuses a dtype, or
whose forward is not finite in it, is not blamed for its gradient there.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.conditioning import (
    in_dtype,
    in_single,
    moved_by,
    rounded_norm_error,
    spread,
    terms,
)
from torchbp.verify.depends import elementwise
from torchbp.verify.growth import fits, free_sizes
from torchbp.verify.operations import Operations
from torchbp.verify.otherwise import ways
from torchbp.verify.raised import BackwardRaised, ForwardRaised, is_deliberate
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts, is_indexed, resized, runs, within_limits
from torchbp.verify.source import functions
from torchbp.verify.tolerance import largest

NAME = "low_precision"
LARGE = (512.0, 256.0)  # the second where the first is refused
ALONE = 3  # inputs that are so large alone, where all are refused
GROSS = 0.25
TINY = 2.0**-20  # times the inputs
LOSS_SCALE = 2.0**12
UNSEEN = 11  # a size that no other check asks for
SMALL = 1e-4  # float16 has subnormal numbers, of fewer bits, below 6e-5
FAR = 2.0**10  # times the largest input
LOST = 1e-2  # what forward may lose to rounding there
WIDE = (34, 18, 5, 3, 2)  # sizes
EXPLODES = 2.0**8  # times
LARGEST = 2**14  # elements
SEVERAL = 16  # roundings: of what is computed in between
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _run(case: Case) -> Iterator[Finding]:
    if case.epsilon > 1e-12:
        raise NotApplicable("the function does not compute in float64")
    lost = [float("inf")] * len(case.leaves)  # ulps in float32
    widens = False  # whether float16 is computed in a wider dtype, as for large inputs it should be
    for dtype in DTYPES:
        low, exact = in_single(case) if dtype is torch.float32 else in_dtype(case, dtype)
        try:
            with Operations() as operations:
                _ = low.first
            widens = dtype is torch.float16 and torch.float32 in operations.dtypes
            outputs, same = low.plain.outputs, exact.plain.outputs
            expected = exact.vjps([[v.double() for v in low.plain.cotangents]])[0]
        except ForwardRaised:
            continue
        except BackwardRaised as error:
            if _lacks(error.__cause__ or error):
                continue
            raise
        if dtype is torch.float32:
            lost = [
                rounded_norm_error(g, e, terms(exact)) / torch.finfo(dtype).eps
                for g, e in zip(low.plain.grads, expected, strict=True)
            ]
        if not all(bool(y.isfinite().all()) for y in outputs):
            continue
        if max(rounded_norm_error(y, e) for y, e in zip(outputs, same, strict=True)) > 0.1:
            continue  # forward itself lost its precision: the domain of this dtype is left
        yield from _in_all_ways(low, exact, expected, lost)
    yield from _kept_dtype(case)
    yield from _far(case)
    yield from _small(case)
    if widens:
        yield from _large(case)
        yield from _loss_scale(case)
    yield from _limited(case)


def _lacks(error: BaseException) -> bool:
    """Whether ``error`` says that there is no such thing in this dtype."""
    return is_deliberate(error) or "not implemented for" in str(error)


def _in_all_ways(
    low: Case, exact: Case, expected: Sequence[Tensor], lost: list[float]
) -> Iterator[Finding]:
    found = list(_compare(low, exact, expected, lost))
    for how, grads in () if found else ways(low):
        if not all(map(torch.equal, grads, low.plain.grads)):
            found = found or list(_compare(low, exact, expected, lost, how, grads))
    yield from found


def _far(case: Case) -> Iterator[Finding]:
    """Look at float32 at a larger size, where kernels take other paths; of differences, far from the origin too.

    What does not change when all inputs are moved alike (a norm, a distance, a softmax), or some of them, each as a
    whole (places beside weights), is made of differences, and should not lose them.
    """
    wide, where, lever = _wide(case), "", [1.0] * len(case.leaves)
    offset = FAR * max(1e-3, *map(largest, case.leaves))
    moving = _without_origin(case)
    if moving and (
        _without_origin_nearby(case, moving) or _same_outputs(case, _moved(case, offset, moving))
    ):
        moved = _moved(wide, offset, moving)
        if _gives_numbers(in_dtype(moved, torch.float32)[1]):
            which = "inputs" if len(moving) > 1 else case.name_at[moving[0]]
            wide, where = moved, f" for {which} moved {offset:.3g} from the origin"
            # In another input's gradient what was moved may be a factor, as keys are in that of the queries.
            lever = [1.0 if moving == [i] else max(1.0, offset) for i in case.where]
    low, exact = in_single(case) if wide is case else in_dtype(wide, torch.float32)
    try:
        outputs, same = low.plain.outputs, exact.plain.outputs
        finite = all(bool(y.isfinite().all()) for y in (*outputs, *same))
        forward = max(map(rounded_norm_error, outputs, same))
        if finite and where and forward > GROSS:
            yield from _lost(case, low, exact, moving, where)
        if finite and forward < LOST:
            expected = exact.vjps([[v.double() for v in low.plain.cotangents]])[0]
            if max(map(largest, expected)) > EXPLODES * (1 + max(map(largest, case.plain.grads))):
                return  # a matrix of other size may be near a singular one
            lost = [64 * forward * times / torch.finfo(torch.float32).eps for times in lever]
            yield from _compare(low, exact, expected, lost, f"{where} at shapes {wide.shapes}")
    except (ForwardRaised, BackwardRaised):
        return


def _lost(
    case: Case, low: Case, exact: Case, moving: Sequence[int], where: str
) -> Iterator[Finding]:
    """Say where an output that is made of differences has lost them, by more than rounding of the inputs explains.

    What several inputs that may each move alone are multiplied with is rounded. Of an output of 0 all is.
    """
    sums = [_sum(g) for i, g in zip(case.where, case.plain.grads, strict=True) if i in moving]
    if len(sums) > 1 and all(rise <= 1e-6 * size for rise, size in sums):
        return
    least = SMALL * max(map(largest, case.leaves))
    pairs = zip(low.plain.outputs, exact.plain.outputs, strict=True)
    forward = max((rounded_norm_error(y, e) for y, e in pairs if largest(e) > least), default=0.0)
    if forward > GROSS and forward > 64 * _by_rounding(exact):
        yield Finding(
            check=NAME,
            severity="wrong",
            message=f"the output in float32{where} is off by {forward:.2g} of its norm, and so is its gradient; "
            "in float64 nothing changes",
            cause="squares are taken from each other, |x|² + |y|² - 2xy or E[x²] - E[x]²: square the differences",
        )


def _sum(g: Tensor) -> tuple[float, float]:
    """Return by how much a gradient's elements add up to something, and what they are taken as positive."""
    return abs(float(g.double().sum())), float(g.double().abs().sum())


def _by_rounding(exact: Case) -> float:
    """Return how far the outputs move, in parts of their norm, as inputs are rounded otherwise in float32."""
    other = exact.variant(moved_by(torch.finfo(torch.float32).eps, exact))
    return max(map(rounded_norm_error, other.forward(other.fresh()), exact.plain.outputs))


def _moved(case: Case, offset: float, moving: Sequence[int]) -> Case:
    """Return the case with some inputs moved alike."""
    return case.edited(lambda i, t: t + offset if i in moving else t)


def _without_origin(case: Case) -> list[int]:
    """Return the inputs that may move alike: all, or those whose own gradients add up to nothing. It costs no call."""
    pairs = zip(case.where, case.plain.grads, strict=True)
    grads = {i: g.double() for i, g in pairs if i < case.size}
    rise = abs(sum(float(g.sum()) for g in grads.values()))
    sums = {i: _sum(g) for i, g in grads.items()}
    if rise <= 1e-6 * sum(size for _, size in sums.values()):
        return list(sums)
    return [i for i, (rise, size) in sums.items() if rise <= 1e-6 * size and size > 0]


def _without_origin_nearby(case: Case, moving: Sequence[int]) -> bool:
    """Whether it is so at another sample too, where no gradient is 0: no call tells more of what is linear in parts."""
    try:
        other = case.nearby
        return all(bool(g.any()) for g in other.plain.grads) and _without_origin(other) == moving
    except (ForwardRaised, BackwardRaised):
        return False


def _gives_numbers(case: Case) -> bool:
    """Whether forward and backward run, and give finite values."""
    return runs(case) and all(
        bool(t.isfinite().all()) for t in (*case.plain.outputs, *case.plain.grads)
    )


def _same_outputs(case: Case, other: Case) -> bool:
    if not accepts(other):
        return False
    pairs = zip(case.all_outputs, other.all_outputs, strict=False)
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in pairs)


def _wide(case: Case) -> Case:
    """Return the case at a larger size, where it takes one."""
    sizes = {s: s.near(n) for s, n in zip(free_sizes(case), WIDE, strict=False)}
    smaller = is_indexed(case) and any(n < s.now for s, n in sizes.items())
    return resized(case, sizes) if sizes and not smaller and fits(case, sizes, LARGEST) else case


def _small(case: Case) -> Iterator[Finding]:
    """Look at float32 close to 0, of one input: what is taken from 1 has lost its digits there."""
    if len(case.arguments) > 1 or not (elementwise(case) and functions(case)):
        return
    low, exact = in_dtype(
        case.variant(lambda t: t * TINY if t.is_floating_point() else t), torch.float32
    )
    try:
        lost = max(map(rounded_norm_error, low.plain.outputs, exact.plain.outputs))
        if not lost < 64 * torch.finfo(torch.float32).eps:
            return
        expected = exact.vjps([[v.double() for v in low.plain.cotangents]])[0]
        where = f" for inputs {TINY:.1g} times as large"
        yield from _compare(low, exact, expected, [0.0] * len(expected), where)
    except (ForwardRaised, BackwardRaised):
        return


def _loss_scale(case: Case) -> Iterator[Finding]:
    """Look at a grad_output as large as a loss scale makes it, for gradients that float16 holds, at a larger size."""
    if not functions(case):
        return
    wide = _wide(case)
    low = in_dtype(wide, torch.float16)[0]
    if not _gives_numbers(low):
        return
    positive = [v.abs() for v in low.plain.cotangents]  # a row's may add up
    (plain,) = low.vjps([positive])
    room = torch.finfo(torch.float16).max / (1.5 * max([SMALL, *map(largest, plain)]))
    scale = 2.0 ** math.floor(math.log2(min(LOSS_SCALE, room)))
    (got,) = low.vjps([[scale * v for v in positive]])
    for name, g, small in zip(low.names, got, plain, strict=True):
        if not _is_finite(g):
            where = f"float16 for grad_output {scale:g} times as large, a loss scale, at shapes {wide.shapes}"
            yield _overflow(name, where, float("inf"), scale * largest(small))
            return


def _kept_dtype(case: Case) -> Iterator[Finding]:
    """Say where float32 gives float64 at the sizes of an earlier call alone: a table has that call's dtype."""
    low = in_single(case)[0]
    if not (accepts(low) and any(y.dtype == torch.float64 for y in low.all_outputs)):
        return
    for size in free_sizes(case):
        new = in_dtype(resized(case, {size: size.near(UNSEEN)}), torch.float32)[0]
        if accepts(new) and all(y.dtype != torch.float64 for y in new.all_outputs):
            yield Finding(
                check=NAME,
                severity="wrong",
                message="the output is float64 for float32 inputs, and float32 at sizes that no call in float64 had",
                cause="a table kept from an earlier call has that call's dtype: let its key hold the dtype",
            )
            return


def _large(case: Case) -> Iterator[Finding]:
    """Look at what float16 makes of inputs hundreds of times as large, whose squares it does not hold."""
    inputs = [i for i, t in case.arguments if t.is_floating_point()]
    tries = [*((n, inputs) for n in LARGE), *((LARGE[0], [i]) for i in inputs[:ALONE])]
    for times, chosen in tries:
        larger = case.edited(
            lambda i, t, times=times, chosen=chosen: times * t if i in chosen else t
        )
        low, exact = in_dtype(larger, torch.float16)
        if accepts(low):
            yield from _overflown(case, low, exact, times)
            return


def _overflown(case: Case, low: Case, exact: Case, times: float) -> Iterator[Finding]:
    """Say which gradient is off for inputs that are ``times`` as large, where forward is right."""
    try:
        outputs = low.plain.outputs
        if not all(map(_is_finite, outputs)) or all(map(_plausible, low.plain.grads)):
            return
        same = exact.plain.outputs
        expected = exact.vjps([[v.double() for v in low.plain.cotangents]])[0]
    except (ForwardRaised, BackwardRaised):
        return
    if max(rounded_norm_error(y, e) for y, e in zip(outputs, same, strict=True)) > 0.1:
        return
    for name, g, e in zip(case.names, low.plain.grads, expected, strict=True):
        error = rounded_norm_error(g, e)  # infinite where g is not finite
        if largest(e) > torch.finfo(torch.float16).max / 4 or error < GROSS:
            continue
        if largest(e) < SMALL and _is_finite(g):
            continue
        if error > GROSS + 64 * max(spread(exact, torch.float16)):
            where = f"float16 for inputs {times:g} times as large"
            yield _overflow(name, where, error, largest(e))
            return


def _limited(case: Case) -> Iterator[Finding]:
    """Look at float32 for inputs as large as forward takes them, where it refuses larger ones: exponentials are 0."""
    factor, limited = within_limits(case)
    if not limited:
        return
    low, exact = in_dtype(limited, torch.float32)
    try:
        if not accepts(low) or all(map(_is_finite, low.plain.grads)):
            return
        expected = exact.vjps([[v.double() for v in low.plain.cotangents]])[0]
        if max(map(rounded_norm_error, low.plain.outputs, exact.plain.outputs)) > LOST:
            return
    except (ForwardRaised, BackwardRaised):
        return
    for name, g, e in zip(case.names, low.plain.grads, expected, strict=True):
        if not _is_finite(g) and _is_finite(e) and largest(e) < torch.finfo(torch.float32).max / 4:
            where = f"float32 for inputs {factor:g} times as large"
            yield _overflow(name, where, float("inf"), largest(e))


def _is_finite(t: Tensor) -> bool:
    return bool(t.isfinite().all())


def _plausible(grad: Tensor) -> bool:
    """Whether nothing in ``grad`` went over or under: an exact gradient need not be asked for."""
    return bool(grad.isfinite().all() and grad.any())


def _overflow(name: str, where: str, error: float, size: float) -> Finding:
    return Finding(
        check=NAME,
        severity="wrong",
        input=name,
        message=f"grad of {name} in {where} is off by {error:.2g} of its norm, where forward is right and float64's "
        f"gradient is at most {size:.3g}",
        cause="an intermediate beyond the range of the dtype: compute it in float32",
    )


def _compare(
    low: Case,
    exact: Case,
    expected: Sequence[Tensor],
    lost: list[float],
    where: str = "",
    grads: Sequence[Tensor] = (),
) -> Iterator[Finding]:
    dtype = low.plain.grads[0].dtype
    eps = torch.finfo(dtype).eps
    name_of = str(dtype).removeprefix("torch.")
    for which, (name, g, e, ulps) in enumerate(
        zip(low.names, grads or low.plain.grads, expected, lost, strict=True)
    ):
        if not bool(g.isfinite().all()):
            if (
                float(e.abs().max()) < torch.finfo(dtype).max / 4
            ):  # else about to overflow by itself
                yield _overflow(name, name_of + where, float("inf"), float(e.abs().max()))
            continue
        error = rounded_norm_error(g, e, terms(exact))
        # What float32 loses too is the formula's conditioning, not this dtype's fault.
        kept = 1000 + ulps * (bool(where) and not grads) if dtype is torch.float32 else 8 * ulps
        allowed = eps * (16 * g.numel() ** 0.5 + kept)
        if error <= allowed:
            continue
        limit = spread(exact, dtype)[which]  # asked for only here: it costs calls
        if error > allowed + 64 * limit and error > allowed + _by_choice(exact, dtype, which):
            yield Finding(
                check=NAME,
                severity="wrong",
                input=name,
                message=f"grad of {name} in {name_of}{where} is off by {error:.2g} of its norm "
                f"({error / eps:.0f} ulps); rounding the inputs explains {limit / eps:.2g} ulps",
                got=error,
                expected=limit,
                cause="a cancellation: the difference of large numbers, where that of the inputs is to be had"
                if "origin" in where
                else f"computed with fewer bits than {name_of} has"
                if dtype is torch.float32
                else "intermediates rounded, or summed, in low precision: compute in float32, round once",
            )


def _by_choice(exact: Case, dtype: torch.dtype, which: int) -> float:
    """Return what movements by several roundings explain: they may make another element the largest, or the first."""
    return 64 / SEVERAL * spread(exact, dtype, SEVERAL)[which]


CHECK = Check(
    name=NAME,
    tests="float32, bfloat16 and float16 gradients are float64's, but for measured rounding",
    run=_run,
    order=87,
    needs=("no random numbers", "same values", "real numbers"),
    level="full",
)
