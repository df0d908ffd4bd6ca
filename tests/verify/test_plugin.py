"""The pytest plugin, run in a pytest of its own."""

import subprocess
import sys

SOURCE = """
import pytest, torch

HEAVY = ["low_precision", "sizes", "long_reductions", "extremes", "vmap", "edges"]

class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x * 1
    @staticmethod
    def backward(ctx, g): return 2 * g

def sample():
    return torch.randn(3, dtype=torch.float64, requires_grad=True)

@pytest.mark.gradcheck(checks=("values", "linearity", "outputs"))
def test_wrong():
    return Double.apply, (sample(),)

@pytest.mark.gradcheck
def test_right():
    return torch.tanh, sample()

def test_fixture(gradcheck):
    assert gradcheck(torch.sin, sample())

@pytest.mark.gradcheck(level="full", skip=["compile", *HEAVY])
def test_level():
    return torch.sin, sample()

@pytest.mark.skip(reason="a mark of the function")
@pytest.mark.gradcheck
def test_marks():
    raise AssertionError
"""


def run(folder, *arguments):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "torchbp.verify.pytest_plugin",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_one_item_per_check_and_the_finding_as_failure(tmp_path):
    (tmp_path / "test_functions.py").write_text(SOURCE)
    status, out = run(tmp_path, "--gradcheck-level=quick", "-rA", "-v")
    assert status == 1
    assert "PASSED test_functions.py::test_right[linearity]" in out
    assert "PASSED test_functions.py::test_fixture" in out
    assert "test_wrong[values] FAILED" in out
    assert "test_wrong[linearity] PASSED" in out
    assert "test_wrong[outputs] SKIPPED" in out
    assert "factor 2 too large" in out
    assert "test_right[second_order]" not in out
    assert "_gradcheck.py" not in out
    assert "PASSED test_functions.py::test_level[second_order]" in out
    assert "test_marks[values] SKIPPED" in out
    assert "AssertionError" not in out


def test_torch_is_not_imported_until_it_is_used(tmp_path):
    (tmp_path / "test_nothing.py").write_text(
        "import sys\ndef test_no_torch():\n    assert 'torch' not in sys.modules\n"
    )
    status, out = run(tmp_path)
    assert status == 0, out
