"""Constants: the gradient is right where floating-point inputs that want none have other values: weights, statistics.

Weights that are all 1 hide a square of them, or a count in the place of their sum.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.checks.indices import equal
from torchbp.verify.checks.masks import is_mask
from torchbp.verify.duals import by_hand
from torchbp.verify.elsewhere import check_lines
from torchbp.verify.finite import not_finite
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts
from torchbp.verify.smooth import check_smooth
from torchbp.verify.tensors import uniform
from torchbp.verify.tolerance import largest

NAME = "constants"


def _run(case: Case) -> Iterator[Finding]:
    constants = [i for i, t in case.arguments if i not in case.where and t.is_floating_point()]
    generator = case.generator(NAME)
    tested = False
    for what, change in (
        ("is another", lambda t: _varied(t, generator)),
        ("holds zeros", _with_zeros),
        ("is negated", _negated),
        ("holds -inf", _barred),
        ("is one number throughout", equal),
    ):
        known = change is _with_zeros  # of a mask, whose half `masks` takes away
        some = [i for i in constants if not (known and is_mask(case.flat[i]))]
        new = {i: change(case.flat[i]) for i in some}
        chosen = {i: t for i, t in new.items() if not torch.equal(t, case.flat[i])}
        other = case.edited(chosen.get)
        if not chosen or not accepts(other):
            continue
        tested = True
        names = " and ".join(case.name_at[i] for i in chosen)
        when = f" where {names} {what}"
        if change is equal:  # where a variance is 0, or a length
            found = check_smooth(other, NAME, when, max(map(largest, case.plain.grads)))
        else:
            found = check_lines(other, NAME, when)
        if not found and change is _with_zeros and (both := _zeros_too(other, [*chosen])):
            found = not_finite(both, NAME, f"{when}, and inputs are 0 there", kinks=by_hand(case))
        if found:
            yield found
            return
    if not tested:
        raise NotApplicable(
            "no floating-point input without a gradient, but masks, that may be another"
        )


def _varied(t: Tensor, generator: torch.Generator) -> Tensor:
    """Return other values of the same signs; what sums to 1 does so still, labels of 0 and 1 are shares."""
    r = uniform(t.shape, generator).to(t)
    values = t.unique().tolist()
    if values == [0.0]:
        return r - 0.5
    if values == [0.0, 1.0]:
        return r / 2 + t * (1 - r)
    if not values:
        return t
    other = t * (0.5 + r)
    for dim in range(t.dim() - 1, -1, -1):
        if bool((t.sum(dim) - 1).abs().max() < 1e-6) and t.shape[dim] > 1:
            return other / other.sum(dim, keepdim=True)
    return other


def _with_zeros(t: Tensor) -> Tensor:
    """Return t with every other element 0."""
    if t.numel() < 2:
        return t
    flat = t.clone().reshape(-1)
    flat[1::2] = 0
    return flat.view(t.shape)


def _zeros_too(case: Case, zeros: list[int]) -> Case | None:
    """Return the case with what has the shape of a constant that holds zeros 0 where that is, if forward takes it."""
    like = {case.flat[i].shape: case.flat[i] == 0 for i in zeros}
    leaves = [i for i in case.where if i < case.size and case.flat[i].shape in like]
    other = case.edited(lambda i, t: torch.where(like[t.shape], 0, t) if i in leaves else t)
    return other if leaves and accepts(other) else None


def _barred(t: Tensor) -> Tensor:
    """Return zeros of two dimensions or more, what may be a mask that is added, with every third element -inf."""
    if bool(t.any()) or t.numel() < 2 or t.dim() < 2:
        return t
    flat = t.clone().reshape(-1)
    flat[::3] = -torch.inf
    return flat.view(t.shape)


def _negated(t: Tensor) -> Tensor:
    """Return -t where t has one sign, or holds a bound, 1 or -1, and not that of the other side."""
    one_sided = bool((t > 0).any()) != bool((t < 0).any())
    bounded = bool((t == 1).any()) != bool((t == -1).any())
    return -t if t.numel() > 1 and (one_sided or bounded) else t


CHECK = Check(
    name=NAME,
    tests="the gradient is right with other values of inputs that want none: weights, statistics",
    run=_run,
    order=83,
    needs=("same values",),
    level="full",
    differences=True,
)
