"""Vanishing and exploding through time: recurrent modules, and cells unrolled by hand."""

import numpy as np
import pytest
import torch
from torch import nn

import torchbp
from torchbp.tensorboard import is_absent, read

T, WIDTH = 120, 12


class Last(nn.Module):
    """A recurrent module whose last output is the answer."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(WIDTH, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Every(Last):
    """... whose every output is."""

    def forward(self, x):
        return self.head(self.rnn(x)[0])


class Unrolled(nn.Module):
    """A cell, called once a time step."""

    def __init__(self, cell):
        super().__init__()
        self.cell, self.head = cell, nn.Linear(WIDTH, 2)

    def forward(self, x):
        state = x.new_zeros(len(x), WIDTH)
        state = (state, state) if isinstance(self.cell, nn.LSTMCell) else state
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Elman(nn.Module):
    """A recurrent cell written out with linear layers."""

    def __init__(self):
        super().__init__()
        self.enter, self.recur = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        h = x.new_zeros(len(x), WIDTH)
        for t in range(x.shape[1]):
            h = torch.tanh(self.enter(x[:, t]) + self.recur(h))
        return self.head(h)


def scaled(rnn, gain):
    """Recurrent weights orthogonal, times ``gain``."""
    for name, parameter in rnn.named_parameters():
        if name.startswith("weight_hh"):
            nn.init.orthogonal_(parameter)
            parameter.data *= gain
        elif name.startswith("weight_ih"):
            parameter.data *= 0.01  # keeps tanh where it is linear
        else:
            nn.init.zeros_(parameter)
    return rnn


def remembering(lstm):
    """Forget gates biased for sequences of T steps (Tallec and Ollivier 2018, arXiv:1804.11188)."""
    for name, parameter in lstm.named_parameters():
        if name.startswith("bias_ih"):
            parameter.data[WIDTH : 2 * WIDTH] = float(np.log(T))
    return lstm


def run(model, folder=None, steps=25, lr=1e-4):
    g = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with torchbp.watch(model, optimizer, log_dir=folder, sample_every=2) as monitor:
        for _ in range(steps):
            x = torch.randn(4, T, 3, generator=g)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    return {v.kind: v for v in monitor.verdicts}


SICK = {
    "RNN": lambda: Last(nn.RNN(3, WIDTH, batch_first=True)),
    "torchbp's RNN": lambda: Last(torchbp.nn.RNN(3, WIDTH, batch_first=True)),
    "GRU": lambda: Last(nn.GRU(3, WIDTH, batch_first=True)),
    "RNNCell": lambda: Unrolled(nn.RNNCell(3, WIDTH)),
    "LSTMCell": lambda: Unrolled(nn.LSTMCell(3, WIDTH)),
    "by hand": Elman,
}


@pytest.mark.parametrize("name", SICK)
def test_it_vanishes_through_time(name):
    torch.manual_seed(0)
    (verdict,) = run(SICK[name]()).values()
    assert (verdict.kind, verdict.severity, verdict.step) == ("vanishing", "alert", 0)
    assert verdict.layer in {"rnn", "cell", "enter", "recur"}
    assert "through time" in verdict.evidence
    assert f"of {T} time steps" in verdict.evidence
    assert "LSTM or GRU" in verdict.advice


EXPLODING = {
    "RNN": lambda: Last(scaled(nn.RNN(3, WIDTH, batch_first=True), 1.1)),
    "RNNCell": lambda: Unrolled(scaled(nn.RNNCell(3, WIDTH), 1.1)),
}


@pytest.mark.parametrize("name", EXPLODING)
def test_it_explodes_through_time(name):
    torch.manual_seed(0)
    verdict = run(EXPLODING[name](), lr=1e-12)["exploding"]
    assert verdict.layer in {"rnn", "cell"}
    assert "through time" in verdict.evidence
    assert "truncated" in verdict.advice


HEALTHY = {
    "orthogonal": lambda: Last(scaled(nn.RNN(3, WIDTH, batch_first=True), 1.0)),
    "LSTM that remembers": lambda: Last(remembering(nn.LSTM(3, WIDTH, batch_first=True))),
    "cell that remembers": lambda: Unrolled(remembering(nn.LSTMCell(3, WIDTH))),
    "a loss at every step": lambda: Every(nn.RNN(3, WIDTH, batch_first=True)),
    "orthogonal, a loss at every step": lambda: Every(
        scaled(nn.RNN(3, WIDTH, batch_first=True), 1.0)
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_no_alarm_where_the_signal_gets_through(name):
    torch.manual_seed(0)
    assert run(HEALTHY[name]()) == {}


@pytest.mark.parametrize("name", ["RNN", "RNNCell", "LSTMCell"])
def test_the_ratio_is_that_of_plain_autograd(tmp_path, name):
    torch.manual_seed(0)
    model = SICK[name]()
    x = torch.randn(4, T, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    states = []

    def keep(_module, _inputs, state):
        for part in state if isinstance(state, tuple) else (state,):
            part.retain_grad()
        states.append(state if isinstance(state, tuple) else (state,))

    if name != "RNN":
        model.cell.register_forward_hook(keep)
    model(x).square().mean().backward()
    if name == "RNN":
        deltas = x.grad.double().norm(dim=(0, 2))
    else:  # of an LSTM's cell both outputs together
        deltas = torch.stack([torch.stack([p.grad.double() for p in s]).norm() for s in states])
    want = (deltas[: T // 10].max() / deltas[T // 2 :].max()).item()
    torch.manual_seed(0)
    run(SICK[name](), tmp_path, steps=1)
    series = read(tmp_path).vectors["through_time"]
    got = dict(zip(series.names, series.values[0], strict=True))
    np.testing.assert_allclose(got["rnn" if name == "RNN" else "cell"], want, rtol=1e-5)
    assert is_absent(series.values)[0].tolist() == [n == "head" for n in series.names]


def test_training_is_unchanged_where_the_data_gets_a_gradient():
    runs = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = SICK["RNN"]()
        x = torch.randn(4, 20, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = torchbp.watch(model, optimizer) if watched else None
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        if monitor:
            monitor.close()
        assert not x.requires_grad
        assert x.grad is None
        runs.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
