"""Fourteenth set: faults as people reported them, in the order in which they were found, and ordinary first drafts.

A `bug` that names a repository and a number is a report, rebuilt small; the others are drafts. `trigger` says in which
situation the gradient is wrong. A factory builds a public function from its Function, so a wrong function and its right
twin have one signature and one docstring. Every one computes in float32 or wider, and returns the type of its first
tensor of floats; under autocast it returns float32.
"""

from functools import wraps

import torch

from tests.device import DEVICE
from tests.verify.unseen import FOURTEENTH, pair
from tests.verify.unseen.twelfth import wide


def floats(a):
    return isinstance(a, torch.Tensor) and a.is_floating_point()


def require(condition, text):
    if not condition:
        raise ValueError(text)


def computed_wide(function, takes_complex=False):
    """Return the function as it computes: in float32 if its inputs are narrower; they are real."""

    @wraps(function)
    def call(*args, **kwargs):
        complex_too = any(isinstance(a, torch.Tensor) and a.is_complex() for a in args)
        require(takes_complex or not complex_too, "the inputs must be real")
        dtype = next(filter(floats, (*args, *kwargs.values())), torch.empty(0)).dtype
        if torch.is_autocast_enabled(DEVICE):
            dtype = torch.promote_types(dtype, torch.float32)
        args = [wide(a) if floats(a) else a for a in args]
        kwargs = {name: wide(a) if floats(a) else a for name, a in kwargs.items()}
        with torch.autocast(DEVICE, enabled=False):
            out = function(*args, **kwargs)
        if isinstance(out, tuple):
            return tuple(a.to(dtype) if floats(a) else a for a in out)
        return out.to(dtype) if floats(out) else out

    return call


def add(name, factory, wrong, right, make, *, bug, trigger, takes_complex=False, missed=""):
    text = f"{bug}; shows with {trigger}"
    wrong, right = (computed_wide(factory(f), takes_complex) for f in (wrong, right))
    pair(f"{name}_14", wrong, right, make, text, into=FOURTEENTH, missed=missed)
