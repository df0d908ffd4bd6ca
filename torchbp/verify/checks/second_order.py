"""Second order: the gradient of the gradient equals differences of the first-order gradient.

A backward that detaches what it saved, or that saves an intermediate of forward, gives a right gradient and a silently
wrong second one. `once_differentiable`, or a backward that leaves no graph at all, is a refusal.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable, Refused
from torchbp.verify.cases import Case
from torchbp.verify.differences import settle
from torchbp.verify.lines import like, real, scale_of
from torchbp.verify.raised import ForwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.tensors import graph, signed_like

NAME = "second_order"


def _run(case: Case) -> Iterator[Finding]:
    if not case.steady:
        raise NotApplicable("forward gives other values each time it is called")
    v = [t.clone().requires_grad_() for t in case.plain.cotangents]
    leaves, outputs = case.kept
    first = case.backward(outputs, leaves, v, create_graph=True)
    generator = case.generator(NAME)
    w = [signed_like(g, generator) for g in first]
    wanted = [g for g in first if g.requires_grad]
    if not wanted:
        raise Refused("backward leaves no graph: it can be differentiated once only")
    if any("Error" in node.name() for node in graph(wanted)):
        raise Refused("once_differentiable")
    inner = [w[i] for i, g in enumerate(first) if g.requires_grad]
    case.calls.count(backward=1)
    try:
        second = torch.autograd.grad(
            wanted, [*leaves, *v], inner, allow_unused=True, retain_graph=True
        )
    except Exception as error:
        if "once_differentiable" in str(error) or isinstance(error, NotImplementedError):
            raise Refused(str(error).splitlines()[0]) from error
        raise Refused(
            f"double backward raises {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    if all(s is None for s in second):
        raise Refused("backward leaves no graph: it can be differentiated once only")
    got = [
        torch.zeros_like(t) if s is None else s for s, t in zip(second, [*leaves, *v], strict=True)
    ]
    names = [*case.names, *(f"grad_output {i}" for i in range(len(v)))]
    yield from _compare(case, names, got, [*leaves, *v], w, [g is None for g in second])


def _compare(
    case: Case,
    names: list[str],
    got: list[Tensor],
    points: list[Tensor],
    w: list[Tensor],
    missing: list[bool],
) -> Iterator[Finding]:
    generator = case.generator(f"{NAME} lines")
    n = len(case.leaves)
    directions = [
        like(signed_like(real(p), generator) * scale_of(p.detach().cpu()), p).to(p) for p in points
    ]
    size = sum(float((a.abs() * g.abs()).sum()) for a, g in zip(w, case.plain.grads, strict=True))
    noise = 4 * case.epsilon * size
    terms = max(float(a.norm()) for a in w) * max(float(a.norm()) for a in case.plain.cotangents)

    def along(chosen: list[int]) -> tuple[float, float, bool]:
        parts = [float((real(got[i]) * real(directions[i])).sum()) for i in chosen]
        norm = (
            sum(float((real(got[i]) * real(directions[i])).square().sum()) for i in chosen) ** 0.5
        )

        def phi(t: float) -> float:
            moved = [
                (p.detach() + t * d if i in chosen else p.detach().clone()).requires_grad_()
                for i, (p, d) in enumerate(zip(points, directions, strict=True))
            ]
            try:
                y = case.forward(moved[:n])
                g = case.backward(y, moved[:n], [m.detach() for m in moved[n:]])
            except ForwardRaised:  # outside of the domain
                return float("nan")
            total = 0.0
            for a, b, b0 in zip(w, g, case.plain.grads, strict=True):
                total += float((a.conj() * (b - b0)).real.double().sum())
            return total

        relative = 1e-6 if case.epsilon < 1e-12 else 1e5 * case.epsilon
        allowed = relative * norm + 10 * noise + 1e5 * case.epsilon * terms
        step = 2.0**-8 if case.epsilon < 1e-12 else 2.0**-4
        value, settled = settle(phi, sum(parts), allowed, step, noise, step / 256)
        return sum(parts), value, settled and abs(value - sum(parts)) > allowed

    if not along(list(range(len(points))))[2]:
        return
    for i, name in enumerate(names):
        g, e, wrong = along([i])
        if wrong:
            lost = missing[i] or g == 0
            yield Finding(
                check=NAME,
                severity="wrong",
                input=name,
                message=f"second derivative with respect to {name} wrong along a random line: "
                f"got {g:.6g}, expected {e:.6g}",
                got=g,
                expected=e,
                ratio=g / e if e else None,
                cause="lost: detached in backward, or an intermediate of forward was saved"
                if lost
                else "part of it is lost: an intermediate of forward was saved, or detached",
            )


CHECK = Check(
    name=NAME,
    tests="the gradient of the gradient equals differences of the gradient",
    run=_run,
    order=70,
    level="full",
    differences=True,
)
