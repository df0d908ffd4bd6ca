"""Values: the gradient equals the slope of the function, measured by finite differences.

⟨v, f(x)⟩ is differenced for one random v of both signs over all outputs at once. Up to 64 real numbers each input
element is moved alone; beyond that a few elements alone, and all together in random directions, so that the number of
calls does not grow. A mismatch is measured again with more step sizes before it counts, and a kink is told by its two
one-sided slopes, between which any gradient is right.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case, signed_like
from torchbp.verify.differences import one_sided, slope
from torchbp.verify.report import Finding
from torchbp.verify.tolerance import compare

NAME = "values"
EACH = 64  # real numbers up to which every one is moved alone
ALONE = 3  # beyond that: this many alone per case, and
TOGETHER = 2  # this many random directions
DEEP = 7  # step sizes where two did not settle it


def _run(case: Case) -> Iterator[Finding]:
    lines = Lines(case)
    known = [torch.zeros(g.numel() * (1 + g.is_complex()), dtype=torch.bool) for g in lines.grads]
    truth = [_real(g).clone() for g in lines.grads]
    unsettled = 0
    elements = list(_elements(case, lines.grads))
    for which, index in elements:
        value, settled = lines.along_element(which, index)
        unsettled += not settled
        known[which][index] = settled
        truth[which][index] = value
    seen = False
    for which, (name, g, leaf) in enumerate(zip(case.names, lines.grads, case.leaves, strict=True)):
        found = compare(
            NAME,
            name,
            g,
            _like(truth[which], g),
            lines.tolerance(which),
            known=_like_mask(known[which], g),
            leaf=leaf.cpu(),
            ones=lines.ones(which),
            sizes=_sizes(case),
        )
        if found:
            seen = True
            yield found
    if not seen and sum(g.numel() for g in lines.grads) > EACH:
        for number in range(TOGETHER):
            found = lines.along_all(number)
            if found:
                yield found
                break
    if unsettled and unsettled == len(elements):
        raise NotApplicable("finite differences settle nowhere: no smooth point in the sample")


class Lines:
    """The function along lines through the sample."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.grads = [g.detach().cpu() for g in case.plain.grads]
        self.noise = (
            4
            * case.epsilon
            * sum(
                float((v.abs() * y.abs()).nan_to_num(0, 0, 0).sum())
                for v, y in zip(case.plain.cotangents, case.plain.outputs, strict=True)
            )
        )
        self.step = 2.0**-9 if case.epsilon < 1e-12 else 2.0**-5
        rtol = case.options.get("rtol")
        fitted = 3e-9 if case.epsilon < 1e-12 else 2e4 * case.epsilon
        self.relative: float = fitted if rtol is None else rtol
        self.scales = [_scale(leaf.detach().cpu()) for leaf in case.leaves]
        self._ones: list[Tensor] | None = None

    def tolerance(self, which: int) -> Tensor:
        """Return how far each element may be off where the differences have converged."""
        g = self.grads[which]
        atol = self.case.options.get("atol")
        floor = 1e-3 * self.relative * float(g.abs().max()) if atol is None else float(atol)
        return self.relative * g.abs().double() + floor + 1e-15 + self.noise * 1e-6

    def ones(self, which: int) -> Tensor | None:
        """Gradient for a grad_output of ones; asked for only once something is wrong."""
        if self._ones is None:
            ones = [torch.ones_like(y) for y in self.case.plain.outputs]
            self._ones = [g.detach().cpu() for g in self.case.vjp(ones)]
        return self._ones[which]

    def along_element(self, which: int, index: int) -> tuple[float, bool]:
        """Return what the derivative along one element is, and whether that is settled."""
        direction = torch.zeros_like(_real(self.grads[which]))
        direction[index] = float(self.scales[which][index])
        size = float(self.scales[which][index])
        got = float(_real(self.grads[which])[index])
        allowed = float(_each(self.tolerance(which), self.grads[which])[index])
        value, settled = self._settle({which: direction}, got * size, allowed * size)
        return value / size, settled

    def along_all(self, number: int) -> Finding | None:
        """Move every element at once; on a mismatch halve the set until one element is left."""
        generator = self.case.generator(f"{NAME} {number}")
        directions = {
            i: signed_like(_real(g), generator) * scale
            for i, (g, scale) in enumerate(zip(self.grads, self.scales, strict=True))
        }
        if self._agrees(directions):
            return None
        while sum(int((d != 0).sum()) for d in directions.values()) > 1:
            half = _half(directions)
            rest = {i: d - half[i] if i in half else d for i, d in directions.items()}
            if not self._agrees(half):
                directions = half
            elif not self._agrees(rest):
                directions = rest
            else:
                return None
        which, d = next((i, d) for i, d in directions.items() if d.any())
        index = int(d.nonzero()[0])
        value, settled = self.along_element(which, index)
        g = self.grads[which]
        truth, known = _real(g).clone(), torch.zeros(_real(g).numel(), dtype=torch.bool)
        truth[index], known[index] = value, settled
        return compare(
            NAME,
            self.case.names[which],
            g,
            _like(truth, g),
            self.tolerance(which),
            known=_like_mask(known, g),
            when=" (found by halving a random direction; others may be wrong too)",
        )

    def _agrees(self, directions: dict[int, Tensor]) -> bool:
        got = allowed = 0.0
        for i, d in directions.items():
            g = _real(self.grads[i])
            got += float((g * d).sum())
            allowed += float((_each(self.tolerance(i), self.grads[i]) * d).norm())
        value, settled = self._settle(directions, got, allowed)
        return not settled or abs(value - got) <= allowed

    def _settle(
        self, directions: dict[int, Tensor], got: float, allowed: float
    ) -> tuple[float, bool]:
        def phi(t: float) -> float:
            return self._phi(directions, t)

        step = float(self.case.options.get("eps") or self.step)
        value, bound = slope(phi, step, self.noise)
        if abs(value - got) <= allowed:
            return value, True
        value, bound = slope(phi, 4 * step, self.noise, DEEP)
        if abs(value - got) <= max(allowed, 5 * bound):
            return got, bound < 0.1 * abs(got) or bound < allowed
        (left, left_bound), (right, right_bound) = one_sided(phi, step / 64, self.noise)
        low, high = (
            min(left - left_bound, right - right_bound),
            max(left + left_bound, right + right_bound),
        )
        if abs(left - right) > 10 * (left_bound + right_bound) and low <= got <= high:
            return got, False  # a kink: any slope between the two is right
        return value, bound < 0.1 * abs(value - got)

    def _phi(self, directions: dict[int, Tensor], t: float) -> float:
        leaves = []
        for i, leaf in enumerate(self.case.leaves):
            moved = leaf.clone()
            if i in directions:
                d = _like(directions[i], self.grads[i]).to(device=leaf.device, dtype=leaf.dtype)
                moved += t * d
            leaves.append(moved.requires_grad_())
        try:
            outputs = self.case.forward(leaves)
        except Exception:  # outside of the domain
            return float("nan")
        total = 0.0
        for v, y, y0 in zip(
            self.case.plain.cotangents, outputs, self.case.plain.outputs, strict=True
        ):
            if y.shape != y0.shape:
                return float("nan")
            total += float((v.conj() * (y.detach() - y0)).real.double().sum())
        return total


def _elements(case: Case, grads: list[Tensor]) -> Iterator[tuple[int, int]]:
    sizes = [g.numel() * (1 + g.is_complex()) for g in grads]
    if sum(sizes) <= EACH:
        yield from ((i, j) for i, n in enumerate(sizes) for j in range(n))
        return
    largest = max(range(len(sizes)), key=lambda i: sizes[i])
    n = sizes[largest]
    generator = case.generator("elements")
    random = int(torch.randint(n, (), generator=generator))
    steepest = int(_real(grads[largest]).abs().nan_to_num(torch.inf).argmax())
    yield from ((largest, j) for j in dict.fromkeys([steepest, n - 1, random][:ALONE]))


def _half(directions: dict[int, Tensor]) -> dict[int, Tensor]:
    """Return the first half of the elements that are moved."""
    count = sum(int((d != 0).sum()) for d in directions.values()) // 2
    half = {}
    for i, d in directions.items():
        at = d.nonzero().flatten()[:count]
        part = torch.zeros_like(d)
        part[at] = d[at]
        half[i] = part
        count -= at.numel()
        if count <= 0:
            break
    return half


def _scale(leaf: Tensor) -> Tensor:
    """Return the size of a step of 1 for each element: its magnitude, no less than a tenth of the typical one."""
    x = _real(leaf).abs().double()
    x = torch.where(x.isfinite(), x, 1.0)
    typical = float(x.median()) if x.numel() else 1.0
    return x.clamp(min=0.1 * typical if typical > 0 else 1.0)


def _real(t: Tensor) -> Tensor:
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    return t.reshape(-1).double()


def _like(flat: Tensor, t: Tensor) -> Tensor:
    if t.is_complex():
        return torch.view_as_complex(flat.view(*t.shape, 2).contiguous())
    return flat.view(t.shape)


def _like_mask(flat: Tensor, t: Tensor) -> Tensor:
    return flat.view(*t.shape, 2).all(-1) if t.is_complex() else flat.view(t.shape)


def _each(t: Tensor, g: Tensor) -> Tensor:
    flat = t.reshape(-1)
    return flat.repeat_interleave(2) if g.is_complex() else flat


def _sizes(case: Case) -> list[int]:
    found: list[int] = []
    for t in (*case.leaves, *case.plain.outputs):
        found += [t.numel(), *t.shape]
    return sorted({n for n in found if n > 1}, reverse=True)


CHECK = Check(
    name=NAME,
    tests="the gradient equals finite differences of <v, f(x)> for a random signed v",
    run=_run,
    order=10,
)
