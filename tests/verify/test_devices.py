"""gradcheck keeps to the device of its inputs; no GPU is needed to see it."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import Function

import torchbp
from tests.pretended import moved, pretend

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


def test_no_wild_index_is_given_to_a_gpu():
    """There it would end the process: what a check tries is asked on the CPU before."""
    asked = []

    def pick(x, i):
        low, high, classes = int(i.min()), int(i.max()), x.shape[1]
        if x.is_cuda:
            asked.append((low, high, classes))
        elif low < 0 or high >= classes:
            raise IndexError("index out of range")
        chosen = i[:, None] == torch.arange(classes, device=x.device)
        return (x * chosen).sum(1)

    inputs = moved((normal(4, 3), torch.tensor([0, 2, 1, 0])))
    with pretend():
        assert torchbp.gradcheck(
            pick, inputs, checks=["sizes", "batch_dimension", "ignored_index", "indices"]
        )
    assert len({classes for *_, classes in asked}) > 1, "no other size was tried"
    assert all(low >= 0 and high < classes for low, high, classes in asked)
