"""Degenerate samples: the gradient is right where rows are equal or zero, a matrix the identity.

Random samples have none of these: a norm of 0, a variance of 0, a distance of 0, a singular matrix, equal eigenvalues,
for all of which backward may have a branch of its own. Nothing is said where forward has a kink. Where zeros are
refused, as of directions, or quaternions are spoken of, all of each row but its first element is zero: no rotation.
"""

import re
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.depends import elementwise
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts, with_zero
from torchbp.verify.smooth import COINCIDENT, check_smooth, whether_right
from torchbp.verify.source import speaks
from torchbp.verify.tensors import has_both_signs, is_square
from torchbp.verify.together import all_right, no_question
from torchbp.verify.tolerance import largest

NAME = "degenerate"
EVERY = "every input is zero"
ZERO = 2  # inputs that are 0, one at a time
QUATERNION = re.compile("quat", re.IGNORECASE)
AXIS = "rows lie along the first axis"
LAST, SPACE = "a row lies along the last axis", 3
COORDINATES = re.compile(r"\[(\.\.\.|:), *-?[:\d]|unbind\(-?\d")  # of a point


def _equal_rows(t: Tensor) -> Tensor:
    """Return t with its second row the first; where there is a third, the last is 0, but of square matrices.

    Those are singular, and would be doubly so.
    """
    t = t.clone()
    rows = t.shape[-2] if t.dim() > 1 else 0
    if rows > 1:
        t[..., 1, :] = t[..., 0, :]
    return t if rows == 2 or is_square(t) else _zero_row(t)


def _zero_row(t: Tensor) -> Tensor:
    """Return t with its last row 0; of a vector, every other element."""
    t = t.clone()
    if t.dim() > 1 and t.shape[-2] > 1:
        t[..., -1, :] = 0
    elif t.dim() == 1 and len(t) > 1:
        t[1::2] = 0
    return t


def _identity(t: Tensor) -> Tensor:
    """Return the identity for square matrices."""
    if not is_square(t):
        return t
    n = t.shape[-1]
    return torch.eye(n, dtype=t.dtype, device=t.device).expand_as(t).contiguous()


ROWS = "rows are equal, or zero"
BOTH = "rows are equal, or zero, and the same in two inputs"
SAMPLES: dict[str, Callable[[Tensor], Tensor]] = {
    ROWS: _equal_rows,
    "a row is zero": _zero_row,
    "square matrices are the identity": _identity,
}


def _first_axis(t: Tensor) -> Tensor:
    """Return t with all but the first element of each row 0, where it has both signs."""
    t = t.clone()
    several = t.dim() and t.shape[-1] > 1 and not t.is_complex()
    if several and has_both_signs(t):
        t[..., 1:] = 0
    return t


def _last_axis(t: Tensor) -> Tensor:
    """Return t with all but the last element of its first row 0."""
    t = t.clone()
    t.view(-1, t.shape[-1])[:1, :-1] = 0
    return t


def _samples(case: Case, inputs: list[int]) -> Iterator[tuple[str, Case]]:
    # A batch of square matrices comes first: behind others it is a convolution's weight.
    square = {i for i in inputs if is_square(case.flat[i])}
    alone = any(i == inputs[0] or case.flat[i].dim() == 2 for i in square)
    alone |= any(case.flat[i].shape[-2:-1] == (2,) for i in inputs)
    for what, change in SAMPLES.items():
        if change is _zero_row and not alone:
            continue  # there is one beside equal rows
        yield what, case.edited(lambda i, t, change=change: change(t) if i in inputs else t)
    for i in inputs[:ZERO]:
        yield f"{case.name_at[i]} is 0", with_zero(case, i)
    constants = [t for i, t in case.arguments if i not in case.where and t.is_floating_point()]
    like = {i: c for i in inputs for c in constants if c.shape == case.flat[i].shape}
    if like:
        same = {i: c.to(case.flat[i].dtype) for i, c in like.items()}
        yield "an input equals its target", case.edited(same.get)


def _along_axis(case: Case, inputs: list[int], samples: dict[str, Case]) -> dict[str, Case]:
    """Return rows along the first axis for what speaks of quaternions, or refuses an input of zeros.

    And along the last, which is that of a lens.
    """
    last = [i for i in inputs if case.flat[i].dim() and case.flat[i].shape[-1] == SPACE]
    found = {}
    if last and speaks(case, COORDINATES):
        found[LAST] = case.edited(lambda i, t: _last_axis(t) if i in last else t)
    zero = (other for what, other in samples.items() if what.endswith("is 0"))
    if speaks(case, QUATERNION) or not all(map(accepts, zero)):
        found[AXIS] = case.edited(lambda i, t: _first_axis(t) if i in inputs else t)
    return found


def _pair(case: Case, inputs: list[int]) -> tuple[int, int] | None:
    """Return two inputs whose rows may be equal."""
    return next(((i, j) for i in inputs for j in inputs if i < j and _rows_alike(case, i, j)), None)


def _equal(case: Case, pair: tuple[int, int]) -> str:
    return f"{case.name_at[pair[0]]} and {case.name_at[pair[1]]} are equal"


def _met(case: Case, pair: tuple[int, int]) -> Case:
    a, b = (case.flat[k] for k in pair)
    n = min(len(a), len(b))
    return case.edited(lambda i, t: torch.cat([a[:n], b[n:]]) if i == pair[1] else t)


def _rows_alike(case: Case, i: int, j: int) -> bool:
    a, b = case.flat[i], case.flat[j]
    alike = a.dim() == b.dim() > 0 and a.shape[1:] == b.shape[1:] and a.dtype == b.dtype
    return alike and a.numel() > 1 and b.numel() > 0


def _left(case: Case, inputs: list[int], most: float) -> tuple[dict[str, Case], set[str], bool]:
    """Return the samples to look at one by one, those with a question, and whether others were right at once."""
    samples = dict(_samples(case, inputs))
    pair = _pair(case, inputs)
    both = _met(samples[ROWS], pair) if pair else None
    if pair and both:
        samples[_equal(case, pair)] = _met(case, pair)
        samples[BOTH] = both
    if len(inputs) > ZERO:
        samples[EVERY] = case.edited(lambda i, t: t * 0 if i in inputs else t)
    _keep_precision(case, samples)
    at_once = no_question(case, list(samples.values()), most)
    tested = any(at_once)
    left = {w: c for (w, c), right in zip(samples.items(), at_once, strict=True) if not right}
    asked = {what for what, right in zip(samples, at_once, strict=True) if right is False}
    case.memo[EVERY] = EVERY in samples and EVERY not in left  # `extremes` looks at it else
    samples = {w: c for w, c in left.items() if w != EVERY}
    zero = {w: c for w, c in samples.items() if w.endswith(" is 0")}
    if all_right(case, list(zero.values())):
        tested = True
        samples = {w: c for w, c in samples.items() if w not in zero}
    if pair and both:
        answer = whether_right(both) if BOTH in samples else None
        tested |= answer is True
        if answer is True:
            samples.pop(ROWS, None)  # alone it leaves no question
        if answer is not None:  # nor do inputs that are equal, or they have a kink
            samples.pop(_equal(case, pair), None)
        samples.pop(BOTH, None)
        if "plain" in both.__dict__ and all(bool(g.isfinite().all()) for g in both.plain.grads):
            case.memo[COINCIDENT] = pair  # for `ties`
    return samples, asked, tested


def _keep_precision(case: Case, samples: Mapping[str, Case]) -> None:
    """Let the precision be that of the user's sample: an output that cancels would seem to hold few bits."""
    for other in samples.values():
        other.__dict__["epsilon"] = case.epsilon


def _run(case: Case) -> Iterator[Finding]:
    inputs = [case.where[i] for i in range(len(case.leaves)) if case.where[i] < case.size]
    if not inputs:
        raise NotApplicable("no input but parameters")
    if len(elementwise(case)) == len(case.leaves):
        raise NotApplicable("works element by element: see edges and ties")
    if not any(y.numel() for y in case.plain.outputs):
        raise NotApplicable("the output is empty")
    most = max(map(largest, case.plain.grads))
    samples, asked, tested = _left(case, inputs, most)
    square = any(is_square(case.flat[i]) for i in inputs)
    seen = [case]
    samples.update(_along_axis(case, inputs, samples))
    _keep_precision(case, samples)
    for what, other in samples.items():
        known = any(all(torch.equal(c.flat[i], other.flat[i]) for i in inputs) for c in seen)
        if known or not accepts(other):
            continue
        seen.append(other)
        tested = True
        found = check_smooth(
            other,
            NAME,
            f" where {what}",
            most,
            singular=square and what in SAMPLES,
            asked=what in asked,
        )
        if found:
            yield found
            return
    if not tested:
        raise NotApplicable("forward takes no such rows or matrices")


CHECK = Check(
    name=NAME,
    tests="the gradient is right where rows are equal or zero, a matrix the identity",
    run=_run,
    order=84,
    needs=("no random numbers", "same values"),
    level="full",
    differences=True,
)
