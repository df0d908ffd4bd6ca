"""A chain of cheap ops is made again in one piece of memory: an op writes over what was made for it alone."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import torchbp
import torchbp.functional as F
from tests.recompute.compared import same
from torchbp.recompute._live import Live

CHAINS = {}


def chain(f):
    CHAINS[f.__name__] = f
    return f


def norm(h):
    return F.batch_norm(h, None, None, training=True)


@chain
def norm_relu(h, w):
    return F.relu(norm(h), inplace=True)


@chain
def norm_sum_relu(h, w):
    out = norm(h)
    out += h
    return F.relu(out, inplace=True)


@chain
def difference_of_product(h, w):
    return F.relu(F.silu(h) - h)


@chain
def leaky_norm(h, w):
    return F.leaky_relu(F.layer_norm(h, (64,)), 0.1)


def gradients(f, scope, units=None):
    torch.manual_seed(0)
    x, w = torch.randn(256, 64), torch.randn(64, 64, requires_grad=True)
    with scope():
        z = F.linear(f(F.linear(x, w), w), w)
    with Live(lambda: "", [x, w]) as live:
        if units is not None:
            saved = z.grad_fn._raw_saved_tensors[0].data
            tensor = saved.open()
            live.peak = live.now
            del tensor
            tensor = saved.open()
            assert not tensor.requires_grad
            units.append(live.peak / tensor.untyped_storage().nbytes())
    return torch.autograd.grad(z.sum(), w)


@pytest.mark.parametrize("f", CHAINS.values(), ids=CHAINS)
def test_one_piece_of_memory(f):
    units = []
    want = gradients(f, nullcontext)
    same(gradients(f, torchbp.lean_scope, units), want)
    assert 1 <= units[0] < 1.5


def outcome(f, scope):
    torch.manual_seed(0)
    x, w = torch.randn(16, 8), torch.randn(8, 8, requires_grad=True)
    row = torch.randn(8, requires_grad=True)
    with scope():
        z = f(F.linear(x, w), F.linear(row, w), w)
    return torch.autograd.grad(z.sum(), w)


def handed_on_of_what_is_kept(h, row, w):  # gradient_scale gives what it is given
    z = F.gelu(h)
    return z + F.linear(F.relu(F.gradient_scale(h, 0.5)), w)


def handed_on_twice(h, row, w):
    z = F.gelu(h)
    return z + F.linear(F.relu(F.gradient_scale(F.gradient_scale(h, 0.5), 2.0)), w)


def handed_on_of_what_two_need(h, row, w):
    y = F.gelu(h)
    z = F.linear(y, w) * F.linear(y, w)
    return z + F.linear(F.relu(F.gradient_scale(y, 0.5)), w)


def the_first_is_smaller(h, row, w):
    return F.linear(torch.sub(F.gelu(row), F.silu(h)), w)


def the_second_is_smaller(h, row, w):
    return F.linear(torch.sub(F.gelu(h), F.silu(row)), w)


def of_two_dtypes(h, row, w):
    return F.linear(torch.mul(F.gelu(h), F.silu(h.double())), w.double())


@pytest.mark.parametrize(
    "f",
    [
        handed_on_of_what_is_kept,
        handed_on_twice,
        handed_on_of_what_two_need,
        the_first_is_smaller,
        the_second_is_smaller,
        of_two_dtypes,
    ],
    ids=lambda f: f.__name__,
)
def test_only_memory_that_nobody_else_needs(f):
    same(outcome(f, torchbp.lean_scope), outcome(f, nullcontext))


def test_under_autocast():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(True), nn.Linear(8, 8))
    x = torch.randn(16, 8)
    got = []
    for model in (torchbp.convert(net), torchbp.lean(net)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.sum().backward()
        got.append([p.grad.clone() for p in net.parameters()])
    same(*got)
