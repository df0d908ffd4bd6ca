"""Sixteenth set: the mistake most likely in a first backward written by hand, one for each of sixty functions.

The functions were drawn by lot from a list of 95 that people write backwards for, then the mistake was chosen. `shows`
says in which situation the gradient is wrong. A factory builds a public function from its Function, so a wrong function
and its right twin have one signature and one docstring. Under autocast, and of half precision, every one computes in
float32; of half precision it returns its inputs' dtype.
"""

from functools import reduce, wraps

import torch

from tests.device import DEVICE
from tests.verify.unseen import SIXTEENTH, pair
from tests.verify.unseen.twelfth import in_float32, wide


def narrow(a):
    return isinstance(a, torch.Tensor) and a.dtype in (torch.float16, torch.bfloat16)


def in_half(function):
    """Return the function as it computes of half precision: in float32, its outputs cast back."""

    @wraps(function)
    def call(*args, **kwargs):
        given = [
            a
            for a in (*args, *kwargs.values())
            if isinstance(a, torch.Tensor) and a.is_floating_point()
        ]
        if torch.is_autocast_enabled(DEVICE) or not any(map(narrow, given)):
            return function(*args, **kwargs)
        dtype = reduce(torch.promote_types, (a.dtype for a in given))
        args = [wide(a) if narrow(a) else a for a in args]
        out = function(*args, **{k: wide(a) if narrow(a) else a for k, a in kwargs.items()})
        return tuple(cast(a, dtype) for a in out) if isinstance(out, tuple) else cast(out, dtype)

    def cast(a, dtype):
        return a.to(dtype) if a.is_floating_point() else a

    return call


def expect(truth, rule, given):
    """Refuse what is outside; values, a truth that is a tensor, are not looked at in a compiled graph."""
    if isinstance(truth, torch.Tensor) and torch.compiler.is_compiling():
        return
    if not truth:
        raise ValueError(f"expected {rule}, got {given}")


def add(name, factory, wrong, right, make, *, bug, shows, kwargs=dict, missed=""):
    text = f"{bug}; shows with {shows}"
    wrong, right = (in_float32(in_half(factory(f))) for f in (wrong, right))
    pair(f"{name}_16", wrong, right, make, text, kwargs, into=SIXTEENTH, missed=missed)
