"""The function along lines through its sample, measured, against what its gradient says."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchbp.verify.builtin import inexact, padding
from torchbp.verify.cases import Case
from torchbp.verify.differences import CURVED, central, settle
from torchbp.verify.duals import pushed, tangents_along
from torchbp.verify.otherwise import asked_otherwise
from torchbp.verify.raised import BackwardRaised, ForwardRaised
from torchbp.verify.tensors import Directions, like, real, scale_of, signed_like
from torchbp.verify.tolerance import largest

__all__ = ["STEP", "Lines", "Step"]

HERE = 3e-9  # relative tolerance
ELSEWHERE = 2e-8  # at other samples than the user's, whose rounding is less well known
SHORTEST = 2.0**-40  # step whose own rounding does not matter yet
SHORTER = 64.0  # times, where a step is too long
SHORTENED = 3  # times at most
LONGER = 16.0  # times, where rounding may be all that a step is off by
QUARTER = 4.0  # times, where rounding hides what so short a step is off by
# What is less throughout may be the rest of what cancels: of its terms nothing is known.
NOTHING = 1e-12
STEP = "a step"  # in the memo of a case, for whoever else needs one
DUALS = "forward refuses dual numbers"


class Step(NamedTuple):
    """The end of a short step from a sample: a call that has been made, whose graph may be run again.

    Attributes:
        directions: Flat real numbers, one tensor a leaf.
        size: How far the step went along them.
        leaves: What it led to.
        outputs: What forward gave there.
    """

    directions: Directions
    size: float
    leaves: list[Tensor]
    outputs: tuple[Tensor, ...]


class Lines:
    """The function along lines through the sample."""

    def __init__(
        self,
        case: Case,
        *,
        elsewhere: bool = False,
        otherwise: bool = False,
        dual: bool = False,
    ) -> None:
        self.case = case
        self.otherwise = otherwise  # whether the gradient at the end of a step is asked for so
        self.dual = dual  # whether the first step is made with dual numbers, if forward takes them
        self.tangents: list[Tensor | None] | None = None  # of the outputs at its end, then
        self.hidden = (
            False  # whether the gradient seems to be right at the sample and wrong beside it
        )
        self.elsewhere = elsewhere  # than at the user's sample
        self.at_once = False  # whether the first step already said that all is well
        self.apart = math.nan  # how far the slope was from the gradient's, when measured last
        self.unlike = False  # whether steps of several lengths disagreed, and none settled it
        self.rise = math.nan  # of the last short step: ⟨v, f(x + step) - f(x)⟩
        self.end: tuple[list[Tensor], tuple[Tensor, ...]] = ([], ())  # of it: leaves and outputs
        self.there: tuple[Tensor, ...] = ()  # the gradient at that end
        self.grads = [g.detach().cpu() for g in case.plain.grads]
        self.noise = (
            4
            * case.epsilon
            * sum(
                float((v.abs() * y.abs()).nan_to_num(0, 0, 0).sum())
                for v, y in zip(case.plain.cotangents, case.plain.outputs, strict=True)
            )
        )
        if all(largest(t) < NOTHING for t in (*case.plain.outputs, *case.plain.grads)):
            size = sum(float(v.abs().sum()) for v in case.plain.cotangents)
            self.noise += 4 * case.epsilon * size
        self._rounds = self.noise if elsewhere else 0.0  # in the user's sample that is known better
        exact = case.epsilon < 1e-12
        self.step = 2.0**-9 if exact else 2.0**-5
        self.near = 2.0**-17 if exact else 2.0**-7  # the cube root of epsilon
        rtol = case.options.get("rtol")
        fitted = (ELSEWHERE if elsewhere else HERE) if exact else 2e4 * case.epsilon
        self.relative: float = max(fitted, inexact(case)[1]) if rtol is None else rtol
        steps = case.memo.get("steps") or [None] * len(case.leaves)
        self.scales = [
            scale_of(leaf.cpu()) if step is None else step
            for leaf, step in zip(case.leaves, steps, strict=True)
        ]
        for i, none in padding(case).items():
            self.scales[i] = self.scales[i].masked_fill(_each(none, self.grads[i]), 0.0)
        self._ones: list[Tensor] | None = None
        self._directions: dict[int, Directions] = {}
        self._line: Directions = {}  # the last along which forward was called
        self._rises: dict[float, float] = {}  # what it rose by then, by the length of the step

    def tolerance(self, which: int) -> Tensor:
        """Return how far each element may be off where the differences have converged."""
        g = self.grads[which]
        atol = self.case.options.get("atol")
        # What stays may have a gradient of any size.
        moving = real(g)[self.scales[which] != 0] if "steps" in self.case.memo else g
        floor = 1e-3 * self.relative * largest(moving) if atol is None else float(atol)
        return self.relative * g.abs().double() + floor + 1e-15 + self.noise * 1e-6

    def ones(self, which: int) -> Tensor | None:
        """Gradient for a grad_output of ones; asked for only once something is wrong."""
        if self._ones is None:
            ones = [torch.ones_like(y) for y in self.case.plain.outputs]
            self._ones = [g.detach().cpu() for g in self.case.vjp(ones)]
        return self._ones[which]

    def along_element(self, which: int, index: int, *, quick: bool = False) -> tuple[float, bool]:
        """Return what the derivative along one element is, and whether that is settled.

        ``quick``, where the gradient is known to be wrong somewhere, takes one central difference for it, if that shows
        no kink.
        """
        direction = torch.zeros_like(real(self.grads[which]))
        direction[index] = size = float(self.scales[which][index])
        line = {which: direction}
        got = float(real(self.grads[which])[index]) * size
        allowed = float(_each(self.tolerance(which), self.grads[which])[index]) * size
        if quick and not self.case.options.get("eps"):
            value, bend = central(lambda t: self.value(line, t), self.near)
            off = abs(value - got)
            # Both sides may be rounded alike: there seems to be no bend, then.
            if off <= allowed or bend + 2 * self.noise / self.near < 0.02 * off:
                return value / size, True
        value, settled = self.measure(line, got, allowed)
        return value / size, settled

    def direction(self, number: int) -> Directions:
        """Return a random direction that moves every element, one tensor a leaf; the same one each time."""
        if number not in self._directions:
            generator = self.case.generator(f"line {number}")
            self._directions[number] = {
                i: signed_like(real(g), generator) * scale
                for i, (g, scale) in enumerate(zip(self.grads, self.scales, strict=True))
            }
        return self._directions[number]

    def agrees(self, directions: Directions, *, quick: bool = False) -> bool | None:
        """Return whether gradient and differences agree; ``None`` where the latter do not settle.

        ``quick``, where the gradient is known to be wrong somewhere, takes one central difference for it, if that shows
        no kink.
        """
        got, allowed = self._along(self.grads, directions)
        if quick and not self.case.options.get("eps"):
            value, bend = central(lambda t: self.value(directions, t), self.near)
            off = abs(value - got)
            if off <= allowed:
                return True
            if bend + 2 * self.noise / self.near < 0.02 * off:
                return False
        value, settled = self.measure(directions, got, allowed)
        self.apart = value - got
        return abs(value - got) <= allowed if settled else None

    def agrees_nearby(self, directions: Directions) -> bool:
        """Return whether one central difference of a short step agrees."""
        got, allowed = self._along(self.grads, directions)
        return abs(central(lambda t: self.value(directions, t), self.near)[0] - got) <= allowed

    def bend(self, directions: Directions) -> float:
        """Return by how much the slopes to both sides differ, in a short step."""
        return central(lambda t: self.value(directions, t), self.near)[1]

    def off_to_one_side(self, directions: Directions) -> float:
        """Return how far the slope to one side is from the gradient's, in a short step."""
        return self.value(directions, self.near) / self.near - self.along(directions)

    def jumps(self, directions: Directions) -> bool:
        """Return whether the shortest step that rounding allows has another slope: others go over many jumps.

        Where the gradient is 0, as of what is rounded, a far shorter one tells whether forward is flat.
        """
        got, allowed = self._along(self.grads, directions)
        if got == 0 and self.value(directions, SHORTEST) == 0:
            return True
        value, _ = self.measure(directions, got, allowed)
        off = abs(value - got)
        step = max(40 * self.noise / off, SHORTEST) if off > 0 else math.inf
        if not step < self.near:
            return False
        slope, _ = central(lambda t: self.value(directions, t), step)
        return abs(slope - value) > 0.25 * off

    def along(self, directions: Directions) -> float:
        """Return the slope that the gradient gives along ``directions``."""
        return self._along(self.grads, directions)[0]

    def _along(self, grads: list[Tensor], directions: Directions) -> tuple[float, float]:
        """Return the slope that ``grads`` give along ``directions``, and how far that may be off."""
        got = allowed = 0.0
        for i, d in directions.items():
            moved = d != 0  # what stays may have a gradient that is NaN
            got += float((real(grads[i]) * d)[moved].sum())
            allowed += float((_each(self.tolerance(i), self.grads[i]) * d)[moved].norm())
        return got, allowed

    def rises(self, directions: Directions) -> bool:
        """Return whether the function rises by the mean of its slopes at both ends of a short step.

        That is the trapezoidal rule: as exact as a central difference, for one forward less. Where it is off by about
        what rounding explains, a longer step is tried. Otherwise kinks may be near, a pole, or the end of the domain:
        what these explain falls with the step, what rounding explains grows as the step falls, and a gradient that is
        wrong is as wrong in a short one. ``False`` says nothing yet. What falls as the step and not as its square is
        ``hidden``: a gradient that is wrong everywhere but in the sample, where weights are 1 or biases 0.
        """
        if self.case.options.get("eps") or not self.case.options.get("check_backward_ad", True):
            return False
        got, allowed = self._along(self.grads, directions)
        try:
            off = self._off(directions, self.near, got)
            if abs(off) <= allowed + self._rounds / self.near:
                self.at_once = True
                return True
            if abs(off) <= 4 * self.noise / self.near:
                long = self._off(directions, LONGER * self.near, got)
                return abs(long) <= allowed + self.noise / (LONGER * self.near) or (
                    abs(_extrapolated(long, off, LONGER)) <= allowed + self._rounds / self.near
                )
            return self._rises_soon(directions, off, got, allowed)
        except BackwardRaised:
            return False

    def _rises_soon(self, directions: Directions, off: float, got: float, allowed: float) -> bool:
        """The same of shorter steps, where the first is ``off``."""
        offs, step = [abs(off)], self.near
        for power in range(1, SHORTENED + 1):
            step = self.near / SHORTER**power
            there = self._off(directions, step, got)
            short = abs(there)
            if power == 1 and math.isfinite(short) and abs(off) <= 3 * short / SHORTER:
                return True  # rounding, more than what the outputs' size tells
            if math.isinf(off) and math.isinf(short):
                break  # at the end of the domain, where no step is short enough
            self.hidden = power == 1 and 1 / 80 < there / off < 1 / 50
            if short < abs(off) / 32 and short <= allowed + self.noise / step:
                return True
            if short < min(abs(off), abs(got)) / 1024:
                return True
            # A gradient of fewer bits looks so by chance: of the sample itself differences are asked.
            curved = abs(off) < CURVED * allowed and abs(there - off) > 0.02 * abs(off)
            curved &= self.otherwise
            if power == 1 and curved and self._falls_as_square(directions, (off, there), allowed):
                return True
            offs.append(short)
        if max(offs) - min(offs) < 0.02 * abs(off) and self.noise / step < 0.01 * abs(off):
            self.step /= SHORTER**2  # the same in all steps: short ones, then, that meet no kinks
            self.near /= SHORTER
        else:
            self.unlike = True
        return False

    def _falls_as_square(
        self, directions: Directions, offs: tuple[float, float], allowed: float
    ) -> bool:
        """Return whether a quarter of the first step is off by a sixteenth of that: curvature, where rounding hides it.

        What is extrapolated from both is as wrong as the gradient. How far a step is from it that is shorter still,
        tells of rounding, which falls as the step grows.
        """
        step = self.near / QUARTER
        short = self._off(directions, step, self.along(directions))
        left = _extrapolated(offs[0], short, QUARTER)
        rounding = self._rounds / step + 3 * abs(offs[1] - left) * QUARTER / SHORTER
        self.hidden = 0.2 < short / offs[0] < 0.3
        return abs(left) <= allowed + rounding

    def rises_at_once(self, directions: Directions) -> bool:
        """The same, from one step only: for samples with a kink, as a rule."""
        got, allowed = self._along(self.grads, directions)
        try:
            return abs(self._off(directions, self.near, got)) <= allowed + self.noise / self.near
        except BackwardRaised:
            return False

    def _off(self, directions: Directions, step: float, got: float) -> float:
        """Return by how much the rise of a step exceeds the mean slope of its ends; infinite beyond the domain."""
        leaves, self.rise = self.moved(directions, step), math.nan
        try:
            self.end = leaves, self._forward(leaves, directions)
        except ForwardRaised:
            self._known(directions)[step] = math.nan
            return float("inf")
        off = self._off_there(directions, step, got)
        self._known(directions)[step] = self.rise
        return off

    def _forward(self, leaves: list[Tensor], directions: Directions) -> tuple[Tensor, ...]:
        """Return the outputs at the end of a step."""
        case, self.tangents = self.case, None
        refuses = case.given.memo  # one for all samples
        if not self.dual or DUALS in refuses:
            return case.forward(leaves)
        self.dual = False  # in shorter steps
        try:
            outputs, self.tangents = pushed(case, leaves, tangents_along(case, directions))
        except Exception:
            outputs = case.forward(leaves)  # raises beyond the domain
            refuses[DUALS] = True
        return outputs

    def _off_there(self, directions: Directions, step: float, got: float) -> float:
        leaves, outputs = self.end
        self.rise = self.rise_to(outputs)
        if self.otherwise:
            self.there = asked_otherwise(self.case, outputs, leaves)
        else:
            v = self.case.plain.cotangents
            self.there = self.case.backward(outputs, leaves, v, retain_graph=True)
        there, _ = self._along([g.detach().cpu() for g in self.there], directions)
        off = self.rise / step - (got + there) / 2
        return off if off == off else float("inf")  # noqa: PLR0124  # NaN

    def rises_for(self, case: Case, directions: Directions) -> bool:
        """The same for another grad_output, that of ``case``, at the end of the step just taken: without a forward."""
        other = Lines(case, elsewhere=self.elsewhere)
        other.end = self.end
        got, allowed = other._along(other.grads, directions)
        try:
            return abs(other._off_there(directions, other.near, got)) <= allowed
        except BackwardRaised:
            return True  # of a graph that can be run once only

    def measure(self, directions: Directions, got: float, allowed: float) -> tuple[float, bool]:
        """Return the derivative along ``directions`` (one a leaf), and whether differences settle it."""

        def phi(t: float) -> float:
            return self.value(directions, t)

        asked = self.case.options.get("eps")
        step, near = (float(asked), float(asked)) if asked else (self.step, self.near)
        return settle(phi, got, allowed, step, self.noise, near)

    def value(self, directions: Directions, t: float) -> float:
        """Return ⟨v, f(x + t·directions) - f(x)⟩; NaN outside of the domain. No step of a line is taken twice."""
        known = self._known(directions)
        if t not in known:
            try:
                known[t] = self.rise_to(self.case.forward(self.moved(directions, t)))
            except ForwardRaised:  # outside of the domain
                known[t] = math.nan
        return known[t]

    def _known(self, directions: Directions) -> dict[float, float]:
        if self._line is not directions:
            self._line, self._rises = directions, {}
        return self._rises

    def moved(self, directions: Directions, t: float) -> list[Tensor]:
        """Return new leaves at x + t·directions."""
        leaves = []
        for i, leaf in enumerate(self.case.leaves):
            moved = leaf.clone()
            if i in directions:
                d = like(directions[i], self.grads[i]).to(device=leaf.device, dtype=leaf.dtype)
                moved += t * d
            leaves.append(moved.requires_grad_())
        return leaves

    def rise_to(self, outputs: Sequence[Tensor]) -> float:
        """Return ⟨v, outputs - f(x)⟩; NaN where they have another shape."""
        total = 0.0
        for v, y, y0 in zip(
            self.case.plain.cotangents, outputs, self.case.plain.outputs, strict=True
        ):
            if y.shape != y0.shape:
                return float("nan")
            total += float((v.conj() * (y.detach() - y0)).real.double().sum())
        return total


def _extrapolated(long: float, short: float, times: float) -> float:
    """Return what steps of both lengths are off by but for curvature, which falls as the square of the step."""
    return (times**2 * short - long) / (times**2 - 1)


def _each(t: Tensor, g: Tensor) -> Tensor:
    flat = t.reshape(-1)
    return flat.repeat_interleave(2) if g.is_complex() else flat
