"""The library is built by one command, found by whoever imports torchbp, and nothing depends on its being there."""

import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

import torchbp
from torchbp.cli import main
from torchbp.ops._op import all_ops
from torchbp.ops.kernels import _build, _library

USES = """
import torch
import torchbp.functional as F
from torchbp.ops.kernels import _library, at_hand
x = torch.randn(1 << 15, requires_grad=True)
F.softplus(x).sum().backward()
print(at_hand(), sum(run is not None for run in _library.remembered.values()))
"""


@pytest.fixture
def one_op(monkeypatch):
    softplus = {"softplus": all_ops()["softplus"]}
    monkeypatch.setattr("torchbp.ops._op.all_ops", lambda: softplus)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHBP_KERNELS", str(tmp_path / "cache"))
    return tmp_path / "cache"


def used(setting):
    done = subprocess.run(
        [sys.executable, "-c", USES],
        env={**os.environ, "TORCHBP_KERNELS": str(setting)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_builds_and_is_found_and_is_removed(one_op, folder, capsys):
    assert main(["kernels", "--where"]) == 1, "not there yet"
    where = capsys.readouterr().out.strip()
    assert main(["kernels"]) == 0
    said = capsys.readouterr()
    assert "formulas of 1 ops" in said.out
    assert where in said.out
    assert [str(f) for f in folder.iterdir()] == [where]
    assert main(["kernels", "--where"]) == 0
    assert used(folder) == ["True", "2"], "forward and backward ran compiled"
    assert used("off") == ["False", "0"]
    assert main(["kernels", "--remove"]) == 0
    assert not list(folder.iterdir())
    assert used(folder) == ["False", "0"]


def test_what_cannot_be_loaded_is_left_alone(folder):
    folder.mkdir()
    _library.path().write_bytes(b"no library")
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", USES],
        env=os.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", "0"]
    assert "torchbp kernels" in done.stderr, "how it is built again"


def test_without_a_compiler_it_is_one_line(folder, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["kernels"]) == 2
    assert "expected a C++ compiler" in capsys.readouterr().err
    assert not folder.exists()


def test_what_the_compiler_says_is_told_and_nothing_is_left(tmp_path):
    with pytest.raises(RuntimeError, match="nonsense"):
        _build.build({"a": "nonsense"}, tmp_path / "x.so")
    assert not list(tmp_path.iterdir())


def test_a_compiler_without_openmp_will_do(tmp_path, monkeypatch):
    wrapper = tmp_path / "plain"
    wrapper.write_text(
        f"""#!/bin/sh
for a in "$@"; do [ "$a" = -fopenmp ] && {{ echo unsupported >&2; exit 1; }}; done
exec {_build.compiler()} "$@"
"""
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    sources = _build.asked_for({"softplus": all_ops()["softplus"]}, (torch.float32,))
    _build.build(sources, tmp_path / "x.so")
    try:
        _library.open_library(tmp_path / "x.so")
        x = torch.randn(1 << 17)
        assert_close(torchbp.functional.softplus(x), torch.nn.functional.softplus(x))
        assert [run is not None for run in _library.remembered.values()] == [True]
    finally:
        _library.open_library(None)


def test_switched_off_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setenv("TORCHBP_KERNELS", "off")
    assert main(["kernels"]) == 2
    assert "TORCHBP_KERNELS" in capsys.readouterr().err


def test_listing_formulas_leaves_the_random_state(one_op):
    before = torch.get_rng_state()
    assert _build.asked_for({"softplus": all_ops()["softplus"]})
    assert torch.equal(torch.get_rng_state(), before)
