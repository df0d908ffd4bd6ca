"""Small tensors, which lean leaves alone otherwise, get recipes here too; and nothing may stay behind."""

import pytest
import torch

from torchbp.ops import _recipe
from torchbp.recompute import _graph


@pytest.fixture(autouse=True)
def _small_tensors_too(monkeypatch):
    monkeypatch.setattr(_graph, "small", 0)
    monkeypatch.setattr(_recipe, "_COPIED_SHARE", float("inf"))
    yield
    assert _recipe.asked == 0
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
