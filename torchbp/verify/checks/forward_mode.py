"""Forward mode: ⟨v, J u⟩ from the jvp equals ⟨Jᵀ v, u⟩ from backward; where not, differences tell which is wrong.

Under vmap, as jacfwd runs it, a batch of tangents gives what a loop gives.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor

from torchbp.verify._check import Check, Refused
from torchbp.verify.cases import Case
from torchbp.verify.lines import Lines
from torchbp.verify.operations import Operations
from torchbp.verify.options import options, others, with_options
from torchbp.verify.raised import reason
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts
from torchbp.verify.tensors import graph, real, signed_like, tensors_in
from torchbp.verify.tolerance import compare, largest, rounding

NAME = "forward_mode"


def _run(case: Case) -> Iterator[Finding]:
    generator = case.generator(NAME)
    u = [signed_like(leaf, generator) for leaf in case.leaves]
    try:
        tangents = _jvp(case, u)
    except Exception as error:
        yield from _refuse(case, error)
        raise Refused(reason(error)) from error
    wrong = _dot_test(case, u, tangents)
    if wrong:
        yield wrong
        return
    if not case.draws:
        yield from _batch(case, u, tangents)
    if any(hasattr(node, "_forward_cls") for node in graph(case.kept[1])):  # a jvp by hand
        yield from islice(_elsewhere(case, u), 1)


def _elsewhere(case: Case, u: list[Tensor]) -> Iterator[Finding]:
    """Look at a tangent of some inputs only, and at other arguments."""
    n = len(u)
    for chosen in (range(0, n, 2), range(1, n, 2)) if n > 1 else ():
        some = [d if i in chosen else torch.zeros_like(d) for i, d in enumerate(u)]
        names = " and ".join(case.names[i] for i in chosen)
        yield from _again(case, some, chosen, f" where {names} alone has a tangent")
    values = options(case)
    reals = {i: 0.5 * x + 0.125 for i, x in values.items() if isinstance(x, float)}
    rest = {i: ys[0] for i, x in values.items() if i not in reals and (ys := others(case, x))}
    for change in filter(None, (reals, rest)):
        other = with_options(case, change)
        if accepts(other):
            now = " and ".join(
                f"{i if isinstance(i, str) else case.name_at[i]} is {x!r}"
                for i, x in change.items()
            )
            yield from _again(other, u, range(n), f" where {now}")


def _again(case: Case, u: list[Tensor], chosen: Sequence[int], when: str) -> Iterator[Finding]:
    try:
        wrong = _dot_test(case, u, _jvp(case, u, chosen), when)
    except Exception:  # a refusal
        return
    if wrong:
        yield wrong


def _dot_test(
    case: Case, u: list[Tensor], tangents: list[Tensor | None], when: str = ""
) -> Finding | None:
    forward = reverse = size = 0.0
    for v, t in zip(case.plain.cotangents, tangents, strict=True):
        if t is not None:
            forward += float((v.conj() * t).real.double().sum())
            size += float((v.abs() * t.abs()).double().sum())
    for g, d in zip(case.plain.grads, u, strict=True):
        reverse += float((g.conj() * d).real.double().sum())
        size += float((g.abs() * d.abs()).double().sum())
    allowed = max(1e-6, 4096 * case.epsilon) * size
    backward = case.options["check_backward_ad"]
    same = abs(forward - reverse) <= allowed or (math.isnan(forward) and math.isnan(reverse))
    if backward and same:
        return None
    truth, settled = Lines(case).measure(
        {i: real(d).cpu() for i, d in enumerate(u)}, forward, allowed
    )
    if not settled or abs(truth - forward) <= allowed:
        return None
    none = all(t is None or not t.any() for t in tangents)
    torchs = none and _is_custom(case)
    return Finding(
        check=NAME,
        severity="note" if torchs else "wrong",
        message=f"<v, J u> by forward mode is {forward:.6g}, expected {truth:.6g} "
        f"(by differences{f'; reverse mode {reverse:.6g}' if backward else ''}){when}",
        got=forward,
        expected=truth,
        ratio=forward / truth if truth else None,
        cause="torch.library has no forward mode for a custom op, and torch.func.jvp says 0, not so"
        if torchs
        else "jvp gives zero: the tangent is dropped"
        if none
        else "the jvp rule is wrong",
    )


def _is_custom(case: Case) -> bool:
    """Whether forward calls an op of `torch.library`."""
    with Operations() as operations:
        case.call(case.fresh())
    return bool(operations.namespaces - {"aten", "prim", "prims"})


def _batch(case: Case, u: list[Tensor], tangents: list[Tensor | None]) -> Iterator[Finding]:
    """Compare the batch (u, -2u) of tangents with what u gave alone."""

    def forward(*leaves: Tensor) -> tuple[Tensor, ...]:
        outputs = tensors_in(case.call(leaves, seeded=False))
        return tuple(outputs[i] for i in case.differentiable)

    def jvp(*tangents: Tensor) -> tuple[Tensor, ...]:
        pushed: tuple[Any, ...] = torch.func.jvp(forward, tuple(case.leaves), tangents)
        return pushed[1]

    try:
        got = torch.vmap(jvp)(*(torch.stack([t, -2 * t]) for t in u))
    except Exception as error:  # a refusal
        if case.options["check_batched_forward_grad"]:
            message = f"check_batched_forward_grad: a batch of tangents raises {reason(error)}"
            yield Finding(check=NAME, severity="wrong", message=message)
        return
    for k, (batch, alone) in enumerate(zip(got, tangents, strict=True)):
        expected = torch.zeros_like(batch) if alone is None else torch.stack([alone, -2 * alone])
        wrong = compare(
            NAME,
            f"output {k}",
            batch,
            expected,
            rounding(case, expected) * (largest(expected) + 1 / 16),
            what="tangent of",
            when=" under vmap over a batch of tangents",
            cause="forward mode mixes a batch of tangents",
        )
        if wrong:
            yield wrong
            return


def _refuse(case: Case, error: Exception) -> Iterator[Finding]:
    if case.options["check_forward_ad"]:
        yield Finding(
            check=NAME,
            severity="wrong",
            message=f"check_forward_ad: forward mode raises {reason(error)}",
        )


def _jvp(case: Case, u: list[Tensor], chosen: Sequence[int] | None = None) -> list[Tensor | None]:
    with fwd.dual_level():
        duals = [
            fwd.make_dual(leaf.detach().clone(), d) if chosen is None or i in chosen else leaf
            for i, (leaf, d) in enumerate(zip(case.leaves, u, strict=True))
        ]
        outputs = tensors_in(case.call(duals))
        tangents = [fwd.unpack_dual(outputs[i]).tangent for i in case.differentiable]
        return [None if t is None else t.detach().clone() for t in tangents]


CHECK = Check(
    name=NAME,
    tests="the jvp agrees with backward and with differences",
    run=_run,
    order=72,
    level="full",
    differences=True,
)
