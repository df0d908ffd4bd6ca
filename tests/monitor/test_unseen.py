"""The diagnoses against runs by somebody who did not know their rules. They read what ``make data`` fetches."""

import functools
import importlib.util
import sys
from pathlib import Path

import pytest

import torchbp

_SPEC = importlib.util.spec_from_file_location(
    "torchbp_unseen", Path(__file__).with_name("unseen.py")
)
unseen = sys.modules["torchbp_unseen"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(unseen)

pytestmark = pytest.mark.slow

# Not as expected, and why that stays.
OPEN = {
    "gru_std1": "said to explode, which it does; that 73 % of its units are saturated is not said",
    "dqn": "78 % of a layer's units are off for all eight states, and said to be dead; it learns all the same",
}


def runs(kind):
    """Return the runs of a kind; those that are open must fail until they are looked at again."""
    return [
        pytest.param(
            run,
            id=run.name,
            marks=pytest.mark.xfail(reason=OPEN[run.name], raises=AssertionError, strict=True)
            if run.name in OPEN
            else (),
        )
        for run in kind
    ]


def alarms(run):
    """Train, watched as often as can be, so that a run is the same every time; return the alarms."""
    monitor = run.train(functools.partial(torchbp.watch, share=None))
    return [v for v in monitor.verdicts if v.severity != "info"]


@pytest.mark.parametrize("run", runs(unseen.SICK))
def test_the_sick_are_diagnosed(run):
    """One of the kinds that are expected is said, of a layer at fault where only some are."""
    named = [v for v in alarms(run) if v.kind in run.expected]
    assert named
    if run.layers:
        assert any(f"{v.layer}.".startswith(f"{at}.") for v in named for at in run.layers)


@pytest.mark.parametrize("run", runs(unseen.HEALTHY))
def test_no_alarm_on_the_healthy(run):
    assert alarms(run) == []
