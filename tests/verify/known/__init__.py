"""Wrong functions with right twins, which the checks were built on; every() registers them all.

Each `Pair` holds a wrong differentiable function and a correct twin. A validator is good when it flags every `wrong`
and passes every `right`. `make(dtype, seed)` is the sample an ordinary user would write: small, random, contiguous,
float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd import Function

F64 = torch.float64


@dataclass(frozen=True)
class Pair:
    name: str
    family: str
    bug: str
    trigger: str
    wrong: Callable
    right: Callable
    make: Callable
    gradcheck: bool  # whether torch.autograd.gradcheck catches it (torch 2.13, measured)
    reference: Callable | None = None  # a trusted function, or None: the twin is
    source: str = ""  # where it was reported
    needs_reference: bool = False  # forward and backward agree: only a reference can tell


PAIRS: dict[str, Pair] = {}


def register(name, family, wrong, right, make, *, bug, trigger, gradcheck=False, **more):
    if name in PAIRS:
        raise ValueError(f"register: expected a name of its own, got {name}; another pair has it")
    PAIRS[name] = Pair(name, family, bug, trigger, wrong, right, make, gradcheck, **more)


# ---------------------------------------------------------------------------------------------- samples
def rand(*shape, low=None):
    """Sample maker: one random tensor per shape; `low` shifts values away from zero."""

    def make(dtype=F64, seed=0):
        g = torch.Generator().manual_seed(seed)
        out = []
        for s in shape:
            t = torch.randn(s, generator=g, dtype=F64)
            if low is not None:
                t = t.abs() + low
            out.append(t.to(dtype).requires_grad_())
        return tuple(out)

    return make


def rand_labels(*shape, classes):
    """Sample maker for classification losses: logits and integer targets."""

    def make(dtype=F64, seed=0):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(*shape, classes, generator=g, dtype=F64).to(dtype).requires_grad_()
        return x, torch.randint(classes, shape, generator=g)

    return make


def raw(t, n):
    """What a kernel with hard-coded contiguous indexing reads: n consecutive elements from t's first
    address.  Reads past the end of the storage give zeros here (garbage on a real device).  Differentiable,
    so that double backward is as good or bad as first order."""
    there = min(n, t.untyped_storage().nbytes() // t.element_size() - t.storage_offset())
    return F.pad(t.as_strided((there,), (1,), t.storage_offset()), (0, n - there))


def entry(cls):
    """A callable for a Function that has a jvp: dynamo refuses those, so compile a subclass without it."""
    plain = type(cls.__name__ + "Compiled", (cls,), {"jvp": staticmethod(Function.jvp)})

    def fn(x):
        return (plain if torch.compiler.is_compiling() else cls).apply(x)

    return fn


def every():
    """Import the files, which register their pairs, and return these."""
    from tests.verify.known import (  # noqa: F401
        elementwise_pairs,
        further,
        hidden,
        kinks,
        limited,
        linear,
        losses,
        omitted,
        relatives_state,
        reported,
        varied,
    )

    return PAIRS
