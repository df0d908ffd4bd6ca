"""What every test has: its own random numbers, and one thread, so that two workers do not fight for two cores."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
