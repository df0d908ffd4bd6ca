"""Every example runs, small, as a program of its own, and says what it is expected to say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("[a-z]*.py"))


def run(name, *arguments, folder):
    """Run an example away from the fetched data: the stand-ins are always there."""
    command = [sys.executable, EXAMPLES / name, *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCHBP_DATA": str(folder / "none")}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env=env
    )


@pytest.mark.parametrize("name", NAMES)
def test_example(name, tmp_path):
    log_dir = tmp_path / "run"
    done = run(name, "--small", "--log-dir", log_dir, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "look at it: tensorboard" in done.stdout
    assert list(log_dir.rglob("events.out.tfevents.*"))
    told = json.loads((log_dir / "results.json").read_text())
    assert told["results"]
    assert all(isinstance(value, float) for value in told["results"].values())


@pytest.mark.parametrize("name", ["fashion_cnn.py", "spam.py"])
def test_wrong_arguments_are_one_line(name, tmp_path):
    done = run(name, "--seed", "many", folder=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"{name}: error:")


def test_a_broken_promise_is_an_exit_status(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import _program

    for small, kept, status in ((False, True, 0), (False, False, 1), (True, False, 0)):
        args = _program.parser("", "x").parse_args(
            ["--log-dir", str(tmp_path)] + ["--small"] * small
        )
        assert _program.finish(args, {"a": 1.0}, promised={"a is 1": kept}) == status
