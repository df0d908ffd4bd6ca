"""Batch and instance normalization beyond their values: running statistics, momentum, evaluation, what is kept."""

import copy
import itertools

import pytest
import torch

import torchbp
import torchbp.functional as F
from tests.device import DEVICE
from tests.ops.test_autograd import kept_storages, storage_bytes
from torchbp.ops._function import formula_only

SHAPES = {"BatchNorm1d": (6, 3), "BatchNorm2d": (4, 3, 5, 2), "BatchNorm3d": (2, 3, 2, 3, 2)}
SHAPES |= {"InstanceNorm1d": (4, 3, 5), "InstanceNorm2d": (4, 3, 5, 2)}


@pytest.mark.cpu("elsewhere torch's kernels take other dtypes")
@pytest.mark.parametrize("dtypes", [*itertools.product((torch.float32, torch.float64), repeat=3)])
@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_statistics_of_two_dtypes(name, dtypes):
    """Input, mean and variance: in evaluation torch's value, or an error of its type."""
    of_x, of_mean, of_var = dtypes
    x = torch.randn(4, 3, 5, dtype=of_x)
    statistics = torch.tensor([0.1, 0.2, 0.3], dtype=of_mean), torch.ones(3, dtype=of_var)

    def outcome(module):
        try:
            return getattr(module, name)(x, *statistics, None, None, False)
        except RuntimeError as error:
            return type(error)

    ours, theirs = outcome(F), outcome(torch.nn.functional)
    if theirs is RuntimeError:
        assert ours is theirs
    else:
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("track", [True, False])
def test_statistics_over_steps_as_in_torch(name, momentum, track):
    """Buffers, outputs and gradients of torch's module, over training steps, frozen statistics and evaluation."""
    kwargs = {"momentum": momentum, "track_running_stats": track, "affine": True}
    ours = getattr(torchbp.nn, name)(3, **kwargs).to(DEVICE).double()
    theirs = getattr(torch.nn, name)(3, **kwargs).to(DEVICE).double()
    with torch.no_grad():
        for module in (ours, theirs):
            module.weight.copy_(torch.tensor([0.5, -1.0, 2.0], device=DEVICE))
    for step in range(5):
        training = step < 4
        x = (3 * torch.randn(SHAPES[name], dtype=torch.float64, device=DEVICE) + 1).requires_grad_()
        v = torch.randn_like(x)
        results = []
        for module in (ours, theirs):
            module.train(training)
            y = module(x)
            grads = torch.autograd.grad(y, [x, *module.parameters()], v)
            results.append([y, *grads, *module.state_dict().values()])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_training_with_statistics_that_are_not_tracked():
    """track_running_stats switched off later: the batch's statistics in training, the buffers in evaluation."""
    ours, theirs = torchbp.nn.BatchNorm1d(3, device=DEVICE), torch.nn.BatchNorm1d(3, device=DEVICE)
    for module in (ours, theirs):
        module.track_running_stats = False
    x = torch.randn(5, 3, device=DEVICE)
    before = copy.deepcopy(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    for key, buffer in ours.state_dict().items():
        assert torch.equal(buffer, before[key])


@pytest.mark.parametrize("training", [True, False])
def test_weight_and_statistics_of_any_stride(training):
    """Torch 2.13 on the CPU reads a strided weight of two-dimensional input as if it were contiguous, in backward."""
    x = torch.randn(5, 2, requires_grad=True, device=DEVICE)
    strided = [torch.rand(4, device=DEVICE).add(0.5)[::2].requires_grad_() for _ in range(4)]
    dense = [t.detach().contiguous().requires_grad_() for t in strided]
    v = torch.randn(5, 2, device=DEVICE)
    results = []
    for w, b, mean, var in (strided, dense):
        y = F.batch_norm(x, mean.detach(), var.detach(), w, b, training)
        results.append(torch.autograd.grad(y, (x, w, b), v))
    with formula_only():
        y = F.batch_norm(x, mean.detach(), var.detach(), w, b, training)
        results.append(torch.autograd.grad(y, (x, w, b), v))
    for ours, same, formula in zip(*results, strict=True):
        torch.testing.assert_close(ours, same)
        torch.testing.assert_close(ours, formula)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("buffers", ["half", "float"])
def test_half_precision_rounds_once(dtype, buffers):
    """A mean far from 0 is not rounded to half precision before it is subtracted."""
    x = (torch.randn(64, 4, 9, device=DEVICE) + 10).to(dtype)
    mean, var = torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)
    if buffers == "half":
        mean, var = mean.to(dtype), var.to(dtype)
    y = F.batch_norm(x, mean, var, training=True)
    exact = F.batch_norm(x.double(), None, None, training=True)
    assert (y.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    torch.testing.assert_close(mean.double(), 0.1 * x.double().mean((0, 2)), rtol=4e-3, atol=0)
    z = F.instance_norm(x)
    exact = F.instance_norm(x.double())
    assert (z.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_frozen_evaluation_keeps_nothing_of_the_input():
    x = torch.randn(64, 8, 16, requires_grad=True, device=DEVICE)
    statistics = torch.randn(8, device=DEVICE), torch.rand(8, device=DEVICE) + 0.5
    w, b = torch.randn(8, device=DEVICE), torch.randn(8, device=DEVICE)
    for f in (F.batch_norm, lambda *a: F.instance_norm(*a, use_input_stats=False)):
        _, kept = kept_storages(lambda x, f=f: f(x, *statistics, w, b), [x])
        assert storage_bytes(kept) == 2 * 8 * 4  # the weight and the variance


def test_under_torch_func():
    """func.grad of a training step updates the running statistics, as torch's does; vmap over them is refused."""
    x, w = torch.randn(5, 3, device=DEVICE), torch.randn(3, device=DEVICE)
    ours, theirs = [(torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)) for _ in range(2)]

    def loss(x, f, buffers):
        return f(x, *buffers, w, training=True).sin().sum()

    a = torch.func.grad(loss)(x, F.batch_norm, ours)
    b = torch.func.grad(loss)(x, torch.nn.functional.batch_norm, theirs)
    torch.testing.assert_close((a, *ours), (b, *theirs))
    assert ours[0].abs().sum() > 0
    with pytest.raises(RuntimeError, match="running_mean"):
        torch.vmap(lambda x: F.batch_norm(x, *ours, training=True))(x.expand(2, 5, 3))


def test_compiled_training_step_updates_the_statistics():
    torch._dynamo.reset()
    ours, theirs = torchbp.nn.BatchNorm1d(3, device=DEVICE), torch.nn.BatchNorm1d(3, device=DEVICE)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x = torch.randn(5, 3, requires_grad=True, device=DEVICE)
        for y, module in ((compiled(x), ours), (theirs(x), theirs)):
            grads = torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])
            module.result = (y, *grads, *module.buffers())
        torch.testing.assert_close(ours.result, theirs.result)


def test_mixed_precision_as_in_torch():
    """Half-precision input with float32 parameters and statistics: torch's dtypes."""
    x = torch.randn(6, 3, 2, device=DEVICE).bfloat16().requires_grad_()
    ours, theirs = torchbp.nn.BatchNorm1d(3, device=DEVICE), torch.nn.BatchNorm1d(3, device=DEVICE)
    for module in (ours, theirs):
        y = module(x)
        module.result = (y, *torch.autograd.grad(y.float().sin().sum(), [x, *module.parameters()]))
    for a, b in zip(ours.result, theirs.result, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
