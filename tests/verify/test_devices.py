"""gradcheck keeps to the device of its inputs; no GPU is needed to see it."""

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import Function

import torchbp
from tests.pretended import Pretending, moved, pretend

pytestmark = pytest.mark.cpu("it pretends to be on a GPU")

# A Function's metadata know nothing of it.
SKIP = ("compile", "raw_gradients")


class Sine(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, *grads):
        (x,) = ctx.saved_tensors
        return x.cos() * grads[0]


class Clamped(Sine):
    @staticmethod
    def backward(ctx, *grads):
        (x,) = ctx.saved_tensors
        return x.cos() * grads[0].clamp(-1, 1)


class Rows(Sine):
    """Wrong for more rows than 32: what is said of the cause looks at the inputs' values."""

    @staticmethod
    def backward(ctx, *grads):
        (x,) = ctx.saved_tensors
        g = x.cos() * grads[0]
        return torch.cat([g[:32], torch.zeros_like(g[32:])])


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def run(function, *inputs, **options):
    with pretend():
        report = torchbp.gradcheck(
            function, moved(inputs), skip=SKIP, raise_exception=False, **options
        )
    # Whatever a check meets, no device is part of it.
    met = [c.detail for c in report.capabilities.values() if "same device" in c.detail]
    assert not met
    return report


FUNCTIONS = {
    "a Function": (Sine.apply, normal(3, 4)),
    "half inside": (lambda x: Sine.apply(x.float()).double(), normal(3, 4)),
    "linear": (F.linear, normal(4, 3), normal(2, 3), normal(2)),
    "gelu": (torchbp.functional.gelu, normal(3, 4)),
    "layer_norm": (lambda x: torchbp.functional.layer_norm(x, (4,)), normal(3, 4)),
    "amax": (lambda x: x.amax(-1), normal(3, 4)),
    "float32": (torch.tanh, normal(3, 4, dtype=torch.float32)),
    "complex": (lambda x: x * x.conj(), normal(3, dtype=torch.complex128)),
}


QUICK = ("a Function", "amax")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in FUNCTIONS]
)
def test_right(name):
    function, *inputs = FUNCTIONS[name]
    report = run(function, *inputs)
    assert report, str(report)


@pytest.mark.parametrize("function", [Clamped, Rows])
def test_wrong(function):
    assert not run(function.apply, normal(3, 4))


def test_a_reference():
    assert run(torch.sigmoid, normal(3, 4), reference=lambda x: 1 / (1 + (-x).exp()))
    assert not run(torch.sigmoid, normal(3, 4), reference=torch.tanh)


class Pick(Function):
    """One element of each row, as a kernel would: forward counts negative places from the end, backward does not."""

    asked: ClassVar[list[tuple[bool, int]]] = []

    @staticmethod
    def look(x, i, lowest):
        within = lowest <= int(i.min()) and int(i.max()) < x.shape[1]
        if x.is_cuda:
            Pick.asked.append((within, x.shape[1]))
        elif not within:
            raise IndexError("index out of range")
        return (i % x.shape[1])[:, None] == torch.arange(x.shape[1], device=x.device)

    @staticmethod
    def forward(ctx, x, i):
        ctx.save_for_backward(x, i)
        return (x * Pick.look(x, i, -x.shape[1])).sum(1)

    @staticmethod
    def backward(ctx, *grads):
        x, i = ctx.saved_tensors
        return grads[0][:, None] * Pick.look(x, i, 0), None


def test_no_wild_index_is_given_to_a_gpu(monkeypatch):
    """There it would end the process: what a check tries is asked on the CPU before."""
    inner = Pick.backward

    def backward(ctx, *grads):  # a hook, where torch has switched the pretence off
        with Pretending():
            return inner(ctx, *grads)

    monkeypatch.setattr(Pick, "backward", staticmethod(backward))
    inputs = moved((normal(4, 3), torch.tensor([0, 2, 1, 0])))
    with pretend():
        assert torchbp.gradcheck(
            Pick.apply, inputs, checks=["sizes", "batch_dimension", "ignored_index", "indices"]
        )
        x, i = inputs
        assert torchbp.gradcheck(lambda t: Pick.apply(t, i), (x,), checks=["values", "sizes"])
    assert len({classes for _, classes in Pick.asked}) > 1, "no other size was tried"
    assert all(within for within, _ in Pick.asked)


def test_no_wild_probability_is_given_to_a_gpu():
    """Where a kernel of torch's asserts that there is none."""
    asked = []

    def cross_entropy(p, t):
        if not p.is_cuda:
            return F.binary_cross_entropy(p, t)
        if not torch._C._functorch.is_functorch_wrapped_tensor(p):
            asked.append(bool(((p >= 0) & (p <= 1)).all()))
        return -(t * p.clamp(1e-44).log() + (1 - t) * (1 - p).clamp(1e-44).log()).mean()

    p, t = (torch.rand(3, 4, dtype=torch.float64).mul(0.8).add(0.1).requires_grad_() for _ in "pt")
    assert run(cross_entropy, p, t)
    assert len(asked) > 20
    assert all(asked)
