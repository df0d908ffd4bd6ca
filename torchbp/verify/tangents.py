"""Forward mode: the tangents of the outputs, and whether they are those that backward implies."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchbp.verify.builtin import tangent
from torchbp.verify.cases import Case
from torchbp.verify.duals import jvp, without_jvp
from torchbp.verify.lines import Lines
from torchbp.verify.operations import Operations
from torchbp.verify.report import Finding
from torchbp.verify.tensors import real

__all__ = ["agree", "dot_test", "forward_mode"]


def forward_mode(
    case: Case, check: str, when: str, chosen: Sequence[int] | None = None
) -> Finding | None:
    """Return what is wrong with the tangent of the outputs for a random one of the leaves, or of those chosen."""
    generator = case.generator(check)
    u = tangent(case, generator)
    if chosen is not None:
        u = [d if k in chosen else torch.zeros_like(d) for k, d in enumerate(u)]
    if without_jvp(case):
        return None
    try:
        tangents = jvp(case, u, chosen)
    except Exception:  # a refusal
        return None
    return dot_test(check, case, u, tangents, when)


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
    forward, reverse, allowed = _products(case, u, tangents, case.plain.grads)
    backward = case.options["check_backward_ad"]
    if backward and _same(forward, reverse, allowed):
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


def agree(
    case: Case, u: Sequence[Tensor], tangents: Sequence[Tensor | None], grads: Sequence[Tensor]
) -> bool:
    """Whether tangents for ``u`` and gradients for the case's grad_output, of one sample, imply each other."""
    return _same(*_products(case, u, tangents, grads))


def _products(
    case: Case, u: Sequence[Tensor], tangents: Sequence[Tensor | None], grads: Sequence[Tensor]
) -> tuple[float, float, float]:
    """Return ⟨v, J u⟩, ⟨Jᵀ v, u⟩, and how far the two may be apart."""
    forward = reverse = size = 0.0
    for v, t in zip(case.plain.cotangents, tangents, strict=True):
        if t is not None:
            forward += float((v.conj() * t).real.double().sum())
            size += float((v.abs() * t.abs()).double().sum())
    for g, d in zip(grads, u, strict=True):
        reverse += float((g.conj() * d).real.double().sum())
        size += float((g.abs() * d.abs()).double().sum())
    return forward, reverse, max(1e-6, 4096 * case.epsilon) * size


def _same(a: float, b: float, allowed: float) -> bool:
    return abs(a - b) <= allowed or (math.isnan(a) and math.isnan(b))


def _is_custom(case: Case) -> bool:
    """Whether forward calls an op of `torch.library`."""
    with Operations() as operations:
        case.call(case.fresh())
    return bool(operations.namespaces - {"aten", "prim", "prims"})
