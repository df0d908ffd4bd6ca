"""The command's frame: help that teaches, errors in one line, exit statuses."""

import pytest

from torchbp.cli import main
from torchbp.cli._main import commands


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_teaches(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "examples:" in out
    assert f"torchbp {name}" in out


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert all(command.help in out for command in commands().values())
    assert "exit status" in out


def test_the_table_of_ops(capsys):
    assert main(["ops", "relu", "dropout"]) == 0
    head, relu, dropout = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["op", "modules"]
    assert relu.split()[:2] == ["relu", "ReLU"]
    assert relu.endswith("nothing"), "it refuses nothing"
    assert "4 → 1" in dropout


def test_an_unknown_op_is_one_line(capsys):
    assert main(["ops", "nothing"]) == 2
    assert "expected names of ops, got nothing" in capsys.readouterr().err
