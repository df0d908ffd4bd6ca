"""Thirty-seventh set: rebuilt small from fifty public bug reports that no earlier set holds.

The reports came from fifty-one queries written down beforehand, on graph, rendering, attention, probability, physics
and teaching libraries and on autodiff in other languages; each query's first ones that tell of a wrong gradient were
taken. `bug` names project and number; facts were carried over, neither code nor sentences. Where the report says too
little, the likeliest fault was built. `trigger` says in which situation the gradient is wrong.
"""

from functools import partial

import torch

from tests.verify.unseen import THIRTYSEVENTH, twentieth
from tests.verify.unseen.thirtyfourth import alike
from tests.verify.unseen.twentieth import check, indices, same, sized
from tests.verify.unseen.twentyfirst import positive
from tests.verify.unseen.twentyninth import bounded

__all__ = [
    "add",
    "alike",
    "bounded",
    "check",
    "indices",
    "memory",
    "number",
    "positive",
    "same",
    "sized",
    "tame",
]

add = partial(twentieth.add, into=THIRTYSEVENTH, ending="37")


def tame(bound=1e3, **tensors):
    """Refuse several types, large numbers, and NaN."""
    alike(*tensors.values())
    for name, t in tensors.items():
        bounded(name, t, -bound, bound)


def memory(g):
    """Return what a kernel reads that takes g to be contiguous; beyond the memory's end it reads 0."""
    if g.is_contiguous():
        return g
    size = g.untyped_storage().nbytes() // g.element_size() - g.storage_offset()
    read = g.as_strided((min(size, g.numel()),), (1,))
    flat = g.new_zeros(g.numel())
    flat[: len(read)] = read
    return flat.view(g.shape)


def number(x):
    """Return one float64 number that wants a gradient."""
    return torch.tensor(x, dtype=torch.float64, requires_grad=True)
