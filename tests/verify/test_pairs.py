"""Every wrong function is caught, every right twin passes, and no check fails in itself."""

import pytest

import torchbp
from tests.verify import reported  # noqa: F401  # registers
from tests.verify.pairs import PAIRS

SLOW = {"scan_time_step"}  # a Python loop over 1025 steps, halved 15 times
NEED_COMPILE = {"compile_path_wrong", "graph_break"}


def run(function, pair):
    skip = () if pair.name in NEED_COMPILE else ("compile",)
    reference = pair.reference if pair.needs_reference else None
    return torchbp.gradcheck(
        function, pair.make(), reference=reference, skip=skip, raise_exception=False
    )


def test_there_are_enough():
    assert len(PAIRS) >= 60


ALL = [
    pytest.param(p, id=n, marks=[pytest.mark.slow] if n in SLOW else []) for n, p in PAIRS.items()
]


@pytest.mark.parametrize("pair", ALL)
def test_wrong_function_is_caught(pair):
    report = run(pair.wrong, pair)
    assert not report, str(report)
    assert all(f.message and f.repeat for f in report.wrong)


@pytest.mark.parametrize("pair", ALL)
def test_right_twin_passes(pair):
    report = run(pair.right, pair)
    assert report, str(report)
    assert not [c.detail for c in report.capabilities.values() if "itself failed" in c.detail]
