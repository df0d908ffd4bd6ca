"""How often gradcheck calls a function: counted at the function, not read from the report."""

from functools import wraps

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchbp

COMPILE = ("compile",)


def leaf(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def lstm(i, f, g, o, c):
    return o.sigmoid() * (f.sigmoid() * c + i.sigmoid() * g.tanh()).tanh()


def normed_conv(x, w, b, scale, shift):
    y = F.conv1d(x, w, b)
    return F.rms_norm(y, y.shape[-1:], scale) + shift


def labelled(x, y):
    if bool(((y < 0) | (y > 1)).any()):
        raise ValueError("y: expected labels from 0 to 1")
    return F.binary_cross_entropy_with_logits(x, y, reduction="none")


def biased(x, w, b):
    if b.shape[0] not in (1, len(x)):
        raise ValueError("b: expected one, or one a sample")
    return (x @ w + b).tanh()


class Rounded(torch.autograd.Function):
    """To the nearest eighth: flat wherever it is smooth."""

    @staticmethod
    def forward(ctx, x):
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx, grad_y):
        return torch.zeros_like(grad_y)


ONE = (leaf(2, 3, 4), leaf(2, 4, 5, seed=1), leaf(1, 3, 5, seed=2))
FIVE = (leaf(2, 3, 6), leaf(4, 3, 3, seed=1), leaf(4, seed=2), leaf(4, seed=3), leaf(4, seed=4))
SAMPLES = {
    "one input": (torch.tanh, (leaf(3, 4),), 39, 86),
    "one vector": (torch.tanh, (leaf(5),), 39, 86),
    "one input, three dimensions": (lambda x: x.logsumexp(-1), (leaf(2, 3, 4),), 46, 98),
    "two inputs": (torch.mul, (leaf(3, 4), leaf(3, 4, seed=1)), 42, 89),
    "two matrices": (torch.mm, (leaf(3, 4), leaf(4, 5, seed=1)), 52, 92),
    "three inputs": (F.linear, (leaf(4, 5), leaf(3, 5, seed=1), leaf(3, seed=2)), 57, 102),
    "attention": (
        F.scaled_dot_product_attention,
        tuple(leaf(1, 2, 3, 4, seed=k) for k in range(3)),
        70,
        129,
    ),
    "five inputs": (lstm, tuple(leaf(3, 4, seed=k) for k in range(5)), 44, 91),
    "five inputs of other shapes": (normed_conv, FIVE, 66, 97),
    "loss with targets": (F.cross_entropy, (leaf(4, 3), torch.tensor([0, 2, 1, 1])), 65, 102),
    "Module": (lambda: nn.Linear(4, 3), (leaf(5, 4),), 50, 103),
    "Module with buffers": (lambda: nn.BatchNorm1d(4), (leaf(5, 4),), 63, 100),
    "Module, four parameters": (lambda: nn.GRUCell(3, 4), (leaf(5, 3),), 62, 100),
    # Kinks and poles near every sample: shorter steps are tried.
    "kinks": (F.l1_loss, (leaf(3, 4), leaf(3, 4, seed=1)), 63, 107),
    "hinges": (
        F.triplet_margin_with_distance_loss,
        tuple(leaf(3, 4, seed=k) for k in range(3)),
        66,
        107,
    ),
    "maxima": (lambda x: F.max_pool1d(x, 2), (leaf(2, 3, 6),), 53, 91),
    "sorting": (torch.msort, (leaf(3, 4),), 55, 97),
    "medians": (lambda x: x.median(-1).values, (leaf(3, 5),), 52, 102),
    "poles": (torch.tan, (leaf(3, 4),), 50, 92),
    "long sums": (torch.std, (leaf(3, 4),), 48, 87),
    # What rounding hides, what is at the end of the domain, what jumps, what no difference tells.
    "oscillations": (lambda x, w: (30 * x @ w).sin(), (leaf(3, 4), leaf(4, 2, seed=1)), 75, 109),
    "labels": (labelled, (leaf(3, 4), torch.eye(3, 4, dtype=torch.float64)), 65, 98),
    "one for all": (biased, ONE, 76, 122),
    "steps": (Rounded.apply, (leaf(3, 4),), 75, 78),
    "computed in float32": (lambda x: x.float().tanh().double(), (leaf(8, 8),), 69, 74),
    "second derivatives that are NaN": (torch.sinc, (leaf(3, 4),), 57, 105),
}


def counted(function):
    """Return ``function``, and a list that grows by one with every call of it."""
    calls = []
    if isinstance(function, nn.Module):
        function.register_forward_pre_hook(lambda *_: calls.append(1))
        return function, calls

    @wraps(function)  # with its signature, whose defaults are looked at
    def call(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return call, calls


@pytest.fixture(autouse=True, scope="module")
def warm():
    """Call once before: torch's own first call leaves a cycle, which is looked at a second time."""
    torchbp.gradcheck(torch.tanh, (leaf(3),), skip=COMPILE)


@pytest.mark.parametrize("name", SAMPLES)
def test_number_of_calls(name):
    function, inputs, forwards, backwards = SAMPLES[name]
    torch.manual_seed(0)
    function, calls = counted(function() if name.startswith("Module") else function)
    report = torchbp.gradcheck(function, inputs, skip=COMPILE)
    assert len(calls) == report.forwards
    assert 30 < report.forwards <= forwards
    assert 50 < report.backwards <= backwards


class Sine(torch.autograd.Function):
    """sin, which counts its calls; or, by a class beside it, a wrong one."""

    forwards = backwards = 0
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        Sine.forwards += 1
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_y):
        Sine.backwards += 1
        return grad_y * ctx.saved_tensors[0].cos()


class Cosine(Sine):
    @staticmethod
    def backward(ctx, grad_y):
        Sine.backwards += 1
        return grad_y * ctx.saved_tensors[0].sin()


@pytest.mark.parametrize(("level", "forwards", "backwards"), [("quick", 7, 35), ("full", 42, 90)])
@pytest.mark.parametrize("shape", [(3, 4), (20, 50), (200, 200)])
def test_number_of_calls_does_not_grow_with_the_size(level, forwards, backwards, shape):
    Sine.forwards = Sine.backwards = 0
    assert torchbp.gradcheck(Sine.apply, leaf(*shape), level=level, skip=COMPILE)
    assert 5 < Sine.forwards <= forwards
    assert 10 < Sine.backwards <= backwards


@pytest.mark.parametrize(("shape", "forwards"), [((3, 4), 68), ((8, 8), 173), ((20, 50), 48)])
def test_number_of_calls_where_the_gradient_is_wrong(shape, forwards):
    """Up to 64 elements each is moved alone, to say which are wrong."""
    Sine.forwards = 0
    report = torchbp.gradcheck(Cosine.apply, leaf(*shape), skip=COMPILE, raise_exception=False)
    assert not report
    assert Sine.forwards <= forwards
