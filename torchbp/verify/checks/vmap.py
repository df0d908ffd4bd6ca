"""vmap: a batch of inputs gives what a loop gives, forward and per-sample gradients, in any batch dimension."""

import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import cache, reduce
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from torchbp.verify._check import Check, Refused
from torchbp.verify.cases import Case
from torchbp.verify.duals import by_hand
from torchbp.verify.raised import reason
from torchbp.verify.report import Finding
from torchbp.verify.source import PROMISED, functions, lacking, promised
from torchbp.verify.tensors import tensors_in
from torchbp.verify.tolerance import compare, largest, rounding

NAME = "vmap"
# What torch says of an autograd.Function that has no rule.
UNSUPPORTED = re.compile("does not have vmap support|must override the setup_context")


CAUSE = (
    "the vmap rule: in_dims or the batch dimension of the output, or a function that mixes samples"
)
MOST = 16  # samples of a batch

Looped = Callable[
    [], tuple[list[Tensor], list[Tensor]]
]  # outputs and gradients, of a call that may be spared


class Refusal(NamedTuple):
    """What vmap was refused with, and whether torch had been asked to make a rule for that."""

    why: str
    promised: bool = False

    @property
    def unsupported(self) -> bool:
        """Whether it is so whatever the dimensions."""
        return bool(UNSUPPORTED.search(self.why))


def _run(case: Case) -> Iterator[Finding]:
    yield from next(filter(None, _batches(case)), [])


def _batches(case: Case) -> Iterator[list[Finding]]:
    """Yield what is wrong of one batch after another: who has one that is need not go on."""
    rule = lacking(case, _may_be_batched)
    if rule:
        raise Refused(f"{rule} has no rule for vmap, or no setup_context")
    n = len(case.leaves)
    here, there = case.leaves, [leaf.clone() for leaf in case.nearby.leaves]
    looped: list[Looped] = [
        lambda: (list(case.plain.outputs), list(case.plain.grads)),
        _nearby(case, there),
    ]
    # A rule by hand is met at one level only.
    by_rule = any(f.vmap is not Function.vmap for f in functions(case))
    refused: list[Refusal] = []
    if not by_rule:
        found, refused = _nested(case, here, there, looped)
        if not found and not refused:
            return  # right in all ways at once
        if refused and refused[0].unsupported:
            raise Refused(refused[0].why)
    torchs = bool(refused) and not by_hand(case)  # whose rules refuse the same in any dimension
    refused = yield from _along(
        case, here, there, looped, dims=[(0,) * n] if torchs else _in_dims(case), by_rule=by_rule
    )
    if n > 1 and not refused and not torchs:
        yield _one_batched(case, here, there, looped, by_rule=by_rule)
        yield _last_batched(case, here, there, looped) if by_rule else []
    if refused and refused[0].promised:
        message = f"vmap raises {refused[0].why}"
        yield [Finding(check=NAME, severity="wrong", message=message, cause=PROMISED)]
    elif refused:
        raise Refused(refused[0].why)


def _along(
    case: Case,
    here: list[Tensor],
    there: list[Tensor],
    looped: Sequence[Looped],
    *,
    dims: Sequence[tuple[int, ...]],
    by_rule: bool,
) -> Generator[list[Finding], None, list[Refusal]]:
    """Batch all inputs along some dimensions, then others where that leaves a question; return what refused last."""
    refused: list[Refusal] = []
    for along in dims:
        batched = [torch.stack([a, b], d) for a, b, d in zip(here, there, along, strict=True)]
        known = {(i,): parts for i, parts in enumerate(looped)}
        when = f" under vmap with in_dims={along}"
        apart = by_rule and along != dims[0]  # grad_output lies along another dimension than that
        found, refused = _batch(case, batched, (along,), known, when, several=apart)
        if refused and by_rule:
            others = _other_batches(case, here, there, looped, along, several=apart)
            found += islice(others, 1)
        yield found
        # One batch of several inputs is enough; what refuses one input in one dimension does in another.
        if not refused if len(here) > 1 else len(refused) > 1:
            break
        if refused and refused[0].unsupported:
            break
    return refused


def _one_batched(
    case: Case,
    here: list[Tensor],
    there: list[Tensor],
    looped: Sequence[Looped],
    *,
    by_rule: bool,
) -> list[Finding]:
    """Batch one input alone; the others are shared."""
    last, others = here[0].dim(), [None] * (len(here) - 1)
    # What is known is neither first, last nor in the middle, of which a rule might make all.
    batched = [torch.stack([there[0], here[0], there[0], there[0]], last), *here[1:]]
    when = " under vmap with one input batched"
    levels = ((last, *others),)
    return _batch(case, batched, levels, {(1,): looped[0]}, when, several=by_rule)[0]


def _last_batched(
    case: Case, here: list[Tensor], there: list[Tensor], looped: Sequence[Looped]
) -> list[Finding]:
    """Batch the last input alone, by as many as the first has rows: a rule may take these for the batch."""
    size = here[0].shape[0] if here[0].dim() else 0
    if not 1 < size <= MOST:
        return []
    last = torch.stack([(there[-1], here[-1])[k % 2] for k in range(size)])
    dims = (*[None] * (len(here) - 1), 0)
    known = {(k,): looped[0] for k in range(1, size, 2)}
    when = f" under vmap with the last input alone batched, over {size} samples"
    return _batch(case, [*here[:-1], last], (dims,), known, when)[0]


def _other_batches(
    case: Case,
    here: list[Tensor],
    there: list[Tensor],
    looped: Sequence[Looped],
    dims: tuple[int, ...],
    *,
    several: bool,
) -> Iterator[Finding]:
    """Yield what is wrong where the batch is as large as a dimension: a rule that mistakes them raises elsewhere."""
    sizes = {n for leaf in here for n in leaf.shape if 2 < n <= MOST}
    for size in sorted(sizes):
        batched = [
            torch.stack([(a, b)[k % 2] for k in range(size)], d)
            for a, b, d in zip(here, there, dims, strict=True)
        ]
        known = {(k,): looped[k % 2] for k in range(size)}
        when = f" under vmap with in_dims={dims} over {size} samples"
        yield from _batch(case, batched, (dims,), known, when, several=several)[0]


def _may_be_batched(function: type[Function]) -> bool:
    """Whether functorch takes it: written in two parts, with a rule or one that torch makes."""
    ruled = function.generate_vmap_rule or function.vmap is not Function.vmap
    return ruled and function.setup_context is not Function.setup_context


def _nested(
    case: Case, here: list[Tensor], there: list[Tensor], looped: Sequence[Looped]
) -> tuple[list[Finding], list[Refusal]]:
    """Ask for batches of batches, which saves a call: along the last dimension, and the first of what is left.

    Of several inputs the first alone is batched a second time.
    """
    n, last = len(here), here[0].dim()
    if n == 1:
        pairs = [torch.stack([a, b]) for a, b in ((here[0], there[0]), (there[0], here[0]))]
        batched, outer, inner = [torch.stack(pairs, -1)], (last + 1,), (0,)
        known = {(i, j): looped[i ^ j] for i in range(2) for j in range(2)}
    else:
        outer = _in_dims(case)[0]
        inner = (last, *[None] * (n - 1))
        several = [
            torch.stack([b, a, b, b], -1) for a, b in ((here[0], there[0]), (there[0], here[0]))
        ]
        others = zip(here[1:], there[1:], outer[1:], strict=True)
        batched = [torch.stack(several, outer[0]), *(torch.stack([a, b], d) for a, b, d in others)]
        known = {(i, 1): looped[i] for i in range(2)}
    return _batch(case, batched, (outer, inner), known, "")


def _in_dims(case: Case) -> list[tuple[int, ...]]:
    """Return the batch dimensions to try: the first and the last; of several inputs the second and the last at once.

    Where a function refuses that, all its inputs are batched in the second dimension, then in the first.
    """
    dims = [leaf.dim() for leaf in case.leaves]
    mixed = (
        [(0,), (dims[0],)]
        if len(dims) == 1
        else [tuple(d if k % 2 else min(d, int(k == 0)) for k, d in enumerate(dims))]
    )
    second = [(1,) * len(dims)] if min(dims) > 0 else []
    return list(dict.fromkeys([*mixed, *second, (0,) * len(dims)]))


def _nearby(case: Case, leaves: list[Tensor]) -> Looped:
    """Return what a loop gives for the second sample: known already where all floats among the arguments are leaves."""
    others = [t for i, t in case.arguments if i not in case.where]
    if any(t.is_floating_point() or t.is_complex() for t in others):
        return cache(lambda: _gradients(case, leaves))
    known = case.nearby.plain
    return lambda: (list(known.outputs), list(known.grads))


def _batch(
    case: Case,
    batched: list[Tensor],
    levels: tuple[tuple[int | None, ...], ...],
    known: Mapping[tuple[int, ...], Looped],
    when: str,
    *,
    several: bool = False,
) -> tuple[list[Finding], list[Refusal]]:
    """Compare forward, then per-sample gradients, with a loop; return the findings, and the refusals, forward first.

    Args:
        case: The function, at its sample.
        batched: The leaves, batched.
        levels: What is batched along which dimension, for each vmap, the outermost first.
        known: What a loop gives, at those places of the batch of which it is known.
        when: The condition, for the message.
        several: Whether grad_output is a batch too, of equal ones, along the first dimension.
    """

    def forward(*leaves: Tensor) -> tuple[Tensor, ...]:
        outputs = tensors_in(case.call(leaves, seeded=False))
        return tuple(outputs[i] for i in case.differentiable)

    def both(*given: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        pulled: tuple[Any, ...] = torch.func.vjp(forward, *given[: len(batched)])
        return pulled[0], pulled[1](given[len(batched) :])

    refused: list[Refusal] = []
    grads: tuple[Tensor, ...] = ()
    try:
        v, given = _grad_outputs(case, batched, levels, several=several)
        values, grads = reduce(torch.vmap, reversed(given), both)(*batched, *v)
    except Exception as error:  # a refusal; forward alone may do
        refused = [Refusal(reason(error), promised(case, error))]
        once, *more = levels
        if more or refused[0].unsupported or not by_hand(case):
            return [], refused * 2
        try:
            values = torch.vmap(forward, once)(*batched)
        except Exception as first:
            return [], [Refusal(reason(first), promised(case, first)), *refused]
    pairs = [
        *(("the value of", f"output {k}", y, 0, k) for k, y in enumerate(values)),
        *(("grad of", case.names[k], g, 1, k) for k, g in enumerate(grads)),
    ]
    found = []
    for what, name, got, kind, k in pairs:
        expected = torch.stack([parts()[kind][k] for parts in known.values()])
        if not _is_batched(got, expected, known):
            found.append(_misshapen(what, name, got, when))
            continue
        wrong = compare(
            NAME,
            name,
            torch.stack([got[at] for at in known]),
            expected,
            rounding(case, expected) * (largest(expected) + 1 / 16),
            what=what,
            when=when,
            cause=CAUSE,
        )
        found += [wrong] if wrong else []
    return found, refused


def _grad_outputs(
    case: Case, batched: list[Tensor], levels: tuple[tuple[int | None, ...], ...], *, several: bool
) -> tuple[list[Tensor], list[tuple[int | None, ...]]]:
    """Return the grad_outputs of a batch, and what is batched along which dimension with them."""
    v = list(case.plain.cotangents)
    if several:
        n = next(t.shape[d] for t, d in zip(batched, levels[0], strict=True) if d is not None)
        v = [torch.stack([t] * n) for t in v]
    return v, [(*level, *[0 if several else None] * len(v)) for level in levels]


def _is_batched(got: Tensor, expected: Tensor, known: Mapping[tuple[int, ...], Looped]) -> bool:
    """Whether the batch has the places of which a loop's results are known, each of the shape of those."""
    levels = len(next(iter(known)))
    places = all(all(k < n for k, n in zip(at, got.shape, strict=False)) for at in known)
    return got.dim() >= levels and places and got.shape[levels:] == expected.shape[1:]


def _misshapen(what: str, name: str, got: Tensor, when: str) -> Finding:
    return Finding(
        check=NAME,
        severity="wrong",
        input=name,
        message=f"{what} {name} has shape {tuple(got.shape)}{when}, which is not a batch of what a loop gives",
        cause=CAUSE,
    )


def _gradients(case: Case, leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    outputs = case.forward(leaves)
    grads = case.backward(outputs, leaves, case.plain.cotangents)
    return [y.detach() for y in outputs], list(grads)


CHECK = Check(
    name=NAME,
    tests="vmap over forward and over per-sample gradients equals a loop",
    run=_run,
    order=74,
    needs=("no random numbers", "same values"),
    level="full",
)
