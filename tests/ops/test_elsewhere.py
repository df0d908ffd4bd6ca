"""On a device that is not the CPU no op mixes devices, and none asks for a value that torch's own does not ask for."""

import subprocess
import sys

import pytest

PLANTED = ["looks", "mixes"]


@pytest.mark.cpu("it brings a device of its own")
@pytest.mark.parametrize("samples", ["first", pytest.param("all", marks=pytest.mark.slow)])
def test_ops_on_a_device_without_kernels(samples):
    """What is reported are the two faults that are planted, and nothing else."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.ops.elsewhere", samples],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert sorted({line.split()[0] for line in lines}) == PLANTED, run.stdout
