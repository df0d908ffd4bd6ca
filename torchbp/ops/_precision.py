"""How far an op's gradient is from the true one, in units in the last place, found by running it beside torch's.

The truth is the gradient in float64 of the same numbers: of inputs and an incoming gradient as the dtype holds them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import signature, unwrap
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from torchbp.ops._op import Op
from torchbp.ops._samples import EDGES, Make, Sample, one_tensor

__all__ = ["EACH", "Errors", "measure", "ulps"]

EACH = 1 << 16  # elements of a sample: some formulas take N · C² numbers


@dataclass(frozen=True)
class Errors:
    """Errors of a gradient's values, pooled.

    Attributes:
        mean: Mean error in ulps.
        tail: The 99.9th percentile of the error in ulps.
        values: How many values were compared.
        broken: How many of them are infinite or NaN although the truth is a number that the dtype can hold.
    """

    mean: float
    tail: float
    values: int
    broken: int


def measure(
    op: Op, dtype: torch.dtype, values: int, device: str = "cpu", *, each: int = EACH
) -> tuple[Errors, Errors | None]:
    """Return the errors of ``op``, and of torch's function on the same inputs.

    Torch's is the function of that name, or the composition of its ops that is the op's reference; ``None`` where it
    has nothing in this dtype, or another gradient. A quarter of the values are edges: single ones (:data:`EDGES`,
    magnitudes from 1e-30 to 1e30) for elementwise ops, eight times as large inputs for others.

    Samples have at most ``each`` elements: where kernels of this package ask for more, they do not run.

    Left out are values so small that float64 itself does not know them: torch's 1 - tanh² is 0 where it is below 1e-16.

    Raises:
        LookupError: The op draws random numbers and mixes elements: in float64 it would draw others.
    """
    # A composition as one writes it, rounded at each step.
    composed = unwrap(op.reference) if op.reference else None
    theirs = None if op.other_gradient else op.torchs or composed
    pools: dict[Callable[..., Any], list[Tensor]] = {f: [] for f in (op.function, theirs) if f}
    for sample, v in _draws(op, dtype, values, device, each):
        for function in list(pools):
            try:
                found = _gradients(function, sample, v)
            except (RuntimeError, NotImplementedError):  # torch has it not in this dtype
                if function is op.function:
                    raise
                del pools[function]
                continue
            exact = _exact(op, function, sample, v)
            for a, b in zip(found, exact, strict=True):
                scale = v.double().abs() if op.elementwise else b.square().mean().sqrt()
                known = (b.abs() > 64 * _EPS64 / torch.finfo(dtype).eps * scale) & b.isfinite()
                known &= b.abs() <= torch.finfo(dtype).max
                floor = 0.0 if op.elementwise else scale * _SMALL
                pools[function].append(ulps(a, b, dtype, floor)[known])
    others = pools.get(theirs) if theirs else None
    return _pooled(pools[op.function]), _pooled(others) if others else None


def _exact(op: Op, function: Callable[..., Any], sample: Sample, v: Tensor) -> list[Tensor]:
    """Return the true gradients, in float64.

    Of a random op those for what ``function`` itself draws: v times its slopes, rounded to what they are in float64
    where they are no more than a few, as in dropout.
    """
    wide = _widened(sample)
    if not op.random:
        truth = op.function if op.other_gradient else op.reference or op.torchs
        return _gradients(truth or op.function, wide, v)
    ones = torch.ones_like(v)
    slopes = [g.double() for g in _gradients(function, sample, ones)]
    values = torch.cat([g.unique() for g in _gradients(function, wide, ones)])
    if values.numel() > 4 and not op.elementwise:
        message = f"{op.name}: expected a function of single elements, or no draws, got both a mixture and draws"
        raise LookupError(message)
    if values.numel() <= 4:
        slopes = [values[(g[..., None] - values).abs().argmin(-1)] for g in slopes]
    return [g * v.double() for g in slopes]


_EPS64 = torch.finfo(torch.float64).eps
_SMALL = 2.0**-8


def ulps(found: Tensor, exact: Tensor, dtype: torch.dtype, floor: Tensor | float = 0.0) -> Tensor:
    """Return |found - exact| in units in the last place that ``dtype`` has at ``exact``; ∞ where found is no number.

    An infinity is none where the exact value, rounded, is that infinity.

    Args:
        found: A gradient.
        exact: The true one, float64.
        dtype: Whose units.
        floor: Smaller values count in units of this one: where terms cancel, the unit is theirs, not that of the rest.
    """
    limits = torch.finfo(dtype)
    magnitude = exact.abs().clamp(min=floor).clamp(min=limits.smallest_normal)
    unit = torch.exp2(magnitude.log2().floor()) * limits.eps
    error = (found.double() - exact).abs() / unit
    beyond = found.isinf() & (found == exact.to(dtype))
    return torch.where(found.isfinite(), error, torch.where(beyond, 0.0, torch.inf))


def _pooled(errors: list[Tensor]) -> Errors:
    together = torch.cat(errors)
    finite = together[together.isfinite()]
    place = max(1, round(0.999 * finite.numel()))
    return Errors(
        finite.mean().item(),
        finite.kthvalue(place).values.item(),
        together.numel(),
        together.numel() - finite.numel(),
    )


def _draws(
    op: Op, dtype: torch.dtype, values: int, device: str, each: int
) -> Iterator[tuple[Sample, Tensor]]:
    """Yield samples of all in all about ``values`` elements, each with an incoming gradient."""
    each = min(values // 4, each)
    for k in range(values // each):
        make = Make(dtype, device, seed=k, fine=True)
        sample = op.benchmark(make, each)
        if (
            "reduction" in signature(op.function).parameters
        ):  # a mean's gradients would vanish in float16
            sample = Sample(sample.args, {**sample.kwargs, "reduction": "sum"})
        if k % 4 == 3:
            sample = _at_edges(op, sample, make)
        y = one_tensor(op.function(*sample.args, **sample.kwargs))
        v = make.normal(*y.shape, requires_grad=False).to(y.dtype)
        yield sample, v


def _at_edges(op: Op, sample: Sample, make: Make) -> Sample:
    x, *rest = sample.args
    wide = x.detach()
    if op.elementwise:
        powers = make.uniform(*x.shape, low=-30, high=30).double()
        wide = (torch.sign(wide) * 10**powers).to(make.dtype)
        large = 10 * make.normal(*x.shape, requires_grad=False)
        wide = torch.where(powers.abs() < 10, large, wide)
        wide.view(-1)[: len(EDGES)] = wide.new_tensor(EDGES)
    elif (wide < 0).any():  # no probabilities
        wide = 8 * wide
    return Sample((wide.requires_grad_(x.requires_grad), *rest), sample.kwargs)


def _widened(sample: Sample) -> Sample:
    def wide(t: Tensor) -> Tensor:
        return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t

    return sample.over_tensors(wide)


def _gradients(function: Callable[..., Any], sample: Sample, v: Tensor) -> list[Tensor]:
    leaves, _ = tree_flatten((sample.args, sample.kwargs))
    live = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    torch.manual_seed(0)
    y = one_tensor(function(*sample.args, **sample.kwargs))
    return list(torch.autograd.grad(y, live, v.to(y.dtype)))
