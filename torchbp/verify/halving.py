"""Which element's gradient is wrong, where a direction through all of them disagrees: halved until one is left."""

import math

import torch

from torchbp.verify.differences import central
from torchbp.verify.lines import SHORTEST, Lines
from torchbp.verify.raised import BackwardRaised, ForwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.tensors import half, like, like_mask, real, signed_like
from torchbp.verify.tolerance import compare

__all__ = ["culprit"]

ANOTHER = (
    "another call gives another gradient, or fails: backward draws random numbers, reads what was not written, "
    "or what was kept of this call"
)
SMOOTH = 0.02  # of how far the slope is off: where both sides differ by less, one will do


def culprit(lines: Lines, number: int, check: str, when: str = "") -> Finding | None:
    """Move every element at once; on a mismatch halve the set until one element is left: what is wrong there."""
    directions = lines.direction(number)
    whole, bend = lines.apart, math.inf if lines.unlike else lines.bend(directions)
    noise = 2 * lines.noise / lines.near
    while sum(int((d != 0).sum()) for d in directions.values()) > 1:
        first = half(directions)
        one_side = bend + noise < SMOOTH * abs(whole)
        off = lines.off_to_one_side(first) if one_side else math.nan
        if not (abs(off) > (bend + noise) / SMOOTH or abs(off) < SMOOTH * abs(whole)):
            disagrees = lines.agrees(first, quick=True) is False
            off = lines.off_to_one_side(first) if disagrees else 0.0
            bend = lines.bend(first) if disagrees and not lines.unlike else bend
        else:
            disagrees = abs(off) > (bend + noise) / SMOOTH
        if disagrees:
            directions, whole = first, off
        else:  # then it is the rest, which the end will tell
            directions = {i: d - first[i] if i in first else d for i, d in directions.items()}
            whole -= off
    which, d = next((i, d) for i, d in directions.items() if d.any())
    index = int(d.nonzero()[0])
    value, settled = lines.along_element(which, index)
    if not _in_detail(lines, which, index, value):
        return None
    cause = None
    if lines.elsewhere and not _stands(lines, which, index, value):
        if _stands(lines, which, index, value, roundings=0):
            return None
        cause = ANOTHER
    g = lines.grads[which]
    truth, known = real(g).clone(), torch.zeros_like(real(g), dtype=torch.bool)
    truth[index], known[index] = value, settled
    return compare(
        check,
        lines.case.names[which],
        g,
        like(truth, g),
        lines.tolerance(which),
        known=like_mask(known, g),
        when=f"{when} (found by halving a random direction; others may be wrong too)",
        leaf=lines.case.leaves[which],
        cause=cause,
    )


def _in_detail(lines: Lines, which: int, index: int, value: float) -> bool:
    """Return whether the shortest step that rounding allows says the same: others may miss fast oscillations."""
    size = float(lines.scales[which][index])
    off = abs(value - float(real(lines.grads[which])[index])) * size
    if not off > 0:  # or NaN
        return True
    step = max(40 * lines.noise / off, SHORTEST)
    own = abs(float(real(lines.case.leaves[which])[index])) / size
    if (
        2.0**-10 * own > lines.noise / off
    ):  # beside a pole at 0 a step is long that is not elsewhere
        step = min(step, 2.0**-10 * own)
    if not step < lines.near:  # no shorter than what was tried
        return True
    direction = torch.zeros_like(real(lines.grads[which]))
    direction[index] = size
    slope, _ = central(lambda t: lines.value({which: direction}, t), step)
    return not abs(slope - value * size) > 0.25 * off


def _stands(lines: Lines, which: int, index: int, value: float, roundings: float = 16.0) -> bool:
    """Return whether what is wrong is more than what rounding of the inputs makes of the gradient.

    A matrix may be singular at another size, a pole near at another scale. Without ``roundings``, whether it is so in
    another call.
    """
    generator = lines.case.generator("stands")
    moved = []
    for leaf, scale in zip(lines.case.leaves, lines.scales, strict=True):
        r = signed_like(leaf.real, generator)
        if not leaf.is_complex():
            r *= (scale != 0).view(r.shape).to(r)  # what stays may be at the end of the domain
        moved.append((leaf * (1 + roundings * torch.finfo(leaf.dtype).eps * r)).requires_grad_())
    try:
        grads = lines.case.backward(lines.case.forward(moved), moved, lines.case.plain.cotangents)
    except (ForwardRaised, BackwardRaised):
        return False
    got = float(real(lines.grads[which])[index])
    again = float(real(grads[which].detach().cpu())[index])
    return abs(again - got) <= 0.05 * abs(value - got) or not math.isfinite(got)
