"""Norms and deviations of elements whose squares are no float32: values and gradients are those of float64, rounded."""

import pytest
import torch
from torch.testing import assert_close

import torchbp.functional as F
from torchbp.ops._invalid import OVERFLOW, at_hand, clear, raised

pytestmark = pytest.mark.cpu("on a GPU no look is taken")

W, B = torch.linspace(0.5, 2, 6), torch.linspace(-1, 1, 6)
SIGNS = torch.tensor([1, -1, 1, -1])
CALLS = {
    "layer_norm": lambda x, *_: F.layer_norm(x, (6,), W.to(x.dtype), B.to(x.dtype)),
    "rms_norm": lambda x, *_: F.rms_norm(x, (6,), W.to(x.dtype)),
    "group_norm": lambda x, *_: F.group_norm(x, 2, W.to(x.dtype), B.to(x.dtype)),
    "instance_norm": lambda x, *_: F.instance_norm(x.unsqueeze(0)),
    "batch_norm": lambda x, *_: F.batch_norm(x, None, None, training=True),
    "local_response_norm": lambda x, *_: F.local_response_norm(x.unsqueeze(-1), 3, beta=0.5, k=0.0),
    "normalize": lambda x, *_: F.normalize(x),
    "normalize-1": lambda x, *_: F.normalize(x, 1.0),
    "normalize-3": lambda x, *_: F.normalize(x, 3.0),
    "normalize-inf": lambda x, *_: F.normalize(x, torch.inf),
    "cosine_embedding": lambda x, y, _: F.cosine_embedding_loss(x, y, SIGNS, -0.9),
    "triplet_margin": F.triplet_margin_loss,
    "triplet_margin-swap": lambda *t: F.triplet_margin_loss(*t, swap=True),
    "triplet_with_distance": F.triplet_margin_with_distance_loss,
    "info_nce": lambda x, y, _: F.info_nce_loss(x, y, 1.0),
    "gaussian_nll": lambda x, y, _: F.gaussian_nll_loss(x, y, x.abs()),
}


@pytest.fixture(params=[1, 2], ids="{}-threads".format)
def _threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def step(call, tensors, dtype):
    """Return the value and the gradients by ``tensors``, each divided by its own largest element."""
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    y = call(*leaves)
    assert y.dtype == dtype
    torch.manual_seed(1)
    v = torch.randn(y.shape).bfloat16().to(dtype)
    found = [y, *torch.autograd.grad(y, leaves, v, allow_unused=True)]
    return [t / t.abs().max() for t in found if t is not None]


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e13, 1e17, 1e22, 1e30], ids="{:.0e}".format)
@pytest.mark.parametrize("name", CALLS)
def test_large(name, scale, dtype):
    torch.manual_seed(0)
    x = (torch.randn(4, 6) * scale).bfloat16()
    tensors = [x, *((x.float() * torch.rand(4, 6).add(0.5)).bfloat16() for _ in range(2))]
    clear(OVERFLOW)  # as behind kernels that have raised nothing
    found = step(CALLS[name], tensors, dtype)
    truth = step(CALLS[name], tensors, torch.float64)
    for a, b in zip(found, truth, strict=True):
        assert_close(a, b.to(dtype), rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", ["layer_norm", "group_norm", "instance_norm", "batch_norm"])
def test_large_second_order(name):
    torch.manual_seed(0)
    x, v = torch.randn(4, 6) * 1e15, torch.randn(4, 6)

    def second(dtype):
        x_, v_ = x.to(dtype).requires_grad_(), v.to(dtype)
        (first,) = torch.autograd.grad(CALLS[name](x_).pow(3).sum(), x_, create_graph=True)
        (found,) = torch.autograd.grad(first, x_, v_)
        return found / found.abs().max()

    assert_close(second(torch.float32), second(torch.float64).float(), rtol=0, atol=1e-5)


def test_one_large_row_leaves_the_others_as_they_are():
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    large = x.clone()
    large[0] *= 1e30
    for call in (CALLS["layer_norm"], CALLS["rms_norm"], CALLS["normalize"]):
        assert_close(call(large)[1:], call(x)[1:], rtol=0, atol=5e-7)
        assert_close(call(large)[0], call(x)[0], rtol=0, atol=1e-4)  # ε is no part of it


def test_running_statistics_move_once():
    x = torch.randn(4, 6) * 1e25
    mean, var = torch.zeros(6), torch.ones(6)
    F.batch_norm(x, mean, var, training=True, momentum=0.5)
    assert_close(mean, x.mean(0) / 2)


@pytest.mark.skipif(not at_hand() and torch.get_num_threads() == 1, reason="no flags here")
def test_nobody_else_raises_the_flag_for_it():
    torch.set_num_threads(1)
    clear(OVERFLOW)
    for call in CALLS.values():
        step(call, [torch.randn(4, 6) for _ in range(3)], torch.float32)
        assert not raised(OVERFLOW)
