"""Parametrises the generic tests: ``op`` is every op, ``sample`` every sample of every op; ids are names."""

import dataclasses

import pytest
import torch
from torch import Tensor

from torchbp.ops._op import Op, all_ops
from torchbp.ops._samples import Make, Sample

HALF = (torch.bfloat16, torch.float16)


def twin(cls):
    """Return torch's class of the name, or the class itself where torch has none."""
    return getattr(torch.nn, cls.__name__, cls)


class Case:
    """One sample of one op, made anew in any dtype; ``reference`` is torch's function on the same arguments.

    A random op is made a function by seeding it at each call, and its reference too. Where it has none, one multiplies
    by the mask that the same seed draws over ones: independent of what the op does to its values, gradients included.
    """

    def __init__(self, op: Op, index: int) -> None:
        self.op, self.index = op, index

    def __repr__(self) -> str:
        return f"{self.op.name}-{self.sample().name or self.index}"

    def sample(self, dtype=torch.float64) -> Sample:
        return list(self.op.samples(Make(dtype)))[self.index]

    def function(self, *args, **kwargs):
        if self.op.random:
            torch.manual_seed(1)
        return self.op.function(*args, **kwargs)

    def reference(self, x, *args, **kwargs):
        if self.op.reference is not None:
            if self.op.random:
                torch.manual_seed(1)
            return self.op.reference(x, *args, **kwargs)
        return x * self.function(torch.ones_like(x), *args, **kwargs)

    def call(self, sample: Sample):
        return self.function(*sample.args, **sample.kwargs)

    def call_reference(self, sample: Sample):
        return self.reference(*sample.args, **sample.kwargs)

    def of_tensors(self, sample: Sample, function=None):
        """Return (f, tensors): ``f(*tensors)`` is the call as a function of its differentiable tensors alone."""
        function = function or self.function
        slots = [i for i, a in enumerate(sample.args) if _differentiable(a)]
        names = [k for k, a in sample.kwargs.items() if _differentiable(a)]

        def f(*tensors):
            args, kwargs = list(sample.args), dict(sample.kwargs)
            for i, t in zip(slots, tensors, strict=False):
                args[i] = t
            kwargs |= dict(zip(names, tensors[len(slots) :], strict=True))
            return function(*args, **kwargs)

        return f, (*(sample.args[i] for i in slots), *(sample.kwargs[k] for k in names))


def _differentiable(a) -> bool:
    return isinstance(a, Tensor) and a.requires_grad


def with_args(sample: Sample, change) -> Sample:
    """Return the sample with ``change`` applied to each of its tensors."""

    def on(a):
        return change(a) if isinstance(a, Tensor) else a

    return dataclasses.replace(
        sample,
        args=tuple(map(on, sample.args)),
        kwargs={k: on(a) for k, a in sample.kwargs.items()},
    )


def _cases(one_each: bool = False) -> list[Case]:
    found = []
    for op in all_ops().values():
        count = len(list(op.samples(Make())))
        found += [Case(op, i) for i in range(1 if one_each else count)]
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "op" in metafunc.fixturenames:
        metafunc.parametrize("op", all_ops().values(), ids=repr)
    if "case" in metafunc.fixturenames:  # every sample
        heavy = metafunc.definition.get_closest_marker("heavy") is not None
        params = [
            pytest.param(c, id=repr(c), marks=[pytest.mark.slow] if heavy and c.index >= 3 else [])
            for c in _cases()
        ]
        metafunc.parametrize("case", params)
    if "first" in metafunc.fixturenames:  # the first sample of each op: for what is slow
        metafunc.parametrize("first", _cases(one_each=True), ids=repr)
    if "constructed" in metafunc.fixturenames:
        params = [
            (op, i)
            for op in all_ops().values()
            for i in range(len(list(op.module_samples(Make()))))
        ]
        ids = [
            f"{cls.__name__}-{x.name or i}"
            for op in all_ops().values()
            for i, (cls, _, x) in enumerate(op.module_samples(Make()))
        ]
        metafunc.parametrize("constructed", params, ids=ids)
    if "wrong" in metafunc.fixturenames:
        wrong = [
            (op, i, s.name) for op in all_ops().values() for i, s in enumerate(op.errors(Make()))
        ]
        metafunc.parametrize(
            "wrong", [w[:2] for w in wrong], ids=[f"{op.name}-{name}" for op, _, name in wrong]
        )
