"""Twentieth set: kernels' wrappers and Functions as public repositories ship them, each with one fault, rebuilt small.

Where the fault was found in a repository, `bug` names it; facts were carried over, neither code nor sentences.
`trigger` says in which situation the gradient is wrong: most are right at the sample with ones as grad_output.
"""

from functools import wraps

import torch

from tests.verify.unseen import TWENTIETH, outside_autocast, pair

HALF = (torch.float16, torch.bfloat16)


def add(
    name,
    factory,
    make,
    *,
    bug,
    trigger="the sample",
    kwargs=dict,
    missed="",
    own=False,
    into=TWENTIETH,
    ending="20",
):
    """Add the pair that the factory makes; ``own`` says that the functions take half types themselves."""
    text = f"{bug}; shows with {trigger}"
    wrong, right = (outside_autocast(real_only(factory(w))) for w in (True, False))
    if not own:
        wrong, right = widened(wrong), widened(right)
    pair(f"{name}_{ending}", wrong, right, make, text, kwargs, into=into, missed=missed)


def add_bare(
    name, factory, make, *, bug, trigger="the sample", kwargs=dict, missed="", into, ending
):
    """Add a pair as it is: Modules, functions of complex tensors or several dtypes, functions under autocast."""
    text = f"{bug}; shows with {trigger}"
    made = factory(True), factory(False)
    pair(f"{name}_{ending}", *made, make, text, kwargs, into=into, missed=missed)


def real_only(function):
    @wraps(function)
    def call(*args, **kwargs):
        for a in args:
            if isinstance(a, torch.Tensor) and a.is_complex():
                raise TypeError(f"expected real tensors, got {a.dtype}")
        return function(*args, **kwargs)

    return call


def widened(function):
    """Return the function that computes in float32 where a tensor is of a half type."""

    @wraps(function)
    def call(*args, **kwargs):
        floats = [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
        if not any(t.dtype in HALF for t in floats):
            return function(*args, **kwargs)
        dtype = floats[0].dtype
        for t in floats[1:]:
            dtype = torch.promote_types(dtype, t.dtype)
        y = function(*(wide(a) for a in args), **kwargs)
        return tuple(t.to(dtype) for t in y) if isinstance(y, tuple) else y.to(dtype)

    return call


def wide(a):
    return a.float() if isinstance(a, torch.Tensor) and a.dtype in HALF else a


def check(ok, rule):
    if not ok:
        raise ValueError(rule)


def finite(**tensors):
    """Refuse infinities and NaN."""
    for name, t in tensors.items():
        check(bool(t.isfinite().all()), f"{name}: expected finite numbers")


def same(first, *others):
    """Refuse tensors of several shapes."""
    check(all(t.shape == first.shape for t in others), "expected tensors of one shape")


def sized(name, t, *shape):
    """Refuse a tensor of another shape; None stands for any size >= 1."""
    fits = t.ndim == len(shape) and all(
        n >= 1 if s is None else s == n for s, n in zip(shape, t.shape, strict=True)
    )
    check(fits, f"{name}: expected shape {shape}, got {tuple(t.shape)}")


def indices(name, t, below):
    """Refuse anything but integers from 0 to below - 1."""
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {t.dtype}")
    check(bool(((t >= 0) & (t < below)).all()), f"{name}: expected integers from 0 to {below - 1}")
