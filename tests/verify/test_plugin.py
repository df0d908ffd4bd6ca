"""The pytest plugin, run in a pytest of its own."""

import subprocess
import sys

import pytest

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


MARKED = """
import pytest, torch

class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x * 1
    @staticmethod
    def backward(ctx, g): return 2 * g

def sample(n=3):
    return torch.randn(n, dtype=torch.float64, requires_grad=True)

@pytest.fixture
def size(): return 4

@pytest.mark.gradcheck(checks=["values", "linearity"])
@pytest.mark.parametrize("n", [2, 5])
def test_parameters(n, size):
    assert size == 4
    return Double.apply, sample(n)

@pytest.mark.gradcheck(checks="values")
class TestMarked:
    def setup_method(self): self.n = 3
    def test_class(self): return Double.apply, sample(self.n)
    @pytest.mark.gradcheck(checks="linearity")
    def test_own(self): return Double.apply, sample(self.n)
    @staticmethod
    def test_static(): return Double.apply, sample()

@pytest.mark.gradcheck(checks="values")
def test_keywords():
    return (lambda x, *, k: Double.apply(x) * k), sample(), {"k": 3.0}

@pytest.mark.gradcheck(checks="values")
def test_nothing(): pass

@pytest.mark.gradcheck(checks="values")
def test_three(): return torch.mul, sample(), sample()

@pytest.mark.xfail(raises=RuntimeError, strict=True)
@pytest.mark.gradcheck(checks="values")
def test_expected(): return Double.apply, sample()

@pytest.mark.gradcheck(skip="compile", level="quick")
def test_one_skipped(): return torch.sin, sample()
"""


def test_marks_of_classes_with_parameters_and_fixtures(tmp_path):
    (tmp_path / "test_marked.py").write_text(MARKED)
    status, out = run(tmp_path, "-rA")
    assert status == 1
    for name in (
        "test_parameters[values-2]",
        "test_parameters[values-5]",
        "TestMarked::test_class[values]",
        "TestMarked::test_static[values]",
        "test_keywords[values]",
    ):
        assert f"FAILED test_marked.py::{name} - [values] grad of" in out, out
    for name in ("test_parameters[linearity-2]", "TestMarked::test_own[linearity]"):
        assert f"PASSED test_marked.py::{name}" in out
    assert "XFAIL test_marked.py::test_expected[values]" in out
    assert "PASSED test_marked.py::test_one_skipped[values]" in out
    assert "from test_nothing, got (NoneType)" in out
    assert "from test_three, got (builtin_function_or_method, Tensor, Tensor)" in out
    assert "_gradcheck.py" not in out


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("@pytest.mark.gradcheck('values')\ndef test_a(): ...", "options by name, got ('values',)"),
        ("@pytest.mark.gradcheck(chekcs='values')\ndef test_a(): ...", "got 'chekcs'"),
        ("@pytest.mark.gradcheck(raise_exception=False)\ndef test_a(): ...", "'raise_exception'"),
        ("@pytest.mark.gradcheck(checks='value')\ndef test_a(): ...", "got 'value'"),
        ("@pytest.mark.gradcheck(level='all')\ndef test_a(): ...", "'quick' or 'full', got 'all'"),
        ("@pytest.mark.gradcheck(checks='values', skip='values')\ndef test_a(): ...", "got none"),
        ("@pytest.mark.gradcheck\nasync def test_a(): ...", "one that is async"),
        (
            """import unittest
pytestmark = pytest.mark.gradcheck
class Test(unittest.TestCase):
    def test_a(self): ...""",
            "no unittest.TestCase",
        ),
    ],
)
def test_a_mark_that_would_check_nothing_is_an_error(tmp_path, source, message):
    (tmp_path / "test_marked.py").write_text(f"import pytest\n{source}\n")
    status, out = run(tmp_path)
    assert status in (2, 4)
    assert f"test_a: {'gradcheck: ' if 'unittest' in source else ''}" in out
    assert message in out
    assert "passed" not in out
