"""Layouts of inputs: values and gradients depend on the inputs' values, not on their strides.

A function may refuse a layout, loudly. A kernel that indexes its input, or what it saved of it, as contiguous gives
other numbers without a word.
"""

import re
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from torchbp.verify._check import Check, Refused
from torchbp.verify.cases import Case
from torchbp.verify.conditioning import moved_by
from torchbp.verify.frozen import FROZEN, combinations_of, gradients
from torchbp.verify.raised import BackwardRaised, ForwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.smooth import check_smooth
from torchbp.verify.source import speaks
from torchbp.verify.tensors import tensors_in
from torchbp.verify.tolerance import compare_all, compare_outputs, largest

NAME = "input_layouts"
CAUSE = "an input, or what was saved of it, indexed as if contiguous"
STEEP = 2.0**-10  # of the outputs: more is what rounding makes of a gradient that is infinite
# Times rounding: of equal rows it is divided by the root of what a variance of 0 is kept above.
STRIDES = re.compile(r"is_contiguous|\bstride|as_strided|data_ptr")
EQUAL = re.compile(r"\bequal\(|allclose\(")
CLOSE = 1e-3  # what rounding may explain
MOVED = 8.0  # times what one rounding of the inputs moves a number by
EQUAL_ROWS = 2.0**10
CHANNELS_LAST = {
    4: torch.channels_last,
    5: torch.channels_last_3d,
}  # images and volumes have a layout of their own


def _permuted(t: Tensor) -> Tensor:
    """Return t with its dimensions in memory in the reverse order: of images, channels last."""
    if t.dim() in CHANNELS_LAST:
        return t.contiguous(memory_format=CHANNELS_LAST[t.dim()])
    dims = tuple(reversed(range(t.dim())))
    return t.permute(dims).contiguous().permute(dims) if t.dim() >= 2 else t


def _slice(t: Tensor) -> Tensor:
    """Return t as a part of a wider tensor: rows that lie apart; of a vector, every second element."""
    if t.dim() < 2:
        wide = torch.full((*t.shape, 2), 3, dtype=t.dtype, device=t.device)
        wide[..., 1] = t
        return wide[..., 1]
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), 3, dtype=t.dtype, device=t.device)
    wide[..., 2:-1] = t
    return wide[..., 2:-1]


def _both(t: Tensor) -> Tensor:
    """Return t as a part of a wider tensor whose dimensions in memory are in the reverse order."""
    dims = tuple(reversed(range(t.dim())))
    return _slice(t.permute(dims).contiguous()).permute(dims)


PERMUTED = "permuted"
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    PERMUTED: _permuted,
    "a slice of a wider tensor": _slice,
}


def _run(case: Case) -> Iterator[Finding]:
    refused = []
    tried = {tuple(t.stride() for t in case.leaves)}
    for layout, other in _variants(case):
        strides = tuple(t.stride() for t in other.leaves)
        if strides in tried:  # of vectors, permuted is as it was
            continue
        tried.add(strides)
        try:
            found = _compare(case, other, f" for inputs that are {layout}")
        except ForwardRaised as error:
            refused.append(f"{layout}: {error}")
            continue
        yield from found
        if found:
            return
    yield from _expanded(case)
    if refused:
        raise Refused("; ".join(refused))


def _variants(case: Case) -> Iterator[tuple[str, Case]]:
    """Yield the layouts to look at; where the source asks for strides the first input has one alone, too."""
    for layout, change in _left(case).items():
        yield layout, case.variant(change)
    if len(case.leaves) > 1 and speaks(case, STRIDES):
        first = case.where[0]
        for layout, change in LAYOUTS.items():
            alone = case.edited(lambda i, t, change=change: change(t) if i == first else t)
            yield f"contiguous, but {case.names[0]} {layout}", alone


def _left(case: Case) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the layouts to look at: none where all is right for inputs that are permuted and a slice at once.

    Of several inputs some require grad in each of a few calls, which saves those of `requires_grad`. Images have a
    layout of their own that nothing else is; they are a slice then. Where the source asks for strides, each may have
    a way of its own.
    """
    if speaks(case, STRIDES):
        return LAYOUTS
    images = any(t.dim() in CHANNELS_LAST for t in case.leaves)
    other = case.variant(_slice if images else _both)
    try:
        for free in combinations_of(len(case.leaves)):
            if _compare(case, other, "", free=free):
                return LAYOUTS
    except (ForwardRaised, BackwardRaised):
        return LAYOUTS
    case.memo[FROZEN] = True
    return {PERMUTED: _permuted} if images else {}


def _expanded(case: Case) -> list[Finding]:
    """Compare rows that are one and the same memory, of stride 0, with rows of the same values.

    Inputs of one shape are one and the same tensor at once, as in self-attention: each gets the sum of their gradients.
    """
    rows = [i for i, t in case.arguments if i in case.where and t.dim() and t.shape[0] > 1]
    leader = {i: next(j for j in rows if case.flat[j].shape == case.flat[i].shape) for i in rows}
    dense, expanded = (
        case.edited(lambda i, t, make=make: make(case.flat[leader.get(i, i)]) if i in rows else t)
        for make in (lambda t: t[:1].repeat_interleave(len(t), 0), lambda t: t[:1].expand_as(t))
    )
    try:
        if not rows or _singular(dense):
            return []
        shared = [case.where.index(leader.get(i, i)) for i in case.where]
        when = " for inputs that are expanded, with stride 0"
        if len(set(shared)) < len(shared):
            when += ", one and the same where they have one shape"
        _ = dense.plain
    except (ForwardRaised, BackwardRaised):
        return []  # refuses equal rows
    try:
        found = _compare(dense, expanded, when, shared)
    except ForwardRaised:
        return []  # writes in its input
    found = [f for f in found if not _is_rounding(dense, f)]
    if found or not speaks(case, EQUAL):
        return found
    most = max(map(largest, case.plain.grads))
    same = check_smooth(dense, NAME, " where rows, and inputs of one shape, are equal", most)
    return [same] if same else []


def _is_rounding(case: Case, found: Finding) -> bool:
    """Whether inputs that are rounded otherwise move some number as far: a norm over equal rows divides by about 0."""
    got, expected = found.got, found.expected
    if got is None or expected is None or not abs(got - expected) <= CLOSE * max(1, abs(expected)):
        return False
    other = case.variant(moved_by(case.epsilon, case))
    pairs = zip(
        (*other.plain.outputs, *other.plain.grads),
        (*case.plain.outputs, *case.plain.grads),
        strict=True,
    )
    return abs(got - expected) <= MOVED * max(largest(a - b) for a, b in pairs)


def _singular(case: Case) -> bool:
    """Whether gradients are infinite, or would be but for rounding, as for a matrix of equal rows."""
    steepest = max((torch.finfo(g.dtype).eps * largest(g) for g in case.plain.grads), default=0.0)
    finite = all(bool(g.isfinite().all()) for g in case.plain.grads)
    return not finite or steepest > STEEP * max(1.0, *map(largest, case.plain.outputs))


def _compare(
    case: Case,
    other: Case,
    when: str,
    shared: list[int] | None = None,
    free: Collection[int] | None = None,
) -> list[Finding]:
    """Compare values and gradients of ``other``, the same in another layout, with those of ``case``.

    ``shared`` says for each leaf which leaf it is the same tensor as, ``free`` which alone require grad.
    """
    free = range(len(case.leaves)) if free is None else free
    leaves = [_same_strides(leaf).requires_grad_(i in free) for i, leaf in enumerate(other.leaves)]
    expected = [g if i in free else torch.zeros_like(g) for i, g in enumerate(case.plain.grads)]
    if shared:
        leaves = [leaves[k] for k in shared]
        groups = [[j for j, m in enumerate(shared) if m == k] for k in shared]
        expected = [torch.stack([expected[j] for j in group]).sum(0) for group in groups]
    outputs = tuple(tensors_in(other.call(leaves))[i] for i in case.differentiable)
    found = compare_outputs(NAME, case, outputs, when=when, cause=CAUSE)
    if not found:
        got = gradients(case, outputs, leaves)
        pairs = [
            (_by_memory(g, leaf), _by_memory(e, leaf))
            for g, e, leaf in zip(got, expected, leaves, strict=True)
        ]
        also = (EQUAL_ROWS if shared else 1.0) * max(map(largest, case.plain.cotangents))
        found = compare_all(
            NAME, case, *zip(*pairs, strict=True), when=when, cause=CAUSE, also=also
        )
    return found


def _by_memory(grad: Tensor, leaf: Tensor) -> Tensor:
    """Return ``grad`` with its mean for rows that are one and the same memory: no other part of it reaches a parameter.

    So ``as_strided`` gives each of them.
    """
    one = leaf.dim() and len(leaf) > 1 and leaf.stride(0) == 0
    return grad.mean(0, keepdim=True).expand_as(grad) if one else grad


def _same_strides(t: Tensor) -> Tensor:
    """Return a copy with the strides of ``t``; `clone` would make a strided tensor dense."""
    if 0 in t.stride() and t.numel() > 1:
        return t[:1].clone().expand_as(t)
    size = (
        1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    )
    offset = t.storage_offset()
    base = torch.full((offset + size,), 3, dtype=t.dtype, device=t.device)
    return base.as_strided(t.shape, t.stride(), offset).copy_(t)


CHECK = Check(
    name=NAME,
    tests="values and gradients do not depend on the strides of the inputs",
    run=_run,
    order=32,
    needs=("no random numbers", "same values"),
)
