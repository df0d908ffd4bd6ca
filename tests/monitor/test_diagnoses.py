"""Verdicts on small runs: right name, layer and step on the sick, none on the healthy."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import torchbp
from torchbp.monitor._diagnosis import Diagnosis, Layers, Reading, Suspicion
from torchbp.monitor._judge import Judge
from torchbp.monitor._registry import all_diagnoses, all_quantities


class Residual(nn.Module):
    def __init__(self, width, zero=False):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, width)
        self.down = nn.Linear(width, width)
        if zero:
            nn.init.zeros_(self.down.weight)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def plain(depth, activation, gain=None, width=32):
    hidden = [part for _ in range(depth) for part in (nn.Linear(width, width), activation())]
    model = nn.Sequential(*hidden, nn.Linear(width, 10))
    if gain:
        for layer in model[::2]:
            nn.init.kaiming_normal_(layer.weight)
            layer.weight.data *= gain
    return model


def residual(depth, zero=False, width=32):
    blocks = (Residual(width, zero) for _ in range(depth))
    return nn.Sequential(
        nn.Linear(width, width), *blocks, nn.LayerNorm(width), nn.Linear(width, 10)
    )


def run(model, steps=80, lr=0.05):
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(32, 10, generator=g)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    with torchbp.watch(model, optimizer) as monitor:
        for _ in range(steps):
            x = torch.randn(64, 32, generator=g)
            loss = nn.functional.cross_entropy(model(x), (x @ teacher).argmax(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.log_loss(train=loss)
    return monitor


HEALTHY = {
    "relu-3": lambda: plain(3, nn.ReLU),
    "relu-he-20": lambda: plain(20, nn.ReLU, gain=1.0),
    "residual-20": lambda: residual(20),
    "residual-20-zero-initialised": lambda: residual(20, zero=True),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_no_alarm_on_the_healthy(name):
    torch.manual_seed(0)
    monitor = run(HEALTHY[name]())
    assert monitor.verdicts == []
    assert "nothing is wrong" in str(monitor)


def test_a_deep_sigmoid_network_vanishes():
    torch.manual_seed(0)
    monitor = run(plain(20, nn.Sigmoid))
    (verdict,) = monitor.verdicts
    assert (verdict.kind, verdict.severity) == ("vanishing", "alert")
    assert (verdict.step, verdict.until) == (0, None)
    # 0.25 at most from the sigmoid, and the weights take more: 1e-3 is lost within five layers.
    assert int(verdict.layer) in range(30, 40, 2)
    assert verdict.layer in verdict.evidence
    assert "residual" in verdict.advice
    text = str(monitor)
    assert f"vanishing at {verdict.layer} since step 0" in text


def test_too_large_weights_explode():
    torch.manual_seed(0)
    monitor = run(plain(20, nn.ReLU, gain=1.6), lr=1e-12)
    (verdict,) = monitor.verdicts
    assert (verdict.kind, verdict.severity, verdict.step) == ("exploding", "alert", 0)


def test_an_explosion_that_ends_in_nan_is_both():
    torch.manual_seed(0)
    monitor = run(plain(20, nn.ReLU, gain=1.6), lr=0.1)
    kinds = {v.kind: v for v in monitor.verdicts}
    assert set(kinds) == {"exploding", "nonfinite"}
    assert kinds["exploding"].step == 0
    assert kinds["nonfinite"].step > 0


def test_a_nan_is_laid_at_the_layer_where_it_arises():
    class Spoils(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("nan")

    class Spoiled(nn.Module):
        def forward(self, x):
            return Spoils.apply(x)

    torch.manual_seed(0)
    model = nn.Sequential(*plain(1, nn.ReLU), Spoiled(), *plain(3, nn.ReLU, width=10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torchbp.watch(model, optimizer) as monitor:
        model(torch.randn(8, 32)).square().mean().backward()
        optimizer.step()
    (verdict,) = monitor.verdicts
    assert (verdict.kind, verdict.layer, verdict.step) == ("nonfinite", "2", 0)
    assert "2 of 6 layers" in verdict.evidence


def reading(step, level):
    layers = Layers(
        ("a",),
        ("Linear",),
        np.array([True]),
        ("a.weight",),
        np.array([0]),
        np.ones(1),
        np.ones(1, bool),
    )
    return Reading(step, {"level": np.array([level])}, {}, layers)


def judge(levels, begins=3, ends=2, begins_alert=None):
    def examine(reading):
        (level,) = reading.values["level"]
        severity = {1: None, 2: "warning", 3: "alert"}.get(int(level))
        return [Suspicion(severity, "a", f"{level}", "advice")] if level else []

    diagnosis = Diagnosis("x", ("level",), examine, "rule", "source", begins, begins_alert, ends)
    court = Judge([diagnosis])
    for step, level in enumerate(levels):
        court.consider([reading(10 * step, level)])
    return [(v.severity, v.step, v.until) for v in court.verdicts]


@pytest.mark.parametrize(
    ("levels", "verdicts"),
    [
        ([0, 2, 2, 0, 2, 2, 0], []),
        ([0, 2, 2, 2], [("warning", 10, None)]),
        ([2, 2, 2, 3, 2], [("warning", 0, None)]),
        ([2, 2, 2, 3, 3, 3], [("alert", 0, None)]),
        ([2, 2, 2, 0, 2, 2], [("warning", 0, None)]),
        ([2, 2, 2, 1, 1, 1], [("warning", 0, None)]),
        ([1, 1, 1, 1], []),
        ([2, 2, 2, 0, 0], [("warning", 0, 30)]),
        ([2, 2, 2, 0, 1, 0], [("warning", 0, 30)]),
        ([2, 2, 2, 0, 0, 2, 2, 2], [("warning", 0, 30), ("warning", 50, None)]),
    ],
)
def test_a_trouble_must_last_and_must_stay_away(levels, verdicts):
    assert judge(levels) == verdicts


def test_alerts_may_need_fewer():
    assert judge([3, 3], begins=5, begins_alert=2) == [("alert", 0, None)]
    assert judge([2, 3], begins=5, begins_alert=2) == []


def test_verdicts_are_frozen():
    torch.manual_seed(0)
    (verdict,) = run(plain(20, nn.Sigmoid)).verdicts
    with pytest.raises(dataclasses.FrozenInstanceError):
        verdict.kind = "x"


@pytest.mark.parametrize("diagnosis", all_diagnoses(), ids=lambda d: d.name)
def test_every_diagnosis_says_its_rule(diagnosis):
    assert diagnosis.threshold
    assert diagnosis.source
    assert set(diagnosis.reads) <= set(all_quantities())


def test_a_spike_names_a_layer_that_makes_it():
    """Not the one whose gradient grew by more, from nothing to next to nothing."""
    layers = Layers(
        ("a", "b"),
        ("Linear",) * 2,
        np.ones(2, bool),
        ("a.weight", "b.weight"),
        np.array([0, 1]),
        np.ones(2),
        np.ones(2, bool),
    )

    def at(step, a, b):
        norm = np.array([np.hypot(a, b)])
        values = {"global_gradient_norm": norm, "layer_gradient_norm": np.array([a, b])}
        return Reading(step, values, {}, layers)

    (spike,) = (d for d in all_diagnoses() if d.name == "spike")
    wobble = 1 + 0.01 * np.sin(np.arange(200))
    judge = Judge([spike])
    judge.consider([at(i, w, 1e-20) for i, w in enumerate(wobble)] + [at(200, 50.0, 1e-6)])
    (verdict,) = judge.verdicts
    assert (verdict.layer, verdict.step) == ("a", 200)
    assert "most of all at a, 50" in verdict.evidence
