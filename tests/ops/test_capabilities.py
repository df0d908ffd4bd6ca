"""The columns of docs/ops.md are found by running: each says no of a function that cannot."""

import dataclasses

import pytest
import torch

from tests.device import DEVICE
from tests.ops.conftest import make
from torchbp.ops._capabilities import CAPABILITIES, kept_bytes, measure
from torchbp.ops._op import all_ops
from torchbp.ops._samples import Sample

torchs = torch.nn.functional


class Careless(torch.autograd.Function):
    """Sigmoid, taken for granted: real, contiguous, differentiated once."""

    @staticmethod
    def forward(ctx, x):
        y = torch.sigmoid(x)
        ctx.kept = y.detach().flatten()
        return y

    @staticmethod
    def backward(ctx, grad_y):
        flat = (
            grad_y.as_strided((grad_y.numel(),), (1,))
            if grad_y.stride()[-1:] == (0,)
            else grad_y.flatten()
        )
        y = ctx.kept.real if ctx.kept.is_complex() else ctx.kept
        grad = (flat * y.detach() * (1 - y.detach())).detach()
        return grad.view(grad_y.shape).to(grad_y.dtype)


def careless(input):
    return Careless.apply(input)


@pytest.mark.cpu("the table is of the CPU")
def test_a_careless_function_is_refused_column_by_column():
    op = dataclasses.replace(all_ops()["sigmoid"], function=careless, modules=())
    found = measure(op).can
    assert found["gradcheck"]
    refused = {"second order", "forward mode", "vmap", "layouts", "complex"}
    assert {name for name, can in found.items() if can is False} >= refused


@pytest.mark.cpu("the table is of the CPU")
def test_edges_where_torch_is_nan():
    def silu(input):
        return torchs.silu(input)

    op = dataclasses.replace(all_ops()["silu"], function=silu, modules=())
    assert CAPABILITIES.keys() >= {"edges", "layouts", "complex"}
    assert measure(op).can["edges"] is False
    assert measure(all_ops()["silu"]).can["edges"] is True


@pytest.mark.cpu("the table is of the CPU")
@pytest.mark.parametrize(
    ("name", "column"),
    [("gradient_clip", "gradcheck"), ("softmax", "edges"), ("prelu", "complex")],
)
def test_a_dash_where_there_is_nothing_to_compare_with(name, column):
    from torchbp.ops._capabilities import _attempt

    assert _attempt(CAPABILITIES[column], all_ops()[name]) is None


def test_own_bytes_are_neither_input_nor_output():
    x = torch.randn(8, requires_grad=True, device=DEVICE)
    assert kept_bytes(torch.sigmoid, Sample((x,))) == 32
    assert kept_bytes(torch.sigmoid, Sample((x,)), own=True) == 0
    assert kept_bytes(lambda x: torch.sigmoid(x).sum(), Sample((x,)), own=True) == 32
    assert kept_bytes(lambda x: x * x, Sample((x,)), own=True) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_more_bytes_than_torch(op, dtype):
    if op.torchs is None:
        pytest.skip("torch has no such op")
    sample = op.benchmark(make(dtype), 1 << 14)
    try:
        theirs = kept_bytes(op.torchs, sample)
    except RuntimeError as reason:
        pytest.skip(str(reason).splitlines()[0])
    assert kept_bytes(op.function, sample) <= theirs
