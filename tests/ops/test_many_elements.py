"""What runs for many elements only, which the samples of a few do not reach: values and gradients are the formula's."""

import pytest
import torch

from tests.device import DEVICE
from tests.ops.conftest import make
from torchbp.ops._function import formula_only
from torchbp.ops._op import all_ops
from torchbp.ops._samples import Sample, one_tensor
from torchbp.ops.losses._exp import exponential
from torchbp.ops.normalization import _dyt_rows

OPS = [op for op in all_ops().values() if not op.random]
MANY = 1 << 15  # elements; more than every "few"


def value_and_gradients(op, sample):
    leaves = [t for t in sample.tensors() if t.requires_grad]
    y = one_tensor(op.function(*sample.args, **sample.kwargs))
    v = (
        torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=DEVICE).view(y.shape)
        if y.dim()
        else None
    )
    return y.detach(), *torch.autograd.grad(y, leaves, v)


@pytest.mark.parametrize("many", OPS, ids=repr)
def test_many_elements_as_the_formula(many):
    sample = many.benchmark(make(), MANY)
    found = value_and_gradients(many, sample)
    with formula_only():
        expected = value_and_gradients(many, sample)
    for a, b in zip(found, expected, strict=True):
        scale = b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * (1 + scale))


def test_binary_cross_entropy_with_ends_among_many():
    """Where some are 0 or 1, or as near as 1e-12, the gradient is that of the formula with its choice by element."""
    op = all_ops()["binary_cross_entropy"]
    x, target = op.benchmark(make(), MANY).args
    ends = torch.tensor([0.0, 1e-13, 1e-12, 2e-12], dtype=x.dtype, device=DEVICE)
    ends = torch.cat([ends, 1 - ends, x.new_tensor([0.3])])
    pairs = torch.cartesian_prod(ends, torch.cat([ends[[0, 4]], x.new_tensor([0.4])]))
    x, target = x.detach().flatten(), target.flatten()
    x[: len(pairs)], target[: len(pairs)] = pairs.T
    sample = Sample((x.requires_grad_(), target), {"reduction": "sum"})
    _, found = value_and_gradients(op, sample)
    with formula_only():
        _, expected = value_and_gradients(op, sample)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[100:], expected[100:], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("by_tanh", [True, False], ids=["tanh", "sigmoid"])
@pytest.mark.parametrize("with_weight", [True, False], ids=["weight", "plain"])
def test_dyt_of_many_by_either_function(by_tanh, with_weight, monkeypatch):
    """Which of them is fast depends on the processor."""
    monkeypatch.setattr(_dyt_rows, "TORCHS_IS_FAST", by_tanh)
    op = all_ops()["dyt"]
    sample = op.benchmark(make(), MANY)
    if not with_weight:
        sample = Sample(sample.args[:2])
    found = value_and_gradients(op, sample)
    with formula_only():
        expected = value_and_gradients(op, sample)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * (1 + b.abs().max().item()))


@pytest.mark.cpu("elsewhere it is torch.exp")
@pytest.mark.parametrize(
    "length", [3 << 12, 3 << 12 | 5]
)  # rows of 4096; and a piece that is not of rows
def test_exponential_of_many(length):
    x = 5 * make(torch.float32).normal(length, requires_grad=False)
    edges = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 88.7, 89.0, -87.0, -104.0])
    x[: len(edges)] = edges
    x[4096], x[8192] = -torch.inf, torch.inf  # first in its row, which is written apart
    found = exponential(3 << 12, x)(torch.empty_like(x), x)
    torch.testing.assert_close(found, x.exp(), rtol=2.4e-7, atol=1e-37, equal_nan=True)
