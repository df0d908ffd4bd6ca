"""Parametrises the generic tests: ``op`` is every op, ``sample`` every sample of every op; ids are names."""

from functools import cache

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from tests import device
from torchbp.ops._op import Op, all_ops
from torchbp.ops._samples import Make, Sample, one_tensor, over_tensors

HALF = (torch.bfloat16, torch.float16)


def make(dtype: torch.dtype = torch.float64) -> Make:
    """Return what makes samples where the tests compute."""
    return Make(dtype, device.DEVICE)


def twin(cls):
    """Return torch's class of the name, or the class itself where torch has none."""
    return getattr(torch.nn, cls.__name__, cls)


class Case:
    """One sample of one op, made anew in any dtype; ``reference`` is torch's function on the same arguments.

    A random op is made a function by seeding it at each call. Its reference draws the same after the same seed; where
    it declares none, it multiplies by what the same seed draws over ones. So it is independent of what the op does to
    its values, gradients included.
    """

    def __init__(self, op: Op, index: int, name: str = "") -> None:
        self.op, self.index, self.name = op, index, name

    def __repr__(self) -> str:
        return f"{self.op.name}-{self.name or self.index}"

    def sample(self, dtype=torch.float64) -> Sample:
        return list(self.op.samples(make(dtype)))[self.index]

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


def cases_of(op: Op) -> list[Case]:
    """Return each sample of one op."""
    return [Case(op, i, s.name) for i, s in enumerate(op.samples(Make()))]


def drawn(shape, dtype=torch.float64, seed: int = 7) -> torch.Tensor:
    """Return normal values, the same on every device, whatever was drawn before; not those of Make."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(device.DEVICE, dtype)


def constructed_on_device(constructed):
    """Return a Module, made where the tests compute, and a sample of its inputs."""
    op, i = constructed
    cls, ctor, inputs = list(op.module_samples(make(torch.float32)))[i]
    return cls(*ctor.args, **ctor.kwargs).to(device.DEVICE), inputs


def torchs(op: Op):
    """Return torch's function of the op's name, or the reference where torch has none."""
    return op.torchs or op.reference


def changed(value, change):
    """Return an output or input, nested or packed, with ``change`` applied to each of its floating-point tensors."""
    return over_tensors(lambda t: change(t) if t.is_floating_point() else t, value)


def tensors_of(value) -> list[torch.Tensor]:
    """Return the floating-point tensors of an output or input, nested or packed."""
    return [t for t in Sample((value,)).tensors() if t.is_floating_point()]


@cache
def _cases() -> list[list[Case]]:
    """Return every sample of each op."""
    return [cases_of(op) for op in all_ops().values()]


@cache
def _params(few: int) -> list:
    """Return the test's parameters; slow are all but ``few`` samples of each op, evenly taken from all."""
    found = []
    for cases in _cases():
        taken = {round(k * (len(cases) - 1) / (few - 1)) for k in range(few)}
        for case in cases:
            marks = [] if len(cases) <= few or case.index in taken else [pytest.mark.slow]
            found.append(pytest.param(case, id=repr(case), marks=marks))
    return found


@cache
def _constructed(few: int | None = None) -> list:
    """Return every Module of each op; slow are all but the first ``few`` of each."""
    return [
        pytest.param(
            (op, i),
            id=f"{cls.__name__}-{x.name or i}",
            marks=[] if few is None or i < few else [pytest.mark.slow],
        )
        for op in all_ops().values()
        for i, (cls, _, x) in enumerate(op.module_samples(Make()))
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "op" in metafunc.fixturenames:
        metafunc.parametrize("op", all_ops().values(), ids=repr)
    heavy = metafunc.definition.get_closest_marker("heavy") is not None
    if "case" in metafunc.fixturenames:  # every sample
        metafunc.parametrize("case", _params(2 if heavy else 6))
    if "first" in metafunc.fixturenames:  # the first sample of each op: for what is slow
        metafunc.parametrize("first", [cases[0] for cases in _cases()], ids=repr)
    if "constructed" in metafunc.fixturenames:
        metafunc.parametrize("constructed", _constructed(1 if heavy else None))
    if "wrong" in metafunc.fixturenames:
        wrong = [
            pytest.param((op, i), id=f"{op.name}-{s.name}")
            for op in all_ops().values()
            for i, s in enumerate(op.errors(Make()))
        ]
        metafunc.parametrize("wrong", wrong)
