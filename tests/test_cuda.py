"""Networks converted on a GPU learn what they did before. Run by ``--device cuda``."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import torchbp
from benchmarks.models import MODELS, loss
from tests.device import DEVICE


def losses(model, x, y, context):
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, fused=True)
    found = []
    for _ in range(30):
        optimizer.zero_grad()
        with context:
            value = loss(model(x), y)
        value.backward()
        optimizer.step()
        found.append(value.detach())
    return torch.stack(found).float().cpu().numpy()


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_losses(name, half):
    torch.manual_seed(0)
    config = MODELS[name]
    model = config.small().to(DEVICE)
    for module in model.modules():  # the masks of two dropouts are not the same
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    x, y = (t.to(DEVICE) for t in config.small_data(8))
    context = torch.autocast(DEVICE, torch.bfloat16) if half else nullcontext()
    want = losses(copy.deepcopy(model), x, y, context)
    converted = torchbp.convert(copy.deepcopy(model))
    assert any(type(m).__module__.startswith("torchbp") for m in converted.modules())
    got = losses(converted, x, y, context)
    assert want[-1] < 0.9 * want[0]
    np.testing.assert_allclose(got, want, rtol=0.03 if half else 2e-3)
    np.testing.assert_allclose(losses(torchbp.lean(model), x, y, context), got, rtol=1e-3)
