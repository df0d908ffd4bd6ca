"""Optional arguments: the gradient is right where what is None, by default or in the sample, is given, and without it.

Class weights, a bias, a mask, a scale: each is tried as what fits the first input, until forward takes one and its
output is another. Where that has a gradient of its own, it is tested too.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import nn

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.elsewhere import check_lines
from torchbp.verify.options import nearby, options, others, with_options
from torchbp.verify.raised import BackwardRaised, ForwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts, same_outputs
from torchbp.verify.signatures import signature_of
from torchbp.verify.source import speaks
from torchbp.verify.tensors import uniform

NAME = "optional"
MOST = 5  # arguments
TRIED = 6  # values of each
NEVER = {"device", "dtype", "generator", "layout", "memory_format", "name", "out", "requires_grad"}
MASK = re.compile("mask|keep|valid")
NUMBER = re.compile(r"\b(bool|complex|float|int)\b|Number")  # in an annotation
COUNTED = re.compile(
    "chunk|dilation|group|hop|kernel|pad(ding)?$|step|stride|window"
)  # whole numbers
ASKED = re.compile("grad|deriv|differenti")  # in a refusal to give one
CALLED = re.compile(
    "(^|_)(callback|fn|func|function|hook)s?$"
)  # in the name of what no value may be
NUMBERS = (
    "alpha",
    "base",
    "beta",
    "delta",
    "eps",
    "margin",
    "max",
    "min",
    "rate",
    "scale",
    "temp",
    "tol",
)
NEVER |= {"reduce", "size_average"}  # torch's old words for `reduction`


class _Given(NamedTuple):
    """What was given for None, and whether it has a gradient of its own."""

    value: Any
    has_gradient: bool


def _run(case: Case) -> Iterator[Finding]:
    """Yield what is wrong, in the order of what is tried: who has the first need not go on."""
    tested = False
    for some in _to_leave_out(_given(case)[:MOST]):
        other = reduce(Case.without, some, case)
        if other.where and accepts(other) and not same_outputs(case, other):
            tested = True
            names = " and ".join(case.name_at[at] for at in some)
            found = check_lines(
                other, NAME, f" where {names} {'are' if len(some) > 1 else 'is'} None"
            )
            yield from [found] if found else []
    together: dict[str | int, _Given] = {}  # what is right alone
    for slot in _slots(case)[:MOST]:
        name = slot if isinstance(slot, str) else case.name_at[slot]
        meant = _meant(case, slot)
        for value in islice(filter(meant, _values(case, name)), TRIED):
            other, at = _with(case, slot, value)
            asked = _asked(other, at, value)
            if not accepts(asked) or same_outputs(case, asked) or _written(asked):
                continue
            tested = True
            shape = f"a tensor of shape {tuple(value.shape)}" if torch.is_tensor(value) else value
            found = check_lines(asked, NAME, f" where {name} is {shape}")
            found = found or _with_others(case, other, name)
            if found and found.got is not None:  # what backward refuses was not meant
                yield found
            if not found:
                together[slot] = _Given(value, at in asked.where and "steps" not in asked.memo)
            break
    if len(together) > 1:
        yield from _all_given(case, together)
    if not tested:
        raise NotApplicable("no argument that may be None and something else")


def _to_leave_out(given: list[int]) -> list[tuple[int, ...]]:
    """Return what is left out: each alone, then all."""
    return [*((at,) for at in given), *([tuple(given)] if len(given) > 1 else [])]


def _with(case: Case, slot: str | int, value: Any) -> tuple[Case, int]:
    """Return the case with one of what is None given, and where that is in ``flat``."""
    if isinstance(slot, str):
        other = case.with_argument(slot, value)
        return other, other.size - 1
    return case.replaced({slot: value}), slot


def _all_given(case: Case, values: Mapping[str | int, _Given]) -> list[Finding]:
    """Look at the case with all of them given; those without a place of their own follow the others."""
    other, wanted = case, []
    for slot in sorted(values, key=lambda s: isinstance(s, str)):
        other, at = _with(other, slot, values[slot].value)
        wanted += [at] if values[slot].has_gradient else []
    other = other.asking(wanted)
    if not accepts(other):
        return []
    names = " and ".join(s if isinstance(s, str) else case.name_at[s] for s in values)
    found = check_lines(other, NAME, f" where {names} are given")
    return [found] if found and found.got is not None else []


def _with_others(case: Case, other: Case, name: str) -> Finding | None:
    """Look at the argument together with other arguments, all at once: a weight, another reduction, a smoothing."""
    values = options(case)
    words = {
        i: ys[0]
        for i, x in values.items()
        if isinstance(x, (bool, str)) and (ys := others(case, x))
    }
    reals = {i: nearby(x) for i, x in values.items() if isinstance(x, float)}
    if isinstance(case.func, nn.Module):
        return None
    for change in [words | reals, words] if reals else [words]:
        both = with_options(other, change)
        if not change or not accepts(both):
            continue
        return check_lines(
            both,
            NAME,
            f" where {name} is given and "
            + " and ".join(
                f"{i if isinstance(i, str) else case.name_at[i]} is {x!r}"
                for i, x in change.items()
            ),
        )
    return None


def _slots(case: Case) -> list[str | int]:
    """Return the arguments that are None: positions in ``flat``, and names of those not given."""
    parameters, bound = _parameters(case)
    return [
        *(i for i, x in case.others.items() if x is None),
        *(
            name
            for name, parameter in parameters.items()
            if name not in bound
            and parameter.kind is not inspect.Parameter.POSITIONAL_ONLY
            and parameter.default is None
            and not _is_no_value(name, parameter.annotation)
        ),
    ]


def _is_no_value(name: str, annotation: Any) -> bool:
    """Whether the argument may be neither a tensor nor a number: a function, or what steers memory or dtype."""
    return name in NEVER or bool(CALLED.search(name)) or "Callable" in str(annotation)


def _meant(case: Case, slot: str | int) -> Callable[[Any], bool]:
    """Return what tells which values the annotation allows: all, where there is none that is known."""
    parameter = _parameters(case)[0].get(str(slot))
    said = str(parameter.annotation) if parameter else ""
    tensor, number = "Tensor" in said, bool(NUMBER.search(said))
    return lambda x: tensor == number or "Any" in said or tensor == torch.is_tensor(x)


def _given(case: Case) -> list[int]:
    """Return the positions of the tensors given for what is None by default."""
    parameters, bound = _parameters(case)
    given = {
        id(bound[name])
        for name, parameter in parameters.items()
        if parameter.default is None and isinstance(bound.get(name), torch.Tensor)
    }
    return [i for i, t in case.arguments if id(t) in given]


def _parameters(case: Case) -> tuple[Mapping[str, inspect.Parameter], Mapping[str, Any]]:
    """Return the function's parameters, and what is given for them; nothing where it has no signature that tells."""
    try:
        signature = signature_of(case.func)
        return signature.parameters, case.bound(signature).arguments
    except (TypeError, ValueError):
        return {}, {}


def _values(case: Case, name: str) -> Iterator[Any]:
    """Yield what the argument may be: weights, masks, numbers."""
    if any(word in name for word in NUMBERS):
        yield from (0.75, 2, 0)  # a tensor would be taken by chance, perhaps, where these are
    first = case.leaves[0]
    generator = case.generator(NAME)

    def weights(*shape: int) -> torch.Tensor:
        r = uniform(shape, generator) + 0.5
        return r.to(device=first.device, dtype=first.real.dtype)

    rows, whole = tuple(first.shape[:-1]), tuple(first.shape)
    pairs = tuple(first.shape[-2:-1] + case.leaves[min(1, len(case.leaves) - 1)].shape[-2:-1])
    if MASK.search(name):
        for shape in dict.fromkeys([whole, rows, pairs, tuple(first.shape[-2:-1] * 2)]):
            yield weights(*shape) < 1
    if "len" in name and len(whole) > 1:
        n, most = whole[:2]
        yield most - torch.arange(n, device=first.device) % most
    if "dim" in name or "axis" in name:
        yield 0
    if COUNTED.search(name):
        yield from (1, 3)
    if speaks(
        case, re.compile(rf"\b{name} = .*arange|arange.*\b{name} is None|{name} is None.*arange")
    ):
        # Indices: all in order by default, so none twice.
        for n in dict.fromkeys((*whole[1:2], *whole[:1])):
            yield torch.arange(n, device=first.device) // 2
    result = case.all_outputs[0].shape
    sizes = first.shape[-1:] + first.shape[1:2] + result[-1:] + result[1:2]
    vectors = [(n,) for n in sizes]
    # An input without its steps, between rows and features, has the shape of a state.
    shapes = [tuple(t.shape) for _, t in case.arguments if t.is_floating_point()]
    states = [s[:d] + s[d + 1 :] for s in shapes for d in range(1, len(s) - 1)]
    biases = [pairs] if "bias" in name and len(pairs) > 1 else []
    shapes = dict.fromkeys([*biases, *vectors, whole, rows, *states, whole[:1]])
    yield from (weights(*shape) for shape in shapes)
    yield from (0.75, 2, 0)


def _asked(other: Case, at: int, value: Any) -> Case:
    """Return the case that asks for the argument's own gradient too, if it may; one that has none stays as it is."""
    if not torch.is_tensor(value) or not value.is_floating_point():
        return other
    asking = other.asking([at])
    which = asking.where.index(at)
    try:
        given = bool(asking.plain.grads[which].any())
    except ForwardRaised as error:
        return other if ASKED.search(str(error)) else asking
    except BackwardRaised:
        return other
    if not given:
        steps: list[torch.Tensor | None] = [None] * len(asking.leaves)
        steps[which] = torch.zeros(value.numel(), dtype=torch.float64, device="cpu")
        asking.memo["steps"] = steps
    return asking


def _written(case: Case) -> bool:
    """Whether forward writes to its inputs, as to rows that are longer than `max_norm`."""
    return any(not torch.equal(a, b) for a, b in zip(case.first[0], case.leaves, strict=True))


CHECK = Check(
    name=NAME,
    tests="the gradient is right where an argument that may be None is given, and where it is not: weights, a mask",
    run=_run,
    order=83,
    needs=("same values",),
    level="full",
    differences=True,
    once=True,
)
