"""Every bound of every diagnosis, from both sides, on readings made by hand."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from torchbp.monitor._diagnosis import Layers, Reading
from torchbp.monitor._judge import Judge
from torchbp.monitor._registry import all_diagnoses

NAMES = ("a", "b", "c", "d", "e")
ALL = np.ones(5, bool)
LAYERS = Layers(
    NAMES, ("Linear",) * 5, ALL, tuple(f"{n}.weight" for n in NAMES), np.arange(5), np.ones(5), ALL
)
DIAGNOSES = {d.name: d for d in all_diagnoses()}


def reading(values, step=0, times=None):
    arrays = {k: np.atleast_1d(np.array(v, float)) for k, v in values.items()}
    present = {k: np.isfinite(v) for k, v in arrays.items() if len(v) == 5}
    return Reading(step, arrays, present, LAYERS, times=times or {})


def signal(*signals):
    return {"error_signal": signals}


def updates(ratio):
    gradient = {"global_gradient_norm": 1.0, "learning_rate": 0.1, "loss_train": 2.0}
    return gradient | {"update_ratio": [ratio] * 5, "weight_norm": np.ones(5)}


def quietly(ratio):
    """The same where no loss is logged."""
    return {k: v for k, v in updates(ratio).items() if k != "loss_train"}


def noise(ratio):
    """An interval of 30 % about the noise scale; ``ratio``: its near end over the batch."""
    near = 64 * ratio
    interval = (near * 1.3, near, near * 1.6) if ratio > 1 else (near / 1.3, near / 1.6, near)
    return {"noise_scale": interval, "batch": 32, "backwards": 2}


@dataclass
class Rule:
    """A diagnosis as a function of one number.

    ``warn``, ``alert``, ``clear``: bounds of that number; ``up``: whether it is too large beyond them.
    ``begins``, ``soon``, ``ends``: so many readings in a row make a verdict, an alert, and end it.
    ``lead``: readings before the rule has what it needs. ``says``: words of the advice.
    """

    kind: str
    values: Callable[[float], dict]
    warn: float
    clear: float
    begins: int
    ends: int
    alert: float | None = None
    soon: int | None = None
    up: bool = True
    lead: int = 0
    layer: str = ""
    severity: str = "warning"
    says: tuple[str, ...] = ()
    times: bool = False


RULES = {
    "vanishing": Rule(
        "vanishing",
        lambda r: signal(r, r, 1, 1, 1),
        warn=1e-3,
        clear=3e-3,
        begins=10,
        ends=5,
        alert=1e-5,
        up=False,
        layer="b",
        says=("residual", "normalization", "ReLU", "initialisation"),
    ),
    "vanishing through time": Rule(
        "vanishing",
        lambda r: signal(1, 1, 1, 1, 1) | {"through_time": [math.nan, r] + [math.nan] * 3},
        warn=1e-3,
        clear=3e-3,
        begins=10,
        ends=5,
        alert=1e-5,
        up=False,
        layer="b",
        says=("LSTM or GRU", "orthogonal"),
        times=True,
    ),
    "exploding": Rule(
        "exploding",
        lambda r: signal(r, r, r, 1, 1),
        warn=30,
        clear=10,
        begins=10,
        ends=5,
        soon=3,
        alert=1e3,
        layer="c",
        says=("initialisation", "normalization", "residual", "clip_grad_norm_"),
    ),
    "exploding through time": Rule(
        "exploding",
        lambda r: signal(1, 1, 1, 1, 1) | {"through_time": [math.nan, r] + [math.nan] * 3},
        warn=30,
        clear=10,
        begins=10,
        ends=5,
        soon=3,
        alert=1e3,
        layer="b",
        says=("LSTM or GRU", "clip_grad_norm_", "orthogonal", "truncated"),
        times=True,
    ),
    "dead": Rule(
        "dead",
        lambda r: {"dead_share": [math.nan, r, 0.1, 0, 0]},
        warn=0.4,
        clear=0.3,
        begins=1,
        ends=2,
        alert=0.5,
        layer="b",
        says=("learning rate", "warm-up", "initialisation", "LeakyReLU", "normalization"),
    ),
    "saturated": Rule(
        "saturated",
        lambda r: signal(1, 1, 1, 1, 1) | {"saturated_share": [math.nan, r, 0.1, 0, 0.9]},
        warn=0.2,
        clear=0.15,
        begins=10,
        ends=5,
        alert=0.5,
        layer="b",
        says=("initialisation", "normalization", "learning rate", "ReLU"),
    ),
    "update_too_large": Rule(
        "update_too_large",
        quietly,
        warn=0.1,
        clear=10**-1.3,
        begins=10,
        ends=5,
        soon=2,
        alert=10**-0.5,
        layer="e",
        says=("the learning rate times 0.0", "warm-up", "clip_grad_norm_"),
    ),
    "update_too_small": Rule(
        "update_too_small",
        updates,
        warn=10**-4.5,
        clear=10**-4.2,
        begins=10,
        ends=3,
        up=False,
        lead=9,
        says=("the learning rate times 10",),
    ),
    "clipping": Rule(
        "clipping",
        lambda r: {"clip_coefficient": r, "global_gradient_norm": 3.0},
        warn=0.999,
        clear=0.999,
        begins=1,
        ends=3,
        up=False,
        lead=29,
        severity="info",
        says=("a clip value near 3",),
    ),
    "clipping to next to nothing": Rule(
        "clipping",
        lambda r: {"clip_coefficient": r, "global_gradient_norm": 3.0},
        warn=0.05,
        clear=0.999,
        begins=1,
        ends=3,
        up=False,
        lead=29,
        says=("a clip value near 3",),
    ),
    "batch_size, too small": Rule(
        "batch_size",
        noise,
        warn=4,
        clear=4,
        begins=10,
        ends=5,
        severity="info",
        says=("a batch 4.2 times as large",),
    ),
    "batch_size, too large": Rule(
        "batch_size",
        noise,
        warn=0.25,
        clear=0.25,
        begins=10,
        ends=5,
        up=False,
        severity="info",
        says=("a batch 0.24 times as large",),
    ),
}


def found(rule, levels):
    diagnosis = DIAGNOSES[rule.kind]
    court = Judge([diagnosis])
    for k, level in enumerate(levels):
        times = {}
        if rule.times:
            norms = np.ones(20)
            norms[:2] = level
            times = {1: norms}
        court.consider([reading(rule.values(level), 10 * k, times)])
    return court.verdicts


def beyond(rule, bound, part=0.05):
    return bound * (1 + part if rule.up else 1 - part)


def short_of(rule, bound, part=0.05):
    return bound * (1 - part if rule.up else 1 + part)


@pytest.mark.parametrize("name", RULES)
def test_it_begins_beyond_its_bound_when_that_lasts(name):
    rule = RULES[name]
    begins = rule.lead + rule.begins
    bad, good = beyond(rule, rule.warn), short_of(rule, rule.warn)
    (verdict,) = found(rule, [bad] * begins)
    assert (verdict.kind, verdict.severity, verdict.layer) == (rule.kind, rule.severity, rule.layer)
    assert (verdict.step, verdict.until) == (10 * rule.lead, None)
    assert any(digit in verdict.evidence for digit in "0123456789")
    assert all(word in verdict.advice for word in rule.says), verdict.advice
    assert found(rule, [bad] * (begins - 1)) == []
    assert [v for v in found(rule, [good] * 60) if v.severity == rule.severity] == []


ALERTS = [name for name, rule in RULES.items() if rule.alert]


@pytest.mark.parametrize("name", ALERTS)
def test_it_is_an_alert_beyond_a_second_bound(name):
    rule = RULES[name]
    soon = rule.soon or rule.begins
    bad, worse = short_of(rule, rule.alert), beyond(rule, rule.alert)
    assert [v.severity for v in found(rule, [bad] * rule.begins)] == ["warning"]
    assert [v.severity for v in found(rule, [worse] * soon)] == ["alert"]
    assert found(rule, [worse] * (soon - 1)) == []


@pytest.mark.parametrize("name", RULES)
def test_it_ends_within_a_milder_bound_when_that_lasts(name):
    rule = RULES[name]
    bad = [beyond(rule, rule.warn)] * (rule.lead + rule.begins)
    between = [beyond(rule, rule.clear, 0.001)] * (rule.clear != rule.warn) * 20
    over = [short_of(rule, rule.clear)]
    rest = 11 if rule.kind == "clipping" else 0  # of the last 20 samples two fifths may be clipped
    (verdict,) = found(rule, bad + between + over * (rest + rule.ends - 1))
    assert verdict.until is None
    (verdict,) = found(rule, bad + between + over * (rest + rule.ends))
    assert verdict.until == 10 * (len(bad) + len(between) + rest)


def layer_norms(*norms):
    return {"layer_gradient_norm": norms, "global_gradient_norm": float(np.linalg.norm(norms))}


def test_nonfinite():
    def at(step, *norms, loss=1.0):
        return reading(layer_norms(*norms) | {"loss_train": loss}, step)

    court = Judge([DIAGNOSES["nonfinite"]])
    nan, inf = math.nan, math.inf
    court.consider([at(0, 1, 1, 1, 1, 1), at(1, nan, nan, 1, 1, 1)])
    court.consider([at(2 + k, 1, 1, 1, 1, 1) for k in range(9)])
    assert [(v.severity, v.layer, v.step, v.until) for v in court.verdicts] == [
        ("alert", "b", 1, None)
    ]
    court.consider([at(11, 1, 1, 1, 1, 1), at(12, 1, 1, 1, 1, 1, loss=nan), at(13, *[inf] * 5)])
    first, second = court.verdicts
    assert first.until == 2
    assert "NaN in 2 of 5 layers" in first.evidence
    assert (second.layer, second.step) == ("", 12)
    assert "loss is not finite" in second.evidence
    assert "GradScaler" in second.advice


def test_disconnected():
    def at(step, norm):
        return reading(
            layer_norms(1, 0 if norm == 0 else 1, norm, 1, 1) | signal(1, 1, 0, 1, 1), step
        )

    court = Judge([DIAGNOSES["disconnected"]])
    court.consider([at(k, 0.0) for k in range(19)])
    assert court.verdicts == []
    court.consider([at(19, 0.0)])
    # b's gradient is 0 as well, but a signal arrives at it: it is lost in the squares of a norm.
    (verdict,) = court.verdicts
    assert (verdict.severity, verdict.layer, verdict.step) == ("warning", "c", 0)
    assert "detach()" in verdict.advice
    court.consider([at(20, 1e-20)])
    assert court.verdicts[0].until == 20


@pytest.mark.parametrize(
    ("ran", "had", "steps", "said"),
    [
        (True, True, 20, "is None or exactly 0"),
        (False, False, 100, "is None or exactly 0, and c has not run"),
        (False, False, 99, None),
        (False, True, 400, None),  # others have their turn
    ],
)
def test_a_layer_that_does_not_run_is_disconnected_if_it_never_had_a_gradient(
    ran, had, steps, said
):
    court = Judge([DIAGNOSES["disconnected"]])
    for k in range(steps + had):
        now = reading(layer_norms(1, 1, float(had and k == 0), 1, 1) | signal(1, 1, 0, 1, 1), k)
        now.ran = frozenset({0, 1, 3, 4} | ({2} if ran else set()))
        court.consider([now])
    assert [v.layer for v in court.verdicts] == ["c"] * (said is not None)
    assert all(v.evidence.endswith(said) for v in court.verdicts)


@pytest.mark.parametrize(
    ("val", "gap", "begins"),
    [
        ([1.0, 1.1, 1.2, 1.3], 0.12, [3]),
        ([1.0, 1.1, 1.2, 1.3], 0.09, []),  # no gap
        ([1.0, 1.1, 1.2, 1.2], 0.12, []),  # twice only
        ([1.0, 1.005, 1.01, 1.015], 0.12, []),  # within 2 % of the best
        ([1.0, 1.2, 1.2, 1.1, 1.2, 1.2, 1.15], 0.12, []),  # up and down
        ([1.0, 1.1, 1.0, 1.1, 1.05, 1.1], 0.12, []),  # 4.8 % in the mean of three
        ([1.0, 1.1, 1.0, 1.1, 1.2, 1.1], 0.12, [5]),
    ],
)
def test_overfitting(val, gap, begins):
    court = Judge([DIAGNOSES["overfitting"]])
    for k, loss in enumerate(val):
        court.consider([reading({"loss_val": loss, "generalisation_gap": gap}, k)])
    assert [v.step for v in court.verdicts] == begins
    if begins:
        (verdict,) = court.verdicts
        assert "best at step" in verdict.evidence
        assert "weight decay" in verdict.advice
        court.consider([reading({"loss_val": 0.9, "generalisation_gap": 0.05}, 10)])
        assert court.verdicts[0].until == 10


@pytest.mark.parametrize(
    ("spread", "norm", "seen"),
    [
        (0.01, 4.2, True),
        (0.01, 3.8, False),  # less than four times the median
        (0.5, math.exp(0.5 * 6.3), True),
        (0.5, math.exp(0.5 * 5.7), False),  # less than 6σ
    ],
)
def test_a_spike(spread, norm, seen):
    wobble = np.exp(spread * np.resize([1.0, -1.0], 128))
    norms = [*wobble, norm, *wobble[:3]]
    court = Judge([DIAGNOSES["spike"]])
    court.consider([reading(layer_norms(*[x / 5**0.5] * 5), k) for k, x in enumerate(norms)])
    assert [(v.step, v.until) for v in court.verdicts] == [(128, 129)] * seen
    if seen:
        assert "clip_grad_norm_ at" in court.verdicts[0].advice
        assert "warm-up" in court.verdicts[0].advice


@pytest.mark.parametrize(
    ("share", "error", "verdicts"),
    [
        (0.45, 0.55, 4),  # the signal is above half of what it was
        (0.45, 0.45, 0),  # it came of learning
        (0.55, 0.45, 4),  # it was there from the start
    ],
)
def test_saturation_that_came_of_learning_is_none(share, error, verdicts):
    court = Judge([DIAGNOSES["saturated"]])
    for k in range(30):
        now = (1.0, share) if k < 5 else (error, 0.9)
        values = signal(1, 1, 1, 1, now[0]) | {"saturated_share": [now[1]] * 5}
        court.consider([reading(values, k)])
    assert len(court.verdicts) == verdicts


@pytest.mark.parametrize(("loss", "alerts"), [(1.0, 0), (1.05, 0), (1.2, 1)])
def test_large_first_steps_are_an_alert_where_the_loss_rises(loss, alerts):
    court = Judge([DIAGNOSES["update_too_large"]])
    for k in range(3):
        court.consider([reading(updates(0.5) | {"loss_train": loss if k else 1.0}, k)])
    assert [v.severity for v in court.verdicts] == ["alert"] * alerts


@pytest.mark.parametrize(
    "name", ["update_too_small", "loss falls", "rate rises", "rate fell", "faded"]
)
def test_small_updates_at_full_strength_only(name):
    def values(k):
        change = {
            "loss falls": {"loss_train": 2.0 * 0.995**k},
            "rate rises": {"learning_rate": 0.1 * 1.01**k},
            "rate fell": {"learning_rate": 0.1 if k < 3 else 0.019},
            "faded": {"global_gradient_norm": 1.0 if k < 3 else 0.029},
        }
        return updates(1e-5) | change.get(name, {})

    court = Judge([DIAGNOSES["update_too_small"]])
    for k in range(40):
        court.consider([reading(values(k), k)])
    assert bool(court.verdicts) == (name == "update_too_small")
