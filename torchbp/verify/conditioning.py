"""How far rounding alone may move a gradient, measured on the function itself in float64."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchbp.verify.cases import Case
from torchbp.verify.raised import BackwardRaised, ForwardRaised
from torchbp.verify.source import functions
from torchbp.verify.tensors import graph, uniform

__all__ = ["in_dtype", "in_single", "rounded_norm_error", "spread", "terms"]

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
        generator = case.generator(f"rounding {number}")

        def moved(t: Tensor, generator: torch.Generator = generator) -> Tensor:
            if not t.is_floating_point():
                return t
            r = uniform(t.shape, generator).to(t)
            return t * (1 + eps * (2 * r - 1))

        other = case.variant(moved, parameters=True)
        try:
            leaves, outputs = other.graph()
            if not by_hand:
                _move_between(outputs, moved)
            grads = other.backward(outputs, leaves, [moved(v) for v in base.cotangents])
        except (ForwardRaised, BackwardRaised):
            return [float("inf")] * len(found)
        for i, (g, e) in enumerate(zip(grads, base.grads, strict=True)):
            found[i] = max(found[i], rounded_norm_error(g, e, floor))
    return found


def _move_between(outputs: Sequence[Tensor], moved: Callable[[Tensor], Tensor]) -> None:
    """Let the gradients be moved as well that one node of the graph hands to another: they are rounded, too.

    So what cancels between layers, as the sum over what a batch norm gives, counts as what it is.
    """
    own = {y.grad_fn for y in outputs}
    for node in graph(outputs):
        if node not in own and not hasattr(node, "variable"):
            node.register_prehook(
                lambda given: tuple(None if g is None else moved(g) for g in given)
            )


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
