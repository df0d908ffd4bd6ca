"""How far rounding alone may move a gradient, measured on the function itself in float64."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchbp.verify.cases import Case
from torchbp.verify.raised import BackwardRaised, ForwardRaised
from torchbp.verify.source import functions
from torchbp.verify.tensors import tensors_in, uniform

__all__ = ["in_dtype", "in_single", "moved_by", "rounded_norm_error", "spread", "terms"]

MANY = 16  # elements: one random movement of so many is typical
SAMPLES = 2  # of fewer


def in_dtype(case: Case, dtype: torch.dtype) -> tuple[Case, Case]:
    """Return the case in ``dtype``, and in float64 at the same, rounded, sample; the same ones each time.

    float16 is given bfloat16's sample where it holds that too: one case in float64 serves both.
    """
    if dtype not in case.memo:
        source = in_dtype(case, torch.bfloat16)[1] if dtype == torch.float16 else case
        low = _cast(source, dtype)
        exact = _cast(low, torch.float64)
        pairs = zip(source.flat, exact.flat, strict=True)
        if all(not isinstance(a, Tensor) or torch.equal(a, b) for a, b in pairs):
            exact = source
        case.memo[dtype] = low, exact
    return case.memo[dtype]


def in_single(case: Case) -> tuple[Case, Case]:
    """Return the case in float32, and in float64, at bfloat16's sample, if forward takes that: it serves both."""
    exact = in_dtype(case, torch.bfloat16)[1]
    try:
        _ = exact.first
    except ForwardRaised:  # rows that no longer sum to 1
        exact = case
    return in_dtype(exact, torch.float32)


def _cast(case: Case, dtype: torch.dtype) -> Case:
    return case.variant(lambda t: t.to(dtype) if t.is_floating_point() else t, parameters=True)


def moved_by(
    size: float, case: Case, purpose: str = "rounded otherwise"
) -> Callable[[Tensor], Tensor]:
    """Return what moves every number of a tensor by up to ``size`` of itself, at random."""
    generator = case.generator(purpose)

    def moved(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        r = uniform(t.shape, generator).to(t)
        return t * (1 + size * (2 * r - 1))

    return moved


def spread(case: Case, dtype: torch.dtype, roundings: int = 1) -> list[float]:
    """Return, for each leaf, how far some roundings to ``dtype`` of inputs and grad_output move the gradient.

    Relative to its norm; the largest of a few random movements, each element by up to so many ulps.
    """
    eps = roundings * torch.finfo(dtype).eps
    found = [0.0] * len(case.leaves)
    base = case.plain
    samples = 1 if min(g.numel() for g in base.grads) >= MANY else SAMPLES
    samples *= min(2, roundings)
    floor, by_hand = terms(case), bool(functions(case))
    for number in range(samples):
        moved = moved_by(eps, case, f"rounding {number}")
        other = case.variant(moved, parameters=True)
        try:
            with nullcontext() if by_hand else _Rounded(moved):
                grads = other.vjp([moved(v) for v in base.cotangents])
        except (ForwardRaised, BackwardRaised):
            return [float("inf")] * len(found)
        for i, (g, e) in enumerate(zip(grads, base.grads, strict=True)):
            found[i] = max(found[i], rounded_norm_error(g, e, floor))
    return found


class _Rounded(TorchDispatchMode):
    """Moves what every operation gives as one rounding would: Monte Carlo arithmetic.

    So what cancels between layers, as the sum over what a batch norm gives, counts as what it is.

    Source:
        D. S. Parker, B. Pierce and P. R. Eggert, "Monte Carlo arithmetic: how to gamble with floating point and win",
        Computing in Science & Engineering 2(4), 2000, doi:10.1109/5992.852391.
    """

    def __init__(self, moved: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.moved = moved

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view or func._schema.is_mutable:  # noqa: SLF001  # no public way to ask
            return result
        given = {t.untyped_storage().data_ptr() for t in tensors_in((args, kwargs))}
        for t in tensors_in(result):
            if t.is_floating_point() and t.untyped_storage().data_ptr() not in given:
                t.copy_(self.moved(t))
        return result


def terms(case: Case) -> float:
    """Return a size below which a gradient is the rest of a cancellation: a third of grad_output's norm."""
    return 0.3 * max((float(v.double().norm()) for v in case.plain.cotangents), default=0.0)


def rounded_norm_error(got: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Return ‖got - expected‖ / max(‖expected‖, floor); 0 where both are zero, infinite where only the latter is.

    A gradient that cancels to nothing is rounded at the size of its terms: ``floor`` stands for them. One that cancels
    altogether, like that of a bias before a batch norm, holds rounding only, and no error.
    """
    g, e = got.detach().double(), expected.detach().double()
    if g.numel() == 0:
        return 0.0
    size, off = max(float(e.norm()), floor), float((g - e).norm())
    eps = torch.finfo(expected.dtype).eps
    if float(e.norm()) < 2**14 * eps * floor:
        return 0.0
    if off != off:  # noqa: PLR0124  # NaN on both sides agrees
        return 0.0 if bool((g.isnan() == e.isnan()).all()) else float("inf")
    return off / size if size > 0 else (0.0 if off == 0 else float("inf"))
