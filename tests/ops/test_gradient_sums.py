"""Gradients that are sums over many rows: exact in half precision, with one thread and with several; and bytes kept."""

import pytest
import torch

import torchbp
import torchbp.functional as F
from tests.device import DEVICE
from tests.ops.conftest import HALF
from tests.ops.test_autograd import kept_storages, storage_bytes

ROWS = 8192


def sums(name, dtype, of_parameters=None):
    """Gradients that are 8192 in exact arithmetic: each row adds 1."""
    x = torch.ones(ROWS, 4, dtype=dtype, device=DEVICE)
    ones = torch.ones(4, dtype=of_parameters or dtype, requires_grad=True, device=DEVICE)
    if name == "embedding":
        table = torch.ones(3, 4, dtype=dtype, requires_grad=True, device=DEVICE)
        y = F.embedding(torch.ones(ROWS, dtype=torch.long, device=DEVICE), table)
        return torch.autograd.grad(y.sum(), table)[0][1]
    calls = {
        "layer_norm": lambda: F.layer_norm(x, (4,), None, ones),
        "batch_norm": lambda: F.batch_norm(x, None, None, None, ones, True),
        "group_norm": lambda: F.group_norm(x, 2, None, ones),
        "instance_norm": lambda: F.instance_norm(x.reshape(-1, 4, 2), None, None, None, ones),
        "rms_norm": lambda: F.rms_norm(x, (4,), ones),
        "dyt": lambda: F.dyt(x, ones.new_ones(1), None, ones),
        "bilinear": lambda: F.bilinear(
            x, x, torch.zeros(4, 4, 4, dtype=dtype, device=DEVICE), ones
        ),
    }
    return torch.autograd.grad(calls[name]().sum(), ones)[0]


NAMES = ["layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm", "dyt"]


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("name", [*NAMES, "bilinear", "embedding"])
def test_eight_thousand_ones(name, dtype, threads):
    """Low-precision sums stop at 256 in bfloat16 and at 2048 in float16, where adding 1 changes nothing."""
    torch.set_num_threads(threads)
    try:
        grad = sums(name, dtype)
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(
        grad.double(), torch.full((4,), float(ROWS), dtype=torch.float64, device=DEVICE)
    )
    assert grad.dtype == dtype


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "name", ["layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm"]
)
def test_eight_thousand_ones_into_float32(name, dtype):
    """Half-precision activations, float32 parameters: torch's layer_norm gives 256 here too."""
    if name == "layer_norm" and DEVICE != "cpu":
        pytest.skip("there torch's kernel takes one dtype")
    grad = sums(name, dtype, torch.float32)
    assert grad.dtype == torch.float32
    # rms_norm's y is 1/√(1 + 1.2e-7), which may be the number below 1
    assert grad.tolist() == pytest.approx([ROWS] * 4, rel=1e-7)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "BatchNorm1d", "GroupNorm"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_weight_gradients_round_once(name, dtype):
    """With the values that they are given, half-precision modules sum as float64 does, to one rounding."""
    arguments = {"GroupNorm": (2, 8)}.get(name, (8,))
    module = getattr(torchbp.nn, name)(*arguments).to(DEVICE, dtype)
    wide = getattr(torch.nn, name)(*arguments).double().to(DEVICE)
    if name == "RMSNorm":
        wide.eps = torch.finfo(torch.float32).eps
    x, v = (torch.randn(1000, 8, device=DEVICE).add(1).to(dtype) for _ in range(2))
    module(x).backward(v)
    wide(x.double()).backward(v.double())
    for a, b in zip(module.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "dtype", "each"),
    [
        ("rms_norm", torch.float32, 4),
        ("rms_norm", torch.bfloat16, 2),
        ("local_response_norm", torch.float32, 4),
        ("dyt", torch.float32, 4),
        ("normalize", torch.float32, 4),
    ],
    ids=str,
)
def test_bytes_per_element(name, dtype, each):
    """The input and nothing else of its size, besides parameters."""
    x = torch.randn(4, 64, 128, dtype=dtype, requires_grad=True, device=DEVICE)
    w = torch.ones(128, dtype=dtype, requires_grad=True, device=DEVICE)
    f = getattr(F, name)
    arguments = {
        "rms_norm": ((128,), w),
        "local_response_norm": (5,),
        "dyt": (torch.ones(1, requires_grad=True, device=DEVICE), w, w.detach().clone()),
    }.get(name, ())
    y, kept = kept_storages(lambda x: f(x, *arguments), [x])
    assert y.requires_grad
    assert x.numel() * each <= storage_bytes(kept) <= x.numel() * each + 1024
