"""Second derivatives: the gradient of the gradient against differences of the gradient, along random lines."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from torchbp.verify._check import Refused
from torchbp.verify.builtin import padding
from torchbp.verify.cases import Case
from torchbp.verify.differences import central, settle
from torchbp.verify.lines import STEP, Step
from torchbp.verify.raised import BackwardRaised, ForwardRaised, reason
from torchbp.verify.report import Finding
from torchbp.verify.tensors import graph, like, real, scale_of, signed_like

__all__ = ["second_derivative"]

PURPOSE = "second_order"  # of the random numbers
STEEP = 256.0  # times what the gradient tells: a jump, perhaps


def second_derivative(case: Case, check: str, when: str = "") -> Iterator[Finding]:
    """Yield what is wrong with the gradient of a random combination of the gradients, for each input.

    Args:
        case: The function, at the sample to test.
        check: Name of the check that asks.
        when: The condition, for the message, of another sample than the user's. There a kink or a jump is let pass.
    """
    v = [t.clone().requires_grad_() for t in case.plain.cotangents]
    leaves, outputs = case.kept
    generator = case.generator(PURPOSE)
    w = [signed_like(g, generator) for g in case.plain.grads]
    if when and not all(bool(g.isfinite().all()) for g in case.plain.grads):
        return
    _, got, missing = _gradient(case, w, leaves, outputs, v, apart=bool(when))
    lines = _Lines(case, w, [*leaves, *v], got)
    everything = list(range(len(got)))
    if lines.rises(everything) or (when and lines.bends(everything)) or not lines.wrong(everything):
        return
    names = [*case.names, *(f"grad_output {i}" for i in range(len(v)))]
    for i, name in enumerate(names):
        if lines.wrong([i]):
            g, e = lines.slope([i], got), lines.measured
            lost = missing[i] or g == 0
            yield Finding(
                check=check,
                severity="wrong"
                if math.isfinite(g)
                else "note",  # torch's own are NaN there: of sinc, of x^k
                input=name,
                message=f"second derivative with respect to {name} wrong along a random line: "
                f"got {g:.6g}, expected {e:.6g}{when}",
                got=g,
                expected=e,
                ratio=g / e if e else None,
                cause="lost: detached in backward, or an intermediate of forward was saved"
                if lost
                else "part of it is lost: an intermediate of forward was saved, or detached",
            )


def _gradient(
    case: Case,
    w: list[Tensor],
    leaves: list[Tensor],
    outputs: Sequence[Tensor],
    v: list[Tensor],
    *,
    apart: bool = False,
) -> tuple[tuple[Tensor, ...], list[Tensor], list[bool]]:
    """Return backward(v), the gradient of ⟨w, backward(v)⟩ for leaves and v, and which of that is none at all.

    ``apart`` differentiates the first gradient, then the others, of which double backward then has none, where a part
    of that is written by hand.
    """
    first = case.backward(outputs, leaves, v, create_graph=True)
    graphs = [i for i, g in enumerate(first) if g.requires_grad]
    points = [*leaves, *v]
    if not graphs:
        return first, [torch.zeros_like(t) for t in points], [True] * len(points)
    nodes = graph([first[i] for i in graphs])
    if any("Error" in node.name() for node in nodes):
        raise Refused("once_differentiable")
    apart = apart and any(isinstance(node, BackwardCFunction) for node in nodes)
    full: list[Tensor | None] = [None] * len(points)
    for some in (graphs[:1], graphs[1:]) if apart else (graphs,):
        if not some:
            continue
        case.calls.count(backward=1)
        try:
            second = torch.autograd.grad(
                [first[i] for i in some],
                points,
                [w[i] for i in some],
                allow_unused=True,
                retain_graph=True,
            )
        except Exception as error:
            raise Refused(f"double backward raises {reason(error)}") from error
        full = [
            s if f is None else f if s is None else f + s for f, s in zip(full, second, strict=True)
        ]
    missing = [f is None for f in full]
    whole = [torch.zeros_like(t) if f is None else f for f, t in zip(full, points, strict=True)]
    return first, whole, missing


class _Lines:
    """⟨w, backward(v)⟩ along random lines through the leaves and v."""

    def __init__(
        self, case: Case, w: list[Tensor], points: list[Tensor], got: list[Tensor]
    ) -> None:
        self.case, self.w, self.got = case, w, got
        self.points = [p.detach() for p in points]
        generator = case.generator(f"{PURPOSE} lines")
        self.directions = [
            like(signed_like(real(p.cpu()), generator) * scale_of(p.cpu()), p).to(p)
            for p in self.points
        ]
        for i, p in enumerate(self.points[: len(case.leaves)]):
            if not p.is_complex():  # 0 may be the end of the domain
                self.directions[i] = self.directions[i].abs().where(p == 0, self.directions[i])
        for i, none in padding(case).items():
            self.directions[i].reshape(-1)[none.to(self.directions[i].device)] = 0
        grads = case.plain.grads
        size = sum(float((a.abs() * g.abs()).sum()) for a, g in zip(w, grads, strict=True))
        self.noise = 4 * case.epsilon * size
        norms = [max(float(a.norm()) for a in some) for some in (w, case.plain.cotangents)]
        self.floor = 10 * self.noise + 1e5 * case.epsilon * norms[0] * norms[1]
        exact = case.epsilon < 1e-12
        self.relative = 1e-6 if exact else 1e5 * case.epsilon
        self.step = 2.0**-8 if exact else 2.0**-4
        self.near = self.step / 256
        self.measured = float("nan")
        self._values: dict[tuple[float, ...], float] = {}
        self.end = end = case.memo.pop(STEP, None)
        if isinstance(end, Step):
            for i, d in end.directions.items():
                along = like(d, self.points[i]).to(self.points[i])
                self.directions[i] = along * (end.size / self.near)

    def slope(self, chosen: list[int], gradient: Sequence[Tensor]) -> float:
        """Return what ``gradient`` says of the slope along the lines of the chosen points together."""
        return sum(float((real(gradient[i]) * real(self.directions[i])).sum()) for i in chosen)

    def allowed(self, chosen: list[int]) -> float:
        """Return how far that may be off."""
        parts = [real(self.got[i]) * real(self.directions[i]) for i in chosen]
        return self.relative * sum(float(p.square().sum()) for p in parts) ** 0.5 + self.floor

    def rises(self, chosen: list[int]) -> bool:
        """Return whether it rises by the mean of its slopes at both ends of a short step; ``False`` says nothing."""
        leaves, v = self._moved(chosen, self.near)
        try:
            first, there = self._there(leaves, v)
        except (ForwardRaised, BackwardRaised, Refused):
            return False
        mean = (self.slope(chosen, self.got) + self.slope(chosen, there)) / 2
        return abs(self._rise(first) / self.near - mean) <= self.allowed(chosen)

    def _there(
        self, leaves: list[Tensor], v: list[Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the gradient and its own gradient at the end of a step of all points, made already perhaps."""
        case, end = self.case, self.end
        if end:
            try:
                return _gradient(case, self.w, end.leaves, end.outputs, v)[:2]
            except (BackwardRaised, Refused):
                pass  # of a graph that can be run once only
        outputs = case.forward(leaves)
        n = len(leaves)
        along = {i: real(d).reshape(-1).cpu() for i, d in enumerate(self.directions[:n])}
        case.memo[STEP] = Step(along, self.near, leaves, outputs)
        return _gradient(case, self.w, leaves, outputs, v)[:2]

    def wrong(self, chosen: list[int]) -> bool:
        """Return whether differences settle another slope, which is then ``measured``."""

        def phi(t: float) -> float:
            return self._value(chosen, t)

        got, allowed = self.slope(chosen, self.got), self.allowed(chosen)
        self.measured, settled = settle(phi, got, allowed, self.step, self.noise, self.near)
        return settled and not abs(self.measured - got) <= allowed

    def bends(self, chosen: list[int]) -> bool:
        """Return whether there is a kink, or a jump, over which long steps rise no more than short ones."""

        def phi(t: float) -> float:
            return self._value(chosen, t)

        got, (slope, bend) = self.slope(chosen, self.got), central(phi, self.near)
        off = abs(slope - got)
        if not bend < 0.02 * (off if math.isfinite(off) else abs(slope)):
            return True
        if not abs(slope) > STEEP * abs(got):
            return False
        return abs(central(phi, self.step)[0]) * self.step < 2 * abs(slope) * self.near

    def _value(self, chosen: list[int], t: float) -> float:
        """Return by how much it rises over a step of the chosen points; none is taken twice."""
        step = (*chosen, t)
        if step not in self._values:
            self._values[step] = self._called(chosen, t)
        return self._values[step]

    def _called(self, chosen: list[int], t: float) -> float:
        leaves, v = self._moved(chosen, t)
        try:
            outputs = self.case.forward(leaves)
            if any(y.shape != m.shape for y, m in zip(outputs, v, strict=True)):
                return float("nan")  # of elements that are not 0
            grads = self.case.backward(outputs, leaves, [m.detach() for m in v])
        except ForwardRaised:  # outside of the domain
            return float("nan")
        return self._rise(grads)

    def _moved(self, chosen: list[int], t: float) -> tuple[list[Tensor], list[Tensor]]:
        moved = [
            (p + t * d if i in chosen else p.clone()).requires_grad_()
            for i, (p, d) in enumerate(zip(self.points, self.directions, strict=True))
        ]
        return moved[: len(self.case.leaves)], moved[len(self.case.leaves) :]

    def _rise(self, grads: Sequence[Tensor]) -> float:
        total = 0.0
        for a, b, b0 in zip(self.w, grads, self.case.plain.grads, strict=True):
            total += float((a.conj() * (b.detach() - b0)).real.double().sum())
        return total
