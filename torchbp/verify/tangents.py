"""Forward mode: the tangents of the outputs, and whether they are those that backward implies."""

import math
from collections.abc import Sequence

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor

from torchbp.verify.cases import Case
from torchbp.verify.lines import Lines
from torchbp.verify.operations import Operations
from torchbp.verify.report import Finding
from torchbp.verify.tensors import real, signed_like, tensors_in

__all__ = ["dot_test", "forward_mode", "jvp"]


def forward_mode(
    case: Case, check: str, when: str, chosen: Sequence[int] | None = None
) -> Finding | None:
    """Return what is wrong with the tangent of the outputs for a random one of the leaves, or of those chosen."""
    generator = case.generator(check)
    u = [signed_like(leaf, generator) for leaf in case.leaves]
    if chosen is not None:
        u = [d if k in chosen else torch.zeros_like(d) for k, d in enumerate(u)]
    try:
        tangents = jvp(case, u, chosen)
    except Exception:  # a refusal
        return None
    return dot_test(check, case, u, tangents, when)


def jvp(case: Case, u: list[Tensor], chosen: Sequence[int] | None = None) -> list[Tensor | None]:
    """Return the tangents of the outputs for ``u``; of the ``chosen`` leaves only, if given, the others have none."""
    with fwd.dual_level():
        duals = [
            fwd.make_dual(leaf.detach().clone(), d) if chosen is None or i in chosen else leaf
            for i, (leaf, d) in enumerate(zip(case.leaves, u, strict=True))
        ]
        outputs = tensors_in(case.call(duals))
        tangents = [fwd.unpack_dual(outputs[i]).tangent for i in case.differentiable]
        return [None if t is None else t.detach().clone() for t in tangents]


def dot_test(
    check: str, case: Case, u: list[Tensor], tangents: list[Tensor | None], when: str = ""
) -> Finding | None:
    """Hold ⟨v, J u⟩ against ⟨Jᵀ v, u⟩, and where they differ against differences of forward; return what is wrong.

    Args:
        check: Name of the check that asks.
        case: The function, at the sample to test.
        u: A tangent for each leaf.
        tangents: What forward mode made of them, as :func:`jvp` gives it.
        when: The condition, for the message.
    """
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
        check=check,
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
