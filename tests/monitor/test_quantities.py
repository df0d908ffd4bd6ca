"""What each quantity is, by plain torch; those that other tests need for their own point are held there."""

import types

import numpy as np
import pytest
import torch
from torch import nn

import torchbp
from torchbp.monitor import _monitor, capture
from torchbp.monitor._registry import all_quantities
from torchbp.tensorboard import read

WIDTHS = [8, 130]  # a weight of 64 elements is packed with others, one of 16 900 is not


def spoiled(gradient):
    """Two NaN and an inf, all in the first columns."""
    gradient = gradient.clone()
    gradient[:2, 0] = float("nan")
    gradient[0, 1] = float("inf")
    return gradient


@pytest.mark.parametrize("width", WIDTHS)
def test_gradients_and_weights(tmp_path, width):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4))
    model[2].weight.register_hook(spoiled)
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.25}], lr=0.5
    )
    x = torch.randn(16, width)
    x[:, :3] = 0  # so are three columns of the first layer's gradient
    parameters = dict(model.named_parameters())
    with torchbp.watch(model, optimizer, log_dir=tmp_path):
        model(x).square().mean().backward()
        for parameter in model[0].parameters():  # as if clipped
            parameter.grad /= 7
        weights = [p.norm().item() for p in parameters.values()]
        stepped = [p.grad.norm().item() for p in parameters.values()]
        before = [p.detach().clone() for p in parameters.values()]
        optimizer.step()
        updates = [(p - b).norm().item() for p, b in zip(parameters.values(), before, strict=True)]
    run = read(tmp_path).vectors
    assert run["weight_norm"].names == tuple(parameters)
    np.testing.assert_allclose(run["weight_norm"].values, [weights], rtol=1e-5)
    np.testing.assert_allclose(run["stepped_gradient_norm"].values, [stepped], rtol=1e-5)
    np.testing.assert_allclose(run["update_norm"].values, [updates], rtol=1e-4)
    ratios = [u / w for u, w in zip(updates, weights, strict=True)]
    np.testing.assert_allclose(run["update_ratio"].values, [ratios], rtol=1e-4)
    np.testing.assert_allclose(run["gradient_zeros"].values, [[3 / width, 0, 0, 0]], rtol=1e-6)
    assert run["gradient_nonfinite"].values.tolist() == [[0, 0, 3, 0]]
    assert run["learning_rate"].values.tolist() == [[0.5, 0.25]]


def test_the_monitors_share_is_twice_its_clocks(tmp_path, monkeypatch):
    """A step of a second, and a clock that goes on by a millisecond when it is asked."""
    now = [0.0]

    def perf_counter():
        now[0] += 1e-3
        return now[0]

    clock = types.SimpleNamespace(perf_counter=perf_counter, time=lambda: 0.0)
    monkeypatch.setattr(capture, "time", clock)
    monkeypatch.setattr(_monitor, "time", clock)
    model = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    own = []
    with torchbp.watch(model, optimizer, log_dir=tmp_path, sample_every=1) as monitor:
        for _ in range(30):
            now[0] += 1.0
            optimizer.zero_grad()
            model(torch.randn(3, 8)).square().mean().backward()
            optimizer.step()
            monitor._desk.join()
            own.append(monitor._capture.own_time + monitor._drain_time)
    shares = read(tmp_path).scalars["run/monitor_share"]
    assert shares.steps.tolist() == list(range(30))
    between = slice(21, 30)  # without drains
    np.testing.assert_allclose(
        shares.values[between].mean(), 2 * np.diff(own)[20:].mean(), rtol=0.02
    )


def test_every_quantity_says_what_it_is():
    for name, quantity in all_quantities().items():
        assert quantity.name == name
        assert quantity.title
        assert quantity.unit
        assert (quantity.finish is None) == (quantity.at == "host")
