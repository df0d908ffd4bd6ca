"""Eighteenth set: wrong gradients that somebody reported, rebuilt small and taken in the order they were found.

Each `bug` names the report: a repository and a number. `trigger` says in which situation the gradient is wrong. None
was left out for being easy or hard; left out was what cannot be written as a function of tensors (a race, an error that
is raised, an engine that accumulates wrongly) and what no report explains. A factory builds a public function from its
Function, so a wrong function and its right twin have one signature and one docstring.
"""

import torch
import torch.nn.functional as F

from tests.verify.unseen import EIGHTEENTH, F64, pair
from tests.verify.unseen.twelfth import in_float32


def add(name, factory, wrong, right, make, *, bug, trigger, kwargs=dict, missed=""):
    text = f"{bug}; shows with {trigger}"
    wrong, right = in_float32(factory(wrong)), in_float32(factory(right))
    pair(f"{name}_18", wrong, right, make, text, kwargs, into=EIGHTEENTH, missed=missed)


def uniform(*shape, low=0.0, high=1.0, seed=0, grad=True):
    t = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return (low + (high - low) * t).requires_grad_(grad)


def memory(t, shape=None):
    """What a kernel reads that takes t to be contiguous and of this shape; 0 past the end of the memory."""
    shape = t.shape if shape is None else shape
    count = shape.numel()
    held = t.untyped_storage().nbytes() // t.element_size() - t.storage_offset()
    read = torch.as_strided(t, (min(count, held),), (1,))
    return F.pad(read, (0, count - read.numel())).view(shape)


def sampling(place, size):
    """The matrix that interpolates linearly at the places (O,), each from 0 to size - 1."""
    low = place.floor().clamp(0, size - 1)
    part = place - low
    cell = torch.arange(size, device=place.device, dtype=place.dtype)
    high = (low + 1).clamp(max=size - 1)
    return (cell == low.unsqueeze(-1)) * (1 - part).unsqueeze(-1) + (
        cell == high.unsqueeze(-1)
    ) * part.unsqueeze(-1)
