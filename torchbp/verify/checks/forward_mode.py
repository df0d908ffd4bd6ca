"""Forward mode: ⟨v, J u⟩ from the jvp equals ⟨Jᵀ v, u⟩ from backward; where not, differences tell which is wrong."""

from collections.abc import Iterator

import torch.autograd.forward_ad as fwd
from torch import Tensor

from torchbp.verify._check import Check, Refused
from torchbp.verify.cases import Case, reason, signed_like, tensors_in
from torchbp.verify.lines import Lines, real
from torchbp.verify.report import Finding

NAME = "forward_mode"
LINES = 2


def _run(case: Case) -> Iterator[Finding]:
    lines = Lines(case)
    for number in range(LINES):
        generator = case.generator(f"{NAME} {number}")
        u = [signed_like(leaf, generator) for leaf in case.leaves]
        try:
            tangents = _jvp(case, u)
        except Exception as error:
            yield from _refuse(case, error)
            raise Refused(reason(error)) from error
        forward = reverse = size = 0.0
        for v, t in zip(case.plain.cotangents, tangents, strict=True):
            if t is not None:
                forward += float((v.conj() * t).real.double().sum())
                size += float((v.abs() * t.abs()).double().sum())
        for g, d in zip(case.plain.grads, u, strict=True):
            reverse += float((g.conj() * d).real.double().sum())
            size += float((g.abs() * d.abs()).double().sum())
        allowed = max(1e-6, 4096 * case.epsilon) * size
        if abs(forward - reverse) <= allowed or (forward != forward and reverse != reverse):  # noqa: PLR0124
            continue
        directions = {i: real(d).cpu() for i, d in enumerate(u)}
        truth, settled = lines.measure(directions, forward, allowed)
        if settled and not abs(truth - forward) <= allowed:
            none = all(t is None or not t.any() for t in tangents)
            yield Finding(
                check=NAME,
                severity="wrong",
                message=f"<v, J u> by forward mode is {forward:.6g}, expected {truth:.6g} "
                f"(by differences; reverse mode {reverse:.6g})",
                got=forward,
                expected=truth,
                ratio=forward / truth if truth else None,
                cause="jvp gives zero: the tangent is dropped" if none else "the jvp rule is wrong",
            )
            return


def _refuse(case: Case, error: Exception) -> Iterator[Finding]:
    if case.options["check_forward_ad"]:
        yield Finding(
            check=NAME,
            severity="wrong",
            message=f"check_forward_ad: forward mode raises {reason(error)}",
        )


def _jvp(case: Case, u: list[Tensor]) -> list[Tensor | None]:
    with fwd.dual_level():
        duals = [
            fwd.make_dual(leaf.detach().clone(), d) for leaf, d in zip(case.leaves, u, strict=True)
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
)
