"""Whole networks, trained lean and not, have the same gradients to the last bit, in every way of training."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import torchbp
from benchmarks.models import GPT, MODELS, Llama, ResNet, loss
from tests.recompute.compared import Count, both, same, step
from torchbp.recompute._live import Live

AUTOCAST = partial(torch.autocast, "cpu", torch.bfloat16)
IDS = ["float32", "autocast"]


def made(name):
    torch.manual_seed(0)
    config = MODELS[name]
    return config.small(), *config.small_data(3)


@pytest.mark.parametrize("context", [nullcontext, AUTOCAST], ids=IDS)
@pytest.mark.parametrize("name", MODELS)
def test_same_bits(name, context, monkeypatch):
    model, x, y = made(name)
    converted, lean = both(model)
    want = step(converted, x, y, loss, context)
    count = Count(monkeypatch)
    same(step(lean, x, y, loss, context), want)
    assert count.shared


# Of what torch keeps: in float32, and under autocast, where a norm's float32 output is let go as well.
SHARES = {"GPT": (0.64, 0.58), "Llama": (0.60, 0.51), "ResNet-20": (0.61, 0.62)}
MIDDLING = {
    "GPT": lambda: GPT(vocabulary=64, width=64, heads=4, depth=4, length=64),
    "Llama": lambda: Llama(vocabulary=64, width=64, heads=4, hidden=176, depth=4),
    "ResNet-20": lambda: ResNet(width=8, blocks=3, classes=10),
}


@pytest.mark.parametrize("name", SHARES)
def test_keeps_far_fewer_bytes(name):
    torch.manual_seed(0)
    model = MIDDLING[name]()
    x, y = torch.randint(64, (2, 4, 64))
    if name == "ResNet-20":
        x, y = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))

    def kept(model, context):
        with Live(lambda: "", [*model.parameters(), *model.buffers(), x, y]) as live, context():
            value = loss(model(x), y)
            assert value.requires_grad
            return live.now

    lean = torchbp.lean(copy.deepcopy(model))
    got = tuple(kept(lean, c) / kept(model, c) for c in (nullcontext, AUTOCAST))
    assert got[0] <= SHARES[name][0]
    assert got[1] <= SHARES[name][1]


@pytest.mark.parametrize("name", MODELS)
def test_accumulated_over_forwards_and_backwards(name):
    model, x, y = made(name)

    def accumulated(m):
        torch.manual_seed(1)
        losses = [loss(m(x), y) for _ in range(2)]
        losses[0].backward(retain_graph=True)
        losses[0].backward()
        losses[1].backward()
        return [p.grad for p in m.parameters()]

    converted, lean = both(model)
    same(accumulated(lean), accumulated(converted))


@pytest.mark.parametrize("name", MODELS)
def test_frozen_parts(name, monkeypatch):
    model, x, y = made(name)
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 == 1)
    converted, lean = both(model)
    want = step(converted, x, y, loss)
    count = Count(monkeypatch)
    same(step(lean, x, y, loss), want)
    assert count.shared or name == "LSTM"


@pytest.mark.parametrize("name", MODELS)
def test_evaluation(name):
    model, x, y = made(name)
    converted, lean = both(model.eval())
    same(step(lean, x, y, loss), step(converted, x, y, loss))


@pytest.mark.parametrize("name", ["GPT", "ResNet-20"])
def test_double_backward(name):
    model, x, y = made(name)
    math = nn.attention.SDPBackend.MATH  # the fused one has no second derivative

    def penalty(m):
        torch.manual_seed(1)
        with nn.attention.sdpa_kernel(math):
            first = torch.autograd.grad(loss(m(x), y), list(m.parameters()), create_graph=True)
            sum(g.square().sum() for g in first).backward()
        return [*first, *(p.grad for p in m.parameters())]

    converted, lean = both(model)
    same(penalty(lean), penalty(converted))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_parts(reentrant, monkeypatch):
    model, x, y = made("GPT")

    class Checkpointed(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=reentrant)

    model.blocks[0] = Checkpointed(model.blocks[0])
    converted, lean = both(model)
    want = step(converted, x, y, loss)
    count = Count(monkeypatch)
    same(step(lean, x, y, loss), want)
    assert count.shared


@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_a_checkpoint_it_yields(reentrant, monkeypatch):
    model, x, y = made("ViT")
    x.requires_grad_()  # the reentrant one wants it

    class Outer(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return checkpoint(self.model, x, use_reentrant=reentrant)

    converted, lean = both(model)
    want = step(Outer(converted), x, y, loss)
    count = Count(monkeypatch)
    same(step(Outer(lean), x, y, loss), want)
    assert reentrant or not count.shared + count.kept


def test_inside_offloading_it_yields():
    model, x, y = made("ViT")
    converted, lean = both(model)
    offload = torch.autograd.graph.save_on_cpu
    same(step(lean, x, y, loss, offload), step(converted, x, y, loss, offload))


def test_compiled_it_is_inert():
    model, x, y = made("ViT")
    converted, lean = both(model.eval())
    want = step(torch.compile(converted, backend="aot_eager", fullgraph=True), x, y, loss)
    same(step(torch.compile(lean, backend="aot_eager", fullgraph=True), x, y, loss), want)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of dynamo's
def test_a_compiled_block_of_a_lean_model(monkeypatch):
    model, x, y = made("GPT")
    converted, lean = both(model.eval())
    for m in (converted, lean):
        m.blocks[0].compile(backend="aot_eager")
    want = step(converted, x, y, loss)
    count = Count(monkeypatch)
    same(step(lean, x, y, loss), want)
    assert count.shared


def test_under_torch_func_it_is_inert():
    model, x, y = made("ViT")
    converted, lean = both(model.eval())

    def grads(m):
        parameters = dict(m.named_parameters())
        return torch.func.grad(lambda p: loss(torch.func.functional_call(m, p, (x,)), y))(
            parameters
        )

    got, want = grads(lean), grads(converted)
    same(list(got.values()), list(want.values()))


def test_no_grad_and_inference_keep_nothing(monkeypatch):
    model, x, _ = made("GPT")
    _, lean = both(model)
    count = Count(monkeypatch)
    with torch.no_grad():
        lean(x)
    with torch.inference_mode():
        lean(x)
    assert not count.kept + count.shared


def test_trains_on_weights_that_an_optimizer_moves():
    model, x, y = made("GPT")
    converted, lean = both(model)

    def trained(m):
        optimizer = torch.optim.AdamW(m.parameters(), 1e-2)
        torch.manual_seed(1)
        for _ in range(4):
            optimizer.zero_grad()
            loss(m(x), y).backward()
            optimizer.step()
        return list(m.parameters())

    same(trained(lean), trained(converted))


def test_scope_around_a_whole_step_with_its_backward():
    model, x, y = made("GPT")
    converted, other = torchbp.convert(model), torchbp.convert(copy.deepcopy(model))
    want = step(converted, x, y, loss)
    torch.manual_seed(1)
    with torchbp.lean_scope():
        value = loss(other(x), y)
        value.backward()
    same([value, *(p.grad for p in other.parameters())], want)
