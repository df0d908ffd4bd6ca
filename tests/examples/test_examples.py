"""Every example runs, small, as a program of its own, and says what it is expected to say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SMALL = {"digits_mlp.py": (("--epochs", "4"), "test accuracy 9")}


def test_every_example_is_tested():
    assert sorted(SMALL) == sorted(p.name for p in EXAMPLES.glob("[a-z]*.py"))


@pytest.mark.parametrize("name", sorted(SMALL))
def test_example(name, tmp_path):
    arguments, expected = SMALL[name]
    command = [sys.executable, EXAMPLES / name, *arguments, "--log-dir", tmp_path / "run"]
    run = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert expected in run.stdout
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
