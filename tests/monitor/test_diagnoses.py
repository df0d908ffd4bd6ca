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


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.encoder(x)))


@pytest.mark.parametrize("stepped_by", ["nobody", "another optimizer", "a number at a time"])
def test_a_layer_that_no_optimizer_has_is_disconnected_unless_it_changes(stepped_by):
    model = Tagger()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.01)
    another = torch.optim.SGD(model.encoder.parameters(), lr=0.01)
    with torchbp.watch(model, optimizer) as monitor:
        for _ in range(60):
            model.zero_grad()
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
            if stepped_by == "another optimizer":
                another.step()
            elif stepped_by == "a number at a time":
                with torch.no_grad():
                    model.encoder.weight[0, 0] += 1e-3
    found = [(v.kind, v.layer) for v in monitor.verdicts]
    assert found == ([("disconnected", "encoder")] if stepped_by == "nobody" else [])
    if found:
        assert "no optimizer has its parameters" in monitor.verdicts[0].evidence


def test_of_no_optimizer_nothing_is_known():
    model = Tagger()
    with torchbp.watch(model) as monitor:
        for _ in range(60):
            model.zero_grad()
            model(torch.randn(4, 8)).square().mean().backward()
            for parameter in model.head.parameters():
                parameter.data -= 0.01 * parameter.grad
    assert monitor.verdicts == []


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("spoiled", [False, True], ids=["sound", "spoiled"])
def test_a_spike_of_the_loss_where_gradients_are_not_read(spoiled, as_tensor):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with torchbp.watch(model, optimizer, every=10, sample_every=20) as monitor:
        for step in range(300):
            optimizer.zero_grad()
            loss = (model(torch.randn(32, 4)) - 3).square().mean()
            if spoiled and step == 253:
                loss = loss * 1000
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            monitor.log_loss(train=loss if as_tensor else loss.item())
    spikes = [v for v in monitor.verdicts if v.kind == "spike"]
    assert len(spikes) == spoiled
    if spoiled:
        assert "the training loss of step 253" in spikes[0].evidence
        assert spikes[0].layer == ""


@pytest.mark.parametrize(
    ("losses", "severities"),
    [
        ([8.0, 7.9, 7.5, 7.0], []),
        ([8.0, 8.1, 8.2, 7.0], []),
        ([8.0, 9.0, 8.2, 7.0], ["alert"]),
        ([-8.0, -7.0, -7.5, -8.0], ["alert"]),
        ([None] * 4, ["alert"]),
        ([8.0, None, None, None], ["alert"]),
    ],
)
def test_large_first_steps_are_grave_where_the_loss_rises(losses, severities):
    def at(step, loss):
        layers = reading(step, 0).layers
        values = {"update_ratio": np.array([0.7]), "weight_norm": np.ones(1)}
        if loss is not None:
            values["loss_train"] = np.array([loss])
        return Reading(step, values, {}, dataclasses.replace(layers, matrices=np.ones(1, bool)))

    (diagnosis,) = (d for d in all_diagnoses() if d.name == "update_too_large")
    court = Judge([diagnosis])
    court.consider([at(step, loss) for step, loss in enumerate(losses)])
    assert [v.severity for v in court.verdicts] == severities


@pytest.mark.parametrize(("first", "found"), [(0.9, True), (0.4, False)])
def test_saturation_from_the_start_is_trouble_also_where_something_is_learnt(first, found):
    def at(step):
        layers = Layers(
            ("a", "b"),
            ("Linear",) * 2,
            np.ones(2, bool),
            ("a.weight", "b.weight"),
            np.arange(2),
            np.ones(2),
            np.ones(2, bool),
        )
        share, error = (first, 1.0) if step < 5 else (0.9, 0.1)
        values = {"saturated_share": np.array([share, np.nan]), "error_signal": np.full(2, error)}
        present = {"saturated_share": np.array([True, False]), "error_signal": np.ones(2, bool)}
        return Reading(step, values, present, layers)

    (diagnosis,) = (d for d in all_diagnoses() if d.name == "saturated")
    court = Judge([diagnosis])
    court.consider([at(step) for step in range(30)])
    assert bool(court.verdicts) == found
