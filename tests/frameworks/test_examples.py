"""The examples inside frameworks run, small. ``make frameworks``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "frameworks"
CASES = [
    ("lightning_images.py",),
    ("accelerate_mails.py",),
    *(("trainer_language.py", "--model", kind) for kind in ("gpt2", "llama", "bert")),
]


def test_every_example_is_tested():
    assert {case[0] for case in CASES} == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_example(case, tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCHBP_DATA": str(tmp_path / "none")}
    command = [
        sys.executable,
        EXAMPLES / case[0],
        *case[1:],
        "--small",
        "--log-dir",
        tmp_path / "run",
    ]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    assert "steps, " in done.stdout
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
    assert (tmp_path / "run" / "results.json").exists()
