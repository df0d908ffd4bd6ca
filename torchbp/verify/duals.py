"""Calls on dual numbers: the values of the outputs, with their graph, and their tangents, at once."""

from collections.abc import Mapping, Sequence

import torch.autograd.forward_ad as fwd
from torch import Tensor
from torch.autograd import Function

from torchbp.verify.cases import Case
from torchbp.verify.tensors import graph, like, tensors_in

__all__ = ["by_hand", "jvp", "jvp_by_hand", "pushed", "tangents_along"]

Tangents = list[Tensor | None]  # one an output that requires grad on the sample


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


def by_hand(case: Case) -> bool:
    """Whether a part of backward is written by hand."""
    return any(hasattr(node, "_forward_cls") for node in graph(case.kept[1]))


def jvp_by_hand(case: Case) -> bool:
    """Whether a part of forward mode is written by hand."""
    classes = [getattr(node, "_forward_cls", Function) for node in graph(case.kept[1])]
    return any(cls.jvp is not Function.jvp for cls in classes)


def tangents_along(case: Case, direction: Mapping[int, Tensor]) -> list[Tensor]:
    """Return a direction, flat real numbers, as a tangent for each leaf."""
    return [
        like(direction[i], leaf).to(device=leaf.device, dtype=leaf.dtype)
        for i, leaf in enumerate(case.leaves)
    ]
