"""Long reductions: a gradient summed over many rows in bfloat16 or float16 does not stall.

A running sum in bfloat16 stops growing at 256 addends of its own size: 256 + 1 rounds to 256. The sample is
lengthened to 2048 along each dimension that an input lacks, whose gradient is then a sum over it: a bias over rows;
to 1024 where a call of so many is too much, or where two dimensions, over which different inputs are summed, are long
at once. It is made positive so that nothing cancels, negative where that leaves nothing: a slope below 0. Where
outputs have both signs all the same, as those of a norm have, grad_output has theirs as well: what a weight is
multiplied with has no other.
"""

from collections.abc import Iterator, Mapping
from itertools import product

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.builtin import low_sum
from torchbp.verify.cases import Case
from torchbp.verify.conditioning import in_dtype, rounded_norm_error
from torchbp.verify.growth import fits, free_sizes
from torchbp.verify.raised import BackwardRaised, ForwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.resize import Size, resized
from torchbp.verify.tensors import has_both_signs
from torchbp.verify.work import TooMuch

NAME = "long_reductions"
SLOW = "the first of the lengths is too much for one call: how much the second may be"
LENGTHS = (2048, 1024)  # the second for a loop, or a matrix of all pairs of rows, of the first
LARGE = 4.0  # times the length, of the first row's grad_output: sums of a few rows are lost on it in bfloat16
SHORT = 16  # times shorter, where nothing stalls yet
LARGEST = 2**16
AT_ONCE = (1024, 1056)  # of two dimensions together
LARGEST_AT_ONCE = 2**22
STEPS = (1, 4)  # times as much as a call may do elsewhere: a loop of as many steps, two calls of it
OFF = 0.1  # of the norm: rounding of 2048 addends in another order stays below 0.02
BACKWARDS = 0.02  # where steps are one after the other: the large row may be the last to be added
SINGLE = 1e-3  # of the norm, in float32
LOST = 0.2  # of what the rows but the large one add: a sum that stalls loses most of it
DTYPES = (torch.bfloat16, torch.float16)  # the second where the first is refused

Lengths = tuple[int, ...]


def _run(case: Case) -> Iterator[Finding]:
    tested = False
    left = set(range(len(case.leaves)))  # one dimension for each input
    if _right_at_once(case):
        return
    for size, summed in _summed(case, left):
        for dtype in DTYPES:
            if in_dtype(case, dtype)[0].refusal:
                continue
            try:
                found = _compare(case, size, summed, dtype)
            except (ForwardRaised, BackwardRaised) as error:
                if isinstance(error.__cause__, TooMuch):
                    break  # in any dtype
                continue  # refuses this dtype
            tested = True
            left.difference_update(summed)
            if found:
                yield found
            if found and found.severity == "wrong":
                return
            break
    if not tested:
        raise NotApplicable("no input is summed over a dimension, in low precision")


def _summed(case: Case, left: set[int]) -> Iterator[tuple[Size, list[int]]]:
    """Yield each size with the inputs, of those that are ``left``, whose gradients are summed over it.

    What is summed for the most inputs stands first: the queries of an attention, for keys and values.
    """
    for size in sorted(free_sizes(case), key=lambda s: sum(bool(s.of(i)) for i in case.where)):
        if not any(case.flat[i].is_floating_point() for i, _, _ in size.places):
            continue  # one element read many times: torch itself adds such gradients up in low precision
        summed = [i for i in left if not size.of(case.where[i])]
        if summed and fits(case, {size: size.near(LENGTHS[0])}, LARGEST):
            yield size, summed


def _right_at_once(case: Case) -> bool:
    """Whether nothing stalls where two dimensions, over which different inputs are summed, are long together."""
    left, found = set(range(len(case.leaves))), []
    for size, summed in _summed(case, left):
        left.difference_update(summed)
        found.append(size)
    sizes = {size: size.near(n) for size, n in zip(found, AT_ONCE, strict=False)}
    lengths = tuple(sizes.values())
    several = len(set(lengths)) == len(found) == len(AT_ONCE)
    refused = in_dtype(case, DTYPES[0])[0].refusal
    if refused or not several or not fits(case, sizes, LARGEST_AT_ONCE):
        return False
    longer = _positive(case, sizes)
    longer.bounded = STEPS[0]
    try:
        errors = [_errors(longer, lengths, DTYPES[0])]
        if errors[0] and _signed(in_dtype(longer, DTYPES[0])[1]):
            errors.append(_errors(longer, lengths, DTYPES[0], signed=True))
    except (ForwardRaised, BackwardRaised):
        return False
    return all(some and max(some) <= OFF for some in errors)


def _positive(case: Case, sizes: Mapping[Size, int], *, negative: bool = False) -> Case:
    """Return the case at other sizes, all numbers positive; or negative, where they have both signs."""

    def signed(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        return -t.abs() if negative and has_both_signs(t) else t.abs()

    return resized(case.variant(signed, parameters=True), sizes)


def _compare(case: Case, size: Size, summed: list[int], dtype: torch.dtype) -> Finding | None:
    if SLOW not in case.memo:
        try:
            return _stalled(case, size, LENGTHS[0], STEPS[0], summed, dtype)
        except (ForwardRaised, BackwardRaised) as error:
            if not isinstance(error.__cause__, TooMuch):
                raise
            case.memo[SLOW] = STEPS[1]
    try:
        return _stalled(case, size, LENGTHS[1], case.memo[SLOW], summed, dtype)
    except (ForwardRaised, BackwardRaised) as error:
        if isinstance(error.__cause__, TooMuch):
            case.memo[SLOW] = STEPS[0]  # once is enough
        raise


def _stalled(
    case: Case, size: Size, length: int, steps: int, summed: list[int], dtype: torch.dtype
) -> Finding | None:
    long = size.near(length)
    longer = _positive(case, {size: long})
    longer.bounded = steps
    errors, negative = _errors(longer, (long,), dtype), False
    if errors and not _has_gradient(longer, (long,), dtype, summed):
        longer, negative = _positive(case, {size: long}, negative=True), True
        longer.bounded = steps
        errors = _errors(longer, (long,), dtype)
    low, off = in_dtype(longer, dtype)[0], _off(case)
    worst = _worst(low, summed, errors, off)
    signed = bool(errors) and errors[worst] <= off and _signed(in_dtype(longer, dtype)[1])
    if signed:
        errors = _errors(longer, (long,), dtype, signed=True)
        worst = _worst(low, summed, errors, off)
    if not errors or errors[worst] <= off:
        return None
    if _share_lost(longer, long, dtype, worst, signed=signed) < LOST:
        return None  # off in other ways: what a product or a softmax of 2048 terms rounds
    few = size.near(length // SHORT)
    shorter = _positive(case, {size: few}, negative=negative)
    short = _errors(shorter, (few,), dtype, LARGE * long, signed=signed)
    if not short or errors[worst] < 4 * short[worst]:
        return None  # as bad at a short length: conditioning, no stall
    name, torchs = case.names[worst], low_sum(low, worst)
    return Finding(
        check=NAME,
        severity="note" if torchs else "wrong",
        input=name,
        message=f"grad of {name} in {str(dtype)[6:]} with a dimension of {length} is off by {errors[worst]:.2g} "
        "of its norm",
        got=errors[worst],
        expected=0.0,
        cause=f"{torchs} sums in that dtype"
        if torchs
        else "a running sum kept in low precision stalls: sum in float32",
    )


def _has_gradient(long: Case, lengths: Lengths, dtype: torch.dtype, summed: list[int]) -> bool:
    grads = _large_first(in_dtype(long, dtype)[1], lengths)
    return all(bool(grads[i].any()) for i in summed)


def _off(case: Case) -> float:
    """Return how far a gradient may be off: steps one after the other are what 2048 are too many of."""
    return BACKWARDS if SLOW in case.memo else OFF


def _worst(low: Case, summed: list[int], errors: list[float], off: float) -> int:
    """Return the input that is off most; first of what is too far off, and torch itself does not sum."""
    wrong = [i for i in summed if errors and errors[i] > off]
    own = [i for i in wrong if not low_sum(low, i)]
    return max(own or wrong or summed, key=lambda i: errors[i] if errors else 0.0)


def _signed(case: Case) -> bool:
    """Whether an output has elements on both sides of 0."""
    return any(map(has_both_signs, case.kept[1]))


def _errors(
    long: Case,
    lengths: Lengths,
    dtype: torch.dtype,
    first: float | None = None,
    *,
    signed: bool = False,
) -> list[float]:
    """Return how far each gradient is off, of its norm; nothing where forward or float32 is off too."""
    low, exact = in_dtype(long, dtype)
    outputs, same = low.kept[1], exact.kept[1]
    if not all(bool(y.isfinite().all()) for y in outputs):
        return []
    signs = exact if signed else None
    pairs = zip(outputs, same, strict=True)
    if any(rounded_norm_error(y, e) > 2 * torch.finfo(dtype).eps for y, e in pairs):
        return []  # forward loses as much: a recurrence or a sum in this dtype, by its own definition
    got, expected = (_large_first(c, lengths, first, signs) for c in (low, exact))
    floor = 0.1 * max(float(y.numel()) for y in same) ** 0.5  # of the norm of ones: what cancels
    errors = [
        rounded_norm_error(g, e, floor) if bool(g.isfinite().all()) else 0.0
        for g, e in zip(got, expected, strict=True)
    ]
    if max(errors) <= BACKWARDS:
        return errors
    single = _large_first(_single(low), lengths, first, signs)
    return [
        error if rounded_norm_error(s, e, floor) < SINGLE else 0.0
        for error, s, e in zip(errors, single, expected, strict=True)
    ]


def _share_lost(long: Case, length: int, dtype: torch.dtype, which: int, *, signed: bool) -> float:
    """Return how much of what the rows but the first add to a gradient is missing in low precision."""
    low, exact = in_dtype(long, dtype)
    signs = exact if signed else None
    got, expected = (_large_first(c, (length,), None, signs)[which].double() for c in (low, exact))
    rest = _large_first(exact, (length,), 0.0, signs)[which].double()
    return float(((expected - got) * rest).sum() / rest.square().sum())


def _large_first(
    case: Case, lengths: Lengths, first: float | None = None, signs: Case | None = None
) -> tuple[Tensor, ...]:
    """Return the gradients for a grad_output of ones, the first of the rows so large that a later one is lost on it.

    Or ``first``, if given. The ones have the signs of the outputs of ``signs``. The same ones each time.
    """
    asked = ("large first", lengths, first, bool(signs))
    if asked not in case.memo:
        v = [torch.ones_like(y) for y in case.kept[1]]
        for t, length in product(v, lengths):
            for d in [d for d, n in enumerate(t.shape) if n == length][:1]:
                t.select(d, 0).mul_(LARGE * length if first is None else first)
        if signs:
            v = [t * y.detach().sign().to(t) for t, y in zip(v, signs.kept[1], strict=True)]
        case.memo[asked] = _pulled(case, v)
    return case.memo[asked]


def _pulled(case: Case, v: list[Tensor]) -> tuple[Tensor, ...]:
    leaves, outputs = case.kept
    try:
        with case.within():
            return case.backward(outputs, leaves, v, retain_graph=True)
    except BackwardRaised:
        if case.stopped:
            raise
        return case.vjp(v)  # of a graph that can be run once only


def _single(case: Case) -> Case:
    return case.variant(lambda t: t.float() if t.is_floating_point() else t, parameters=True)


CHECK = Check(
    name=NAME,
    tests="gradients summed over 2048 rows in low precision do not stall",
    run=_run,
    order=88,
    needs=("no random numbers", "same values", "real numbers"),
    level="full",
)
