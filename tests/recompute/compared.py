"""Runs the same thing with and without lean, and compares to the last bit."""

import copy
from contextlib import nullcontext

import torch

import torchbp
from torchbp.recompute import _graph, _scope
from torchbp.recompute._kept import Kept, Share


class Count:
    """Counts what the pack hook gives, and remembers nothing."""

    def __init__(self, monkeypatch):
        self.kept = self.shared = 0
        monkeypatch.setattr(_scope, "kept_or_share", self)

    def __call__(self, t, forward=None):
        item = _graph.kept_or_share(t, forward)
        if type(item) is Share:
            self.shared += 1
        else:
            assert type(item) is Kept
            self.kept += 1
        return item


def step(model, x, y, criterion, context=nullcontext):
    """Return loss and gradients of one step, drawn alike each time."""
    torch.manual_seed(1)
    with context():
        loss = criterion(model(x), y)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters()), *model.buffers()]


def same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert torch.equal(a.detach(), b.detach())


def both(model):
    """Return the model converted, and lean, from the same parameters."""
    return torchbp.convert(copy.deepcopy(model)), torchbp.lean(copy.deepcopy(model))
