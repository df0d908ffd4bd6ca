"""The monitor keeps to the model's device and waits for nothing there; no GPU is needed to see it."""

import numpy as np
import pytest
import torch
from torch import nn

import torchbp
from tests.pretended import Pretending, moved, pretend
from tests.trained import Cells, step
from torchbp.monitor import _backwards, _heard
from torchbp.tensorboard import read

F = nn.functional

pytestmark = pytest.mark.cpu("it pretends to be on a GPU")


def mlp(act):
    return nn.Sequential(nn.Linear(4, 8), act(), nn.Linear(8, 8), act(), nn.Linear(8, 4))


def convolutional():
    parts = [nn.Conv1d(6, 8, 3), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Flatten()]
    return nn.Sequential(*parts, nn.Linear(16, 4))


MODELS = {
    "relu": (lambda: mlp(nn.ReLU), (4,)),
    "tanh": (lambda: mlp(nn.Tanh), (4,)),
    "cells": (lambda: Cells(4, 8, 4), (6, 4)),
    "convolutional": (convolutional, (6, 4)),
}


@pytest.fixture
def gpu(monkeypatch):
    """Let the hooks pretend, too, and give them what only a GPU has."""

    def also(cls, name):
        inner = getattr(cls, name)

        def outer(*args, **kwargs):
            with Pretending():
                return inner(*args, **kwargs)

        monkeypatch.setattr(cls, name, outer)

    for name in ("_fire", "_first_end", "_end"):
        also(_backwards.Backwards, name)
    for name in ("delta", "times"):
        also(_heard.Heard, name)

    class Event:
        def __init__(self, *, blocking):
            assert blocking

        def record(self, stream):
            assert stream == "stream"

        def synchronize(self):
            pass

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)


QUICK = ("relu", "cells")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in MODELS]
)
def test_no_step_waits(name, gpu, tmp_path):
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make()
    for part in model.modules():
        for key, parameter in part.named_parameters(recurse=False):
            setattr(part, key, nn.Parameter(moved(parameter.data)))
        for key, buffer in part.named_buffers(recurse=False):
            setattr(part, key, moved(buffer))
    x, y = moved((torch.randn(16, *shape), torch.randint(4, (16,))))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with (
        pretend() as waits,
        torchbp.watch(model, optimizer, log_dir=tmp_path, share=None, sample_every=3) as monitor,
    ):
        for _ in range(60):
            monitor.log_loss(train=step(model, optimizer, x, y))
        assert waits == []
    norms = read(tmp_path).vectors["gradient_norm"].values
    assert norms.shape[0] == 60
    assert np.isfinite(norms).all()
    assert read(tmp_path).vectors["error_signal"].values.min() > 0
