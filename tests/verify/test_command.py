"""``torchbp gradcheck`` on the command line."""

import json

import pytest

from torchbp.cli import main

WRONG = """
import torch
class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x * 1
    @staticmethod
    def backward(ctx, g): return 2 * g
def right(x, w): return x * w
class Layer(torch.nn.Module):
    def __init__(self, n): super().__init__()
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "functions_under_test.py"
    path.write_text(WRONG)
    return path


def test_right_function(source, capsys):
    assert main(["gradcheck", f"{source}:right", "--shape", "3,4", "--shape", "4"]) == 0
    assert "no fault found" in capsys.readouterr().out


def test_wrong_function_and_json(source, tmp_path, capsys):
    out = tmp_path / "report.json"
    assert main(["gradcheck", f"{source}:Double", "--shape", "3", "--json", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "factor 2 too large" in printed
    line = next(part for part in printed.splitlines() if "repeat:" in part).partition("torchbp ")[2]
    assert json.loads(out.read_text())["ok"] is False
    assert main(line.split()) == 1


def test_integer_targets():
    assert (
        main(
            [
                "gradcheck",
                "torch.nn.functional:cross_entropy",
                "--shape",
                "4,3",
                "--integers",
                "4:3",
            ]
        )
        == 0
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope_nope:x", "--shape", "3"], "nope_nope"),
        (["torch:nope", "--shape", "3"], "'nope'"),
        (["torch", "--shape", "3"], "module:name"),
        (["nope.py:x", "--shape", "3"], "nope.py"),
        (["torch:pi", "--shape", "3"], "float"),
        (["torch:tanh"], "--shape"),
        (["torch:argmax", "--shape", "3"], "output"),
        (["torch:mm", "--shape", "2,3", "--shape", "2,3"], "shapes cannot be multiplied"),
        (["torch:tanh", "--shape", "3", "--dtype", "int32"], "int32"),
        (["torch:tanh", "--shape", "3", "--checks", "nope"], "nope"),
        (["torch:tanh", "--shape", "3", "--json", "/nonexistent/x.json"], "/nonexistent"),
    ],
)
def test_what_could_not_run_is_one_line(arguments, message, capsys):
    assert main(["gradcheck", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_layer_that_needs_arguments(source, capsys):
    assert main(["gradcheck", f"{source}:Layer", "--shape", "3"]) == 2
    assert "instance" in capsys.readouterr().err
