"""``lean`` makes outputs again to the last bit, by the same loops."""

import copy

import pytest
import torch
from torch import nn

import torchbp
from torchbp.ops.kernels import _library


def gradients(model, x):
    model.zero_grad()
    model(x).float().square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_same_bits_with_formulas_compiled(compiled, dtype):
    layers = (
        nn.Mish(),
        nn.RMSNorm(64),
        nn.ELU(),
        nn.Softplus(),
        nn.PReLU(),
        nn.LayerNorm(64),
        nn.LogSoftmax(-1),
    )
    model = nn.Sequential(*(m for layer in layers for m in (nn.Linear(64, 64), layer))).to(dtype)
    x = torch.randn(512, 64, dtype=dtype)
    converted = torchbp.convert(copy.deepcopy(model))
    lean = torchbp.lean(copy.deepcopy(model))
    compiled(lambda: gradients(converted, x))
    expected = gradients(converted, x)
    assert sum(run is not None for run in _library.remembered.values()) >= 8, "loops ran"
    for a, b in zip(gradients(lean, x), expected, strict=True):
        assert torch.equal(a, b)
    ways = torchbp.memory(converted, x).ways
    assert ways["lean"].kept_bytes < 0.8 * ways["torchbp"].kept_bytes, "outputs were made again"
