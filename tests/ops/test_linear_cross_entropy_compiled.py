"""linear_cross_entropy under torch.compile: no logits are kept, and every gradient is that of eager mode."""

import sys

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import torchbp.functional as F
from tests.device import DEVICE
from tests.ops.conftest import cases_of
from torchbp.ops._op import all_ops
from torchbp.ops.losses._linear_cross_entropy_compiled import opaque

OP = all_ops()["linear_cross_entropy"]
CASES = [
    pytest.param(case, id=repr(case), marks=pytest.mark.slow if case.index % 8 else ())
    for case in cases_of(OP)
]
HOME = sys.modules["torchbp.ops.losses.linear_cross_entropy"]


@pytest.fixture
def early(monkeypatch):
    """Gradients in the forward for every sample."""
    monkeypatch.setattr(HOME, "_worth", lambda *_: True)
    torch._dynamo.reset()


def gradients(f, tensors):
    leaves = [t for t in tensors if t.requires_grad]
    y = f(*tensors)
    seed = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype, device=DEVICE).reshape(y.shape)
    return [y.detach(), *torch.autograd.grad(y, leaves, seed)]


@pytest.mark.parametrize("any_case", CASES)
def test_as_eager(any_case, early):
    f, tensors = any_case.of_tensors(any_case.sample(torch.float32))
    want = gradients(f, tensors)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for got, right in zip(gradients(compiled, tensors), want, strict=True):
        torch.testing.assert_close(got, right, equal_nan=True)


def language_model(dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(256, 16, dtype=dtype, requires_grad=True, device=DEVICE)
    weight = torch.randn(512, 16, dtype=dtype, requires_grad=True, device=DEVICE)
    return x, weight, torch.randint(512, (256,), device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_keeps_no_logits(dtype, dynamic):
    torch._dynamo.reset()
    x, weight, target = language_model(dtype)
    compiled = torch.compile(
        F.linear_cross_entropy, backend="aot_eager", fullgraph=True, dynamic=dynamic
    )
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        loss = compiled(x, weight, target)
    assert sum(kept.values()) < x.shape[0] * weight.shape[0]  # a byte for each
    got = torch.autograd.grad(loss, (x, weight))
    want = torch.autograd.grad(F.linear_cross_entropy(x, weight, target), (x, weight))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_only_the_gradients_that_are_wanted(frozen):
    torch._dynamo.reset()
    x, weight, target = language_model()
    (x if frozen == "x" else weight).requires_grad_(False)
    compiled = torch.compile(F.linear_cross_entropy, backend="aot_eager", fullgraph=True)
    compiled(x, weight, target).backward()
    got = [x.grad, weight.grad]
    x.grad = weight.grad = None
    F.linear_cross_entropy(x, weight, target).backward()
    for a, b in zip(got, (x.grad, weight.grad), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_tokens():
    torch._dynamo.reset()
    x, weight, target = language_model()
    compiled = torch.compile(F.linear_cross_entropy, backend="aot_eager", fullgraph=True)
    got = compiled(x, weight, target, return_tokens=True)
    want = F.linear_cross_entropy(x, weight, target, return_tokens=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_second_derivative_is_the_formula_s():
    """Only the backend "eager" has one: others refuse."""
    torch._dynamo.reset()
    x, weight, target = (t.double() if t.is_floating_point() else t for t in language_model())
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()

    def penalty(f):
        loss = f(x, weight, target, z_loss=0.1)
        first = torch.autograd.grad(loss, (x, weight), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight))

    compiled = torch.compile(F.linear_cross_entropy, backend="eager", fullgraph=True)
    for a, b in zip(penalty(compiled), penalty(F.linear_cross_entropy), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("argnums", [(0,), (1,), (0, 1)], ids=str)
def test_compiled_transforms_run_the_formula(argnums):
    torch._dynamo.reset()
    x, weight, target = (t.detach() for t in language_model())

    def f(x, weight):
        return F.linear_cross_entropy(x, weight, target, z_loss=0.1)

    def three(x, weight):
        first = torch.func.grad(f, argnums)
        _, tangent = torch.func.jvp(lambda x: f(x, weight), (x,), (x.cos(),))
        second = torch.func.grad(lambda x: first(x, weight)[0].square().sum())
        return (*first(x, weight), tangent, second(x))

    got = torch.compile(three, backend="aot_eager", fullgraph=True)(x, weight)
    for a, b in zip(got, three(x, weight), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch 2.14's opcheck
@pytest.mark.parametrize("tokens", [False, True])
def test_the_op_is_what_torch_expects_of_one(tokens):
    x, weight, target = language_model()
    bias, w = torch.randn(512, requires_grad=True, device=DEVICE), torch.rand(512, device=DEVICE)
    settings = ("mean", -100, 0.1, 0.1, 20.0, 64, [True, True, True], tokens)
    torch.library.opcheck(opaque, (x, weight, bias, target, w, *settings))
    settings = ("sum", 3, 0.0, 0.0, None, 64, [False, True, False], tokens)
    torch.library.opcheck(opaque, (x.detach(), weight, None, target, None, *settings))


@pytest.mark.parametrize("tokens", [False, True])
def test_without_a_gradient(tokens):
    """As a model is evaluated: under no_grad, and of inputs that want none."""
    torch._dynamo.reset()
    x, weight, target = language_model()
    compiled = torch.compile(F.linear_cross_entropy, backend="aot_eager", fullgraph=True)
    want = F.linear_cross_entropy(x, weight, target, return_tokens=tokens)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, weight, target, return_tokens=tokens), want)
    given = (x.detach(), weight.detach(), target)
    torch.testing.assert_close(compiled(*given, return_tokens=tokens), want)
