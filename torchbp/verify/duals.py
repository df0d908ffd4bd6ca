"""Calls on dual numbers: the values of the outputs, with their graph, and their tangents, at once."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor
from torch.autograd import Function

from torchbp.verify.builtin import tangent
from torchbp.verify.cases import Case
from torchbp.verify.source import functions, lacking, speaks
from torchbp.verify.tensors import like, tensors_in

__all__ = [
    "Silent",
    "batched",
    "by_hand",
    "jvp",
    "jvp_by_hand",
    "pushed",
    "silent",
    "tangents_along",
    "without_jvp",
]

SILENT = "a call on dual numbers of which no gradient is recorded"
RECORDS = re.compile(r"grad_enabled|no_grad|inference_mode")

Tangents = list[Tensor | None]  # one an output that requires grad on the sample


class Silent(NamedTuple):
    """What that call gives: the outputs that require grad on the sample, and their tangents for ``u``."""

    outputs: Sequence[Tensor]
    tangents: Tangents
    u: list[Tensor]


def pushed(
    case: Case, leaves: Sequence[Tensor], u: Sequence[Tensor], chosen: Sequence[int] | None = None
) -> tuple[tuple[Tensor, ...], Tangents]:
    """Return the outputs for ``leaves``, and their tangents for ``u``; of the ``chosen`` leaves only, if given."""
    with fwd.dual_level():
        duals = [
            fwd.make_dual(leaf, d) if chosen is None or i in chosen else leaf
            for i, (leaf, d) in enumerate(zip(leaves, u, strict=True))
        ]
        outputs = tensors_in(case.call(duals))
        pairs = [fwd.unpack_dual(outputs[i]) for i in case.differentiable]
        tangents = [None if t is None else t.detach().clone() for _, t in pairs]
        return tuple(y for y, _ in pairs), tangents


def jvp(case: Case, u: Sequence[Tensor], chosen: Sequence[int] | None = None) -> Tangents:
    """Return the tangents of the outputs for ``u``; of the ``chosen`` leaves only, if given, the others have none."""
    return pushed(case, [leaf.detach().clone() for leaf in case.leaves], u, chosen)[1]


def batched(case: Case, u: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the outputs, and their tangents for the batch (u, -2u), in one call of torch.func."""

    def forward(*leaves: Tensor) -> tuple[Tensor, ...]:
        outputs = tensors_in(case.call(leaves, seeded=False))
        return tuple(outputs[i] for i in case.differentiable)

    def pushed_forward(*tangents: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        pair: tuple[Any, ...] = torch.func.jvp(forward, tuple(case.leaves), tangents)
        return pair[0], pair[1]

    values, along = torch.vmap(pushed_forward)(*(torch.stack([t, -2 * t]) for t in u))
    return tuple(y[0] for y in values), along


def silent(case: Case) -> Silent | Exception | None:
    """Return what such a call gives, or why it is refused; the same one each time.

    It tells whether forward does the same where no gradient is recorded, and what forward mode makes of it: of torch's
    own rules for a batch, which are the same alone. ``None`` where the source says that its way depends on that.
    """
    if SILENT not in case.memo:
        lacks = without_jvp(case)
        refused = NotImplementedError(f"{lacks} has no jvp") if lacks else None
        case.memo[SILENT] = refused or (None if speaks(case, RECORDS) else _silent(case))
    return case.memo[SILENT]


def _silent(case: Case) -> Silent | Exception:
    generator = case.generator("forward_mode")
    u = tangent(case, generator)
    try:
        with torch.no_grad():
            if by_hand(case) or case.draws:
                return Silent(*pushed(case, [leaf.detach().clone() for leaf in case.leaves], u), u)
            outputs, along = batched(case, u)
    except Exception as error:
        return error
    twice = all(torch.allclose(t[1], -2 * t[0], rtol=1e-9, atol=1e-12) for t in along)
    return (
        Silent(outputs, [t[0] for t in along], u) if twice else RuntimeError("another in a batch")
    )


def by_hand(case: Case) -> bool:
    """Whether a part of backward is written by hand."""
    return bool(functions(case))


def without_jvp(case: Case) -> str:
    """Return the name of an autograd.Function, if there is one, that has none, so that forward mode will refuse."""
    return lacking(case, lambda function: function.jvp is not Function.jvp)


def jvp_by_hand(case: Case) -> bool:
    """Whether a part of forward mode is written by hand."""
    return any(f.jvp is not Function.jvp for f in functions(case))


def tangents_along(case: Case, direction: Mapping[int, Tensor]) -> list[Tensor]:
    """Return a direction, flat real numbers, as a tangent for each leaf."""
    return [
        like(direction[i], leaf).to(device=leaf.device, dtype=leaf.dtype)
        for i, leaf in enumerate(case.leaves)
    ]
