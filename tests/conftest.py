"""What every test has: its own random numbers, and one thread, so that two workers do not fight for two cores."""

import gc
import os
from pathlib import Path

import pytest
import torch

from tests import device
from torchbp import _random

os.environ["TORCHBP_KERNELS"] = "off"  # a developer's library; tests/ops/kernels/ builds its own
torch.set_num_threads(1)


# What torch itself says on a GPU, of its own debug mode, layers, batching rules and compiler.
SAID_ON_A_GPU = (
    "Synchronization debug mode is a prototype",
    "RNN module weights are not part of single contiguous chunk",
    "There is a performance drop because we have not yet implemented the batching rule",
    "An output with one or more elements was resized",
    r"\s*Online softmax is disabled",
    "Attempting to run cuBLAS, but there was no current CUDA context",
    "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled",
    "The AccumulateGrad node's stream does not match the stream",
    "The CUDA Graph is empty",
    "Sparse invariant checks are implicitly disabled",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tests compute: cpu, cuda")


def pytest_configure(config: pytest.Config) -> None:
    device.DEVICE = config.getoption("--device", "cpu")
    try:
        torch.empty(1, device=device.DEVICE)
    except Exception as error:
        raise pytest.UsageError(f"--device {device.DEVICE}: {error}") from None
    if device.DEVICE != "cpu":
        for message in SAID_ON_A_GPU:
            config.addinivalue_line("filterwarnings", f"ignore:{message}:UserWarning")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out, on the CPU, what asks what a GPU does."""
    return True if device.DEVICE == "cpu" and collection_path.name == "test_cuda.py" else None


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking through 28,000 tests, a second each time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out on another device what is marked as the CPU's own, with the reason that the mark states."""
    if device.DEVICE != "cpu":
        for item in items:
            for mark in item.iter_markers("cpu"):
                item.add_marker(pytest.mark.skip(reason=f"the CPU's own: {mark.args[0]}"))


@pytest.fixture(autouse=True)
def _seed():
    _random.seed(0)


@pytest.fixture
def single_process_group(tmp_path):
    """A process group of this process alone, for what needs one to be there."""
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()
