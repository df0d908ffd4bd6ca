"""Leaves that torch's own ops read, and note nothing of: written to, or their data exchanged, at the wrong moment."""

import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import torchbp
import torchbp.functional as F
from tests.recompute.compared import both, same
from torchbp.recompute import _leaves
from torchbp.recompute._kept import Share

pytestmark = pytest.mark.filterwarnings("ignore:lean_scope")


def write(leaf):
    with torch.no_grad():
        leaf.mul_(1.25)


def gradients(f, scope):
    """Return the gradients of four steps of ``f``; its leaf has been written to before, as by an initialization."""
    torch.manual_seed(0)
    w, leaf = torch.randn(8, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    write(leaf)
    return [torch.autograd.grad(f(w, leaf, scope).sum(), w)[0] for _ in range(4)]


def made_before_the_scope(w, leaf, scope):
    y = torch.add(leaf, torch.ones(3, 8, requires_grad=True))
    write(leaf)
    with scope():
        return F.linear(y, w)


def made_in_the_scope_before(w, leaf, scope):
    with scope():
        y = F.gelu(F.linear(torch.ones(3, 8), w)) + leaf
    write(leaf)
    with scope():
        return F.linear(y, w)


def made_in_the_scope_around(w, leaf, scope):
    with scope():
        y = F.gelu(F.linear(torch.ones(3, 8), w)) + leaf
        write(leaf)
        with scope():
            return F.linear(y, w)


def made_while_another_thread_opens_one(w, leaf, scope):
    def other():
        with torchbp.lean_scope():
            pass

    with scope():
        y = F.gelu(F.linear(torch.ones(3, 8), w)) + leaf
        write(leaf)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return F.linear(y, w)


def number_of_before_the_scope(w, leaf, scope):
    number = torch.tensor(2.0)
    y = torch.ones(3, 8, requires_grad=True) * number
    number.mul_(2)
    with scope():
        return F.linear(y, w)


@pytest.mark.parametrize(
    "f",
    [
        made_before_the_scope,
        made_in_the_scope_before,
        made_in_the_scope_around,
        made_while_another_thread_opens_one,
        number_of_before_the_scope,
    ],
    ids=lambda f: f.__name__,
)
def test_written_to_before_what_it_made_is_kept(f):
    same(gradients(f, torchbp.lean_scope), gradients(f, nullcontext))


@pytest.mark.parametrize("written", [False, True])
def test_met_first_what_is_made_of_it_is_kept_then_it_is_looked_after(written):
    torch.manual_seed(0)
    x, w = torch.randn(16, 8), torch.randn(8, 8, requires_grad=True)
    position = nn.Parameter(torch.randn(8))
    write(position)

    def gradient(scope):
        with scope():
            y = F.gelu(F.linear(x, w)) + position
            if written:
                write(position)
            z = F.linear(y, w)
        shared = type(z.grad_fn._raw_saved_tensors[0].data) is Share
        return shared, torch.autograd.grad(z.sum(), w)[0]

    for step in range(3):
        before = position.detach().clone()
        shared, got = gradient(torchbp.lean_scope)
        position.data = before
        _, want = gradient(nullcontext)
        assert torch.equal(got, want)
        assert shared == (step > 0 and not written)


def test_another_leaf_with_the_same_identity(monkeypatch):
    """Of one that is gone: no version is its."""
    leaf, other = (torch.randn(8, requires_grad=True) for _ in range(2))
    write(leaf)
    write(other)
    with torchbp.lean_scope():
        node = (leaf + 0).grad_fn
        assert not _leaves.is_as_read(other, node, measures=False)
    with torchbp.lean_scope():
        node = (leaf + 0).grad_fn
        assert _leaves.is_as_read(other, node, measures=False)
        noted = _leaves._scope.versions
        noted[id(leaf)] = noted[id(other)]
        assert not _leaves.is_as_read(leaf, node, measures=False)


def test_leaves_that_are_gone_are_forgotten():
    def met():
        leaf = torch.randn(8, requires_grad=True)
        write(leaf)
        with torchbp.lean_scope():
            assert not _leaves.is_as_read(leaf, (leaf + 0).grad_fn, measures=False)
        assert id(leaf) in _leaves._met
        with torchbp.lean_scope():
            assert id(leaf) in _leaves._scope.versions
        return id(leaf)

    key = met()
    with torchbp.lean_scope():
        assert key not in _leaves._met
        assert key not in _leaves._scope.versions


class Shifted(nn.Module):
    """A norm whose parameter no backward reads."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return F.layer_norm(x, (8,), None, self.bias)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("when", ["before backward", "while its layer does not run"])
def test_data_exchanged(when):
    """As by who moves parameters, or shards them: backward gets the data that there are then, as without lean."""
    layers = [nn.Linear(8, 8), nn.LayerNorm(8, bias=False), nn.GELU(), nn.Linear(8, 8), Shifted()]
    results = []
    for model in both(nn.Sequential(*layers, nn.Linear(8, 8))):
        whole = {p: p.data.clone() for p in model.parameters()}

        def gather(layer, *_args, whole=whole):
            for p in layer.parameters(recurse=False):
                p.data = whole[p].clone()

        def free(layer, *_args):
            for p in layer.parameters(recurse=False):
                p.data = torch.empty(0)

        if when != "before backward":
            for layer in model:
                layer.register_forward_pre_hook(gather)
                layer.register_forward_hook(free)
                layer.register_full_backward_pre_hook(gather)
        for _ in range(2):
            value = model(torch.linspace(0, 1, 24).view(3, 8)).square().sum()
            for p in model.parameters():
                p.grad = None
                if when == "before backward":
                    p.data = whole[p] * 1.5
            value.backward()
            results.append([p.grad for p in model.parameters()])
            for p in model.parameters():
                p.data = whole[p]
    same(results[2], results[0])
    same(results[3], results[1])
