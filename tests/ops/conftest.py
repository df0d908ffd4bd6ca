"""Parametrises the generic tests: ``op`` is every op, ``sample`` every sample of every op; ids are names."""

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from torchbp.ops._op import Op, all_ops
from torchbp.ops._samples import Make, Sample, one_tensor, over_tensors

HALF = (torch.bfloat16, torch.float16)


def twin(cls):
    """Return torch's class of the name, or the class itself where torch has none."""
    return getattr(torch.nn, cls.__name__, cls)


class Case:
    """One sample of one op, made anew in any dtype; ``reference`` is torch's function on the same arguments.

    A random op is made a function by seeding it at each call. Its reference draws the same after the same seed; where
    it declares none, it multiplies by what the same seed draws over ones. So it is independent of what the op does to
    its values, gradients included.
    """

    def __init__(self, op: Op, index: int) -> None:
        self.op, self.index = op, index

    def __repr__(self) -> str:
        return f"{self.op.name}-{self.sample().name or self.index}"

    def param(self, few: int):
        """Return the test's parameter; slow but for ``few`` samples of each op, evenly taken from all."""
        count = len(list(self.op.samples(Make())))
        taken = {round(k * (count - 1) / (few - 1)) for k in range(few)}
        marks = [] if count <= few or self.index in taken else [pytest.mark.slow]
        return pytest.param(self, id=repr(self), marks=marks)

    def sample(self, dtype=torch.float64) -> Sample:
        return list(self.op.samples(Make(dtype)))[self.index]

    def function(self, *args, **kwargs):
        if self.op.random:
            torch.manual_seed(1)
        return one_tensor(self.op.function(*args, **kwargs))

    def reference(self, x, *args, **kwargs):
        if self.op.random:
            torch.manual_seed(1)
        if self.op.reference is not None:
            return one_tensor(self.op.reference(x, *args, **kwargs))
        return x * self.function(torch.ones_like(x), *args, **kwargs)

    def call(self, sample: Sample):
        return self.function(*sample.args, **sample.kwargs)

    def call_reference(self, sample: Sample):
        return self.reference(*sample.args, **sample.kwargs)

    def of_tensors(self, sample: Sample, function=None):
        """Return (f, tensors): ``f(*tensors)`` is the call as a function of its differentiable tensors alone."""
        function = function or self.function
        leaves, structure = tree_flatten((sample.args, sample.kwargs))
        slots = [i for i, a in enumerate(leaves) if isinstance(a, torch.Tensor) and a.requires_grad]

        def f(*tensors):
            filled = list(leaves)
            for i, t in zip(slots, tensors, strict=True):
                filled[i] = t
            args, kwargs = tree_unflatten(filled, structure)
            return one_tensor(function(*args, **kwargs))

        return f, tuple(leaves[i] for i in slots)


def with_args(sample: Sample, change) -> Sample:
    """Return the sample with ``change`` applied to each of its tensors."""
    return sample.over_tensors(change)


def torchs(op: Op):
    """Return torch's function of the op's name, or the reference where torch has none."""
    return op.torchs or op.reference


def changed(value, change):
    """Return an output or input, nested or packed, with ``change`` applied to each of its floating-point tensors."""
    return over_tensors(lambda t: change(t) if t.is_floating_point() else t, value)


def tensors_of(value) -> list[torch.Tensor]:
    """Return the floating-point tensors of an output or input, nested or packed."""
    return [t for t in Sample((value,)).tensors() if t.is_floating_point()]


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
        metafunc.parametrize("case", [c.param(few=2 if heavy else 6) for c in _cases()])
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
