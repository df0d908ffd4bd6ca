"""``torchbp gradcheck`` on the command line."""

import json
import sys

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
class Sine:
    def __call__(self, x): return x.sin()
sine = Sine()
class Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.round()
    @staticmethod
    def backward(ctx, g): return g.clamp(-1, 1)
def leaves(x): raise SystemExit(0)
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Sine", "--shape", "3"], "the class"),
        (["leaves", "--shape", "3"], "it exits, with 0"),
        (["right", "--shape", "3", "--shape", "3", "--json", "."], "expected a file for --json"),
        (["sine", "--shape", "3", "--device", "cuda:99"], "--device cuda:99"),
    ],
)
def test_what_could_not_run_of_a_file(source, arguments, message, capsys):
    assert main(["gradcheck", f"{source}:{arguments[0]}", *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_file_that_exits_when_it_is_imported(tmp_path, capsys):
    path = tmp_path / "script.py"
    path.write_text("def f(x): return x\nimport sys\nsys.exit(0)\n")
    assert main(["gradcheck", f"{path}:f", "--shape", "3"]) == 2
    assert "SystemExit" in capsys.readouterr().err


def test_file_with_the_name_of_a_module_takes_the_place_of_none(tmp_path):
    path = tmp_path / "json.py"
    path.write_text("def double(x): return 2 * x\n")
    assert main(["gradcheck", f"{path}:double", "--shape", "3", "--level", "quick"]) == 0
    assert sys.modules["json"] is json


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "3,,4"], "expected sizes such as 3,4, got '3,,4'"),
        (["--shape", ",3"], "expected sizes such as 3,4, got ',3'"),
        (["--shape", "3", "--seed", "9" * 30], "below 2**62"),
    ],
)
def test_arguments_that_are_none(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["gradcheck", "torch:sin", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["()", "", "0,4", "3,", "(3,4)"])
def test_shapes(shape, capsys):
    arguments = ["torch:sin", "--shape", shape, "--checks", "values, linearity"]
    assert main(["gradcheck", *arguments]) == 0
    assert "no fault found in" in capsys.readouterr().out


def test_reference_of_other_arguments_is_no_pass(source, capsys):
    arguments = [f"{source}:right", "--shape", "3,4", "--shape", "4", "--checks", "reference"]
    assert main(["gradcheck", *arguments, "--reference", "torch:mm"]) == 1
    assert "the reference raises RuntimeError" in capsys.readouterr().out
    assert main(["gradcheck", *arguments, "--reference", "torch:broadcast_tensors"]) == 1
    assert "the reference has 2 outputs with a gradient, the function 1" in capsys.readouterr().out


def test_what_is_skipped_stands_in_the_line_that_repeats(source, capsys):
    assert (
        main(["gradcheck", f"{source}:Cut", "--shape", "3", "--skip", "differences, compile"]) == 1
    )
    printed = capsys.readouterr().out
    line = next(part for part in printed.splitlines() if "repeat:" in part).partition("torchbp ")[2]
    assert "--skip differences --seed 0 --checks linearity" in line
    assert main(line.split()) == 1
