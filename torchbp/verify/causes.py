"""The likely cause of a wrong gradient, read from got and expected."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["likely_cause"]

FEW = 4  # elements, of which some are wrong: that tells no place


def likely_cause(
    got: Tensor,
    expected: Tensor,
    bad: Tensor,
    *,
    leaf: Tensor | None = None,
    ones: Tensor | None = None,
    sizes: Sequence[int] = (),
) -> str | None:
    """Name what would explain ``got`` where ``expected`` is right.

    Args:
        got: Gradient found, shape ``(*)``.
        expected: Gradient trusted, same shape.
        bad: Which elements differ, bool, same shape.
        leaf: The input itself, to say where in its values the fault lies.
        ones: Gradient for a grad_output of ones, Jᵀ1; tells a forgotten grad_output.
        sizes: Dimensions of inputs and outputs, to name a factor.

    Returns:
        One line, or ``None`` where nothing fits.
    """
    if torch.isnan(got).any() or torch.isinf(got).any():
        return "NaN or infinity made in backward: an overflow, 0 · inf, or a division by 0"
    if bad.all() or bad.sum() > bad.numel() / 2:
        whole = _of_all(got, expected, ones, sizes)
        if whole:
            return whole
    large = bad & (expected.abs() > 1e-3 * expected.abs().max())
    if large.any() and _close(got[large], torch.zeros_like(got[large]), expected.abs().max()):
        return "no gradient there: detached, masked, or not written" + _where(bad, leaf)
    near = (got - expected).abs().max() < 5e-3 * expected.abs().max()
    if near and bool(bad.all()) and got.numel() > 1:
        return "computed in a lower precision than the input's"
    return ("only some elements" + _where(bad, leaf)) if not bad.all() else None


def _of_all(  # noqa: PLR0911  # one return a cause
    got: Tensor, expected: Tensor, ones: Tensor | None, sizes: Sequence[int]
) -> str | None:
    scale = expected.abs().max()
    large = expected.abs() > 1e-2 * scale
    if not large.any():
        return "a gradient where there should be none"
    if _close(got, torch.zeros_like(got), scale):
        return "no gradient at all: detached, or returned as None or zeros"
    if got.is_complex() and _close(got, expected.conj(), scale):
        return "conj() missing: the gradient is the complex conjugate"
    ratios = got[large] / expected[large]
    r = ratios.mean()
    if _close(ratios, r.expand_as(ratios), r.abs()) and not r.is_complex():
        return _factor(float(r), sizes, alone=got.numel() == 1)
    if ones is not None and _close(got, ones, ones.abs().max()):
        return "grad_output forgotten: this is the gradient for a grad_output of ones"
    if got.dim() >= 2 and got.shape[-1] == got.shape[-2] and _close(got.mT, expected, scale):
        return "transposed"
    if _close(got.abs(), expected.abs(), scale):
        return "wrong sign in some elements: |·| or a sign lost"
    return _of_slices(got, expected, scale)


def _of_slices(got: Tensor, expected: Tensor, scale: Tensor) -> str | None:
    for dim, n in enumerate(got.shape):
        if n > 1 and _close(got.flip(dim), expected, scale):
            return f"reversed along dimension {dim}"
        for by in (1, -1) if n > 2 else ():
            here, there = (t.narrow(dim, max(0, k), n - 1) for t, k in ((got, by), (expected, -by)))
            if _close(here, there, scale):
                return f"shifted by one along dimension {dim}"
        others = [d for d in range(got.dim()) if d != dim]
        written = (got.abs().amax(others) if others else got.abs()) > 0
        if n > 2 and int(written.sum()) == 1:
            return f"written in slice {int(written.nonzero())} of dimension {dim} only"
    return None


def _factor(r: float, sizes: Sequence[int], *, alone: bool) -> str | None:
    named = {-1.0: "wrong sign", 2.0: "factor 2 too large", 0.5: "factor 2 too small"}
    for value, text in named.items():
        if abs(r - value) < 1e-3 * abs(value):
            return text
    for n in sizes:
        for value in (float(n), -float(n), 1.0 / n if n else 0.0):
            if n > 1 and abs(r - value) < 1e-3 * abs(value):
                kind = "too large" if abs(r) > 1 else "too small"
                return f"factor {n} {kind}, a size of the data: mean and sum confused"
    if alone:  # one element says nothing of the others
        return None
    if abs(r - 1) < 5e-3:
        return "computed in a lower precision than the input's"
    return f"constant factor {r:.6g}"


def _where(bad: Tensor, leaf: Tensor | None) -> str:
    if bad.all() or bad.dim() == 0 or bad.numel() < FEW:
        return ""
    last = torch.zeros_like(bad).reshape(-1)
    last[-1] = True
    if torch.equal(bad.reshape(-1), last):
        return ": the last one (a boundary)"
    for axis in range(bad.dim() if bad.dim() > 1 else 0):
        others = [d for d in range(bad.dim()) if d != axis]
        lines = bad.amax(dim=others)
        if torch.equal(lines, bad.to(torch.int8).amin(dim=others).bool()):
            at = lines.nonzero().flatten().tolist()
            return f": whole slices {at[:8]} of dimension {axis}"
    if leaf is not None and leaf.shape == bad.shape and not leaf.is_complex():
        regions = {
            "the input is negative": leaf < 0,
            "the input is positive": leaf > 0,
            "|input| > 1": leaf.abs() > 1,
            "|input| < 1": leaf.abs() < 1,
        }
        for text, region in regions.items():
            if torch.equal(bad, region):
                return f": exactly where {text}"
    return ""


def _close(a: Tensor, b: Tensor, scale: Tensor) -> bool:
    return bool(((a - b).abs() <= 1e-4 * scale).all())
