"""Nineteenth set: wrong gradients that people asked or wrote about, rebuilt small, in the order they were found.

Each `bug` names the place: questions and answers, forums, blog posts, courses and homework, not issues. `trigger`
says in which situation the gradient is wrong. None was left out for being easy or hard; left out was what nobody
explained there, what is not of the shape of a gradient and what an earlier entry shows already.
"""

import torch

from tests.verify.unseen import F64, NINETEENTH, pair
from tests.verify.unseen.twelfth import in_float32


def add(name, factory, wrong, right, make, *, bug, trigger="the sample", kwargs=dict, missed=""):
    text = f"{bug}; shows with {trigger}"
    wrong, right = in_float32(factory(wrong)), in_float32(factory(right))
    pair(f"{name}_19", wrong, right, make, text, kwargs, into=NINETEENTH, missed=missed)


def check(ok, rule):
    if not ok:
        raise ValueError(rule)


def same(first, *others):
    """Refuse tensors of several shapes."""
    check(all(t.shape == first.shape for t in others), "expected tensors of one shape")


def sized(name, t, *shape):
    """Refuse a tensor of another shape; None stands for any size."""
    fits = t.ndim == len(shape) and all(s in (None, n) for s, n in zip(shape, t.shape, strict=True))
    check(fits, f"{name}: expected shape {shape}, got {tuple(t.shape)}")


def uniform(*shape, low=0.0, high=1.0, seed=0, grad=True):
    t = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return (low + (high - low) * t).requires_grad_(grad)


def given(values, grad=True):
    """The numbers that a question gives."""
    return torch.tensor(values, dtype=F64, requires_grad=grad)
