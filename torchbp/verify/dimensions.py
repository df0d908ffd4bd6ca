"""Inputs of more dimensions than in the sample, where forward takes that on purpose: one number for each channel.

Only where the source speaks of it: what forward broadcasts by chance nobody promised.
"""

import inspect
import re
from collections.abc import Iterator

import torch
from torch import Tensor

from torchbp.verify.cases import Case
from torchbp.verify.resize import accepts
from torchbp.verify.source import speaks
from torchbp.verify.tensors import uniform
from torchbp.verify.tolerance import largest

__all__ = ["wider"]

EACH = re.compile(r"\bexpand\(|broadcast|\(\) or|scalar or|num_parameters|\(1,?\) or")


def wider(case: Case) -> Iterator[Case]:
    """Yield the case with inputs of more dimensions, where forward takes them and gives outputs of the same shape."""
    for other, batched in (*_one_each(case), *_more_rows(case)):
        if accepts(other) and _shapes(other) == _shapes(case, batched):
            yield other


def _one_each(case: Case) -> Iterator[tuple[Case, bool]]:
    """Yield the case with one number for each channel, or each feature, instead of one for all."""
    single = [i for i in case.where if i < case.size and case.flat[i].shape in ((), (1,))]
    shapes = [t.shape for _, t in case.arguments if t.dim() > 1]
    if not single or not shapes or not speaks(case, EACH):
        return
    most = max(shapes, key=len)
    for n in dict.fromkeys((most[1], most[-1])):
        if n > 1:
            yield (
                case.edited(lambda i, t, n=n: _apart(case, t.expand(n)) if i in single else t),
                False,
            )


def _more_rows(case: Case) -> Iterator[tuple[Case, bool]]:
    """Yield the case with a dimension more for the inputs, alike in shape, that the source asks for their number."""
    most = max((t for _, t in case.arguments), key=Tensor.dim, default=None)
    asked = _asked(case)
    for shape in dict.fromkeys(case.flat[i].shape for i in asked if i in case.where):
        k = len(shape)
        if most is None or not 0 < k < most.dim() or most.shape[-k:] != shape:
            continue
        batched = (
            most.dim() == k + 1
        )  # the rows of the sample are in one dimension: another before it
        rows = most.shape[-k - 1]

        new = {
            i: _apart(case, t.expand(rows, *shape))
            for i, t in case.arguments
            if t.shape == shape and t.is_floating_point()
        }
        if batched:
            alike = [(i, t) for i, t in case.arguments if t.shape == most.shape]
            new.update((i, torch.stack([t, t.roll(1, 0)])) for i, t in alike)
        yield case.edited(lambda i, t, new=new: new.get(i, t)), batched


def _asked(case: Case) -> list[int]:
    """Return the positions of the tensors whose number of dimensions the source asks for, by an argument's name."""
    try:
        given = case.bound(inspect.signature(case.func)).arguments
    except (TypeError, ValueError):
        return []
    return [
        i
        for i, t in case.arguments
        for name, x in given.items()
        if x is t and speaks(case, re.compile(rf"\b{name}\.(?:dim\(\)|ndim)"))
    ]


def _apart(case: Case, t: Tensor) -> Tensor:
    """Return ``t`` with its elements a little apart, so that what was one number is several."""
    r = uniform(t.shape, case.generator("wider")).to(t)
    return t * (1 + 0.25 * r) if largest(t) else t + 0.25 * r


def _shapes(case: Case, batched: bool = False) -> list[torch.Size]:
    return [torch.Size((2,) * batched + tuple(y.shape)) for y in case.all_outputs]
