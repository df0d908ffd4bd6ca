"""Feedback alignment and direct feedback alignment: the rule in a whole network, and that it learns."""

import copy
import pickle
import threading
from itertools import pairwise

import pytest
import torch
from torch.func import functional_call, grad, vmap

from tests.device import DEVICE
from torchbp import nn


def direct(*widths: int) -> nn.DirectFeedbackAlignment:
    """A network of tanh layers, the first of them torch's; the widths are those of data, hidden layers and output."""
    layers = [nn.Linear(*widths[:2])]
    for a, b in pairwise(widths[1:]):
        layers += [nn.Tanh(), nn.DirectFeedbackAlignmentLinear(a, b, widths[-1])]
    return nn.DirectFeedbackAlignment(nn.Sequential(*layers)).to(DEVICE)


def by_hand(model: nn.DirectFeedbackAlignment, x, t) -> list[torch.Tensor]:
    """The gradients of the paper's equations, without autograd, for half the squared error, summed."""
    linears = [m for m in model.module if isinstance(m, torch.nn.Linear)]
    inputs = [x]
    for layer in linears:
        a = inputs[-1] @ layer.weight.T + layer.bias
        inputs.append(a.tanh())
    e = a - t
    found = []
    for k, layer in enumerate(linears):
        h = inputs[k + 1]
        delta = e if layer is linears[-1] else (e @ linears[k + 1].feedback) * (1 - h**2)
        found += [delta.T @ inputs[k], delta.sum(0)]
    return found


def loss_of(model, x, t):
    return ((model(x) - t) ** 2).sum() / 2


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = direct(5, 7, 6, 3).double()
    return (
        model,
        torch.randn(4, 5, device=DEVICE).double(),
        torch.randn(4, 3, device=DEVICE).double(),
    )


def assert_same(grads, wanted):
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_the_papers_equations(small):
    model, x, t = small
    loss_of(model, x, t).backward()
    with torch.no_grad():
        assert_same([p.grad for p in model.parameters()], by_hand(model, x, t))


def test_several_forwards_a_step(small):
    """Each forward has its own error, whatever the order of the backwards; gradients accumulate."""
    model, x, t = small
    losses = [loss_of(model, x, t), loss_of(model, 2 * x, t), loss_of(model, x, -t)]
    for loss in (losses[1], losses[2], losses[0]):
        loss.backward()
    with torch.no_grad():
        each = [by_hand(model, x, t), by_hand(model, 2 * x, t), by_hand(model, x, -t)]
    wanted = [sum(g) for g in zip(*each, strict=True)]
    assert_same([p.grad for p in model.parameters()], wanted)


def test_backward_twice(small):
    model, x, t = small
    loss = loss_of(model, x, t)
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    assert_same([p.grad for p in model.parameters()], [2 * g for g in once])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_a_layer_used_twice_learns_from_both(small):
    _, x, t = small
    torch.manual_seed(1)
    shared = nn.DirectFeedbackAlignmentLinear(5, 5, 3, device=DEVICE).double()
    last = nn.DirectFeedbackAlignmentLinear(5, 3, 3, device=DEVICE).double()
    first = torch.nn.Linear(5, 5, device=DEVICE).double()
    model = nn.DirectFeedbackAlignment(
        nn.Sequential(first, nn.Tanh(), shared, nn.Tanh(), shared, nn.Tanh(), last)
    )
    loss_of(model, x, t).backward()
    with torch.no_grad():
        g = by_hand(model, x, t)  # of first, shared, shared, last
    wanted = [g[0], g[1], g[2] + g[4], g[3] + g[5], g[6], g[7]]
    assert_same([p.grad for p in model.parameters()], wanted)


def test_one_inside_another_keeps_to_its_own(small):
    """The inner model's layers see the inner output's error, the outer's the outer's."""
    _, x, t = small
    torch.manual_seed(2)
    inner, top = direct(5, 6, 4).double(), torch.nn.Linear(4, 3, device=DEVICE).double()
    outer = nn.DirectFeedbackAlignment(nn.Sequential(inner, top))
    loss_of(outer, x, t).backward()
    with torch.no_grad():
        e = (outer(x) - t) @ top.weight  # top is no direct layer: it passes the error on
        wanted = by_hand(inner, x, inner(x) - e)
    assert_same([p.grad for p in inner.parameters()], wanted)


@pytest.mark.parametrize("kind", ["feedback", "direct"])
def test_state_copies_and_pickles(kind):
    torch.manual_seed(0)
    model = direct(5, 7, 3) if kind == "direct" else nn.FeedbackAlignmentLinear(5, 3, device=DEVICE)
    layer = model.module[2] if kind == "direct" else model
    name = "module.2.feedback" if kind == "direct" else "feedback"
    assert torch.equal(model.state_dict()[name], layer.feedback)
    assert name not in dict(model.named_parameters())
    x, t = torch.randn(4, 5, device=DEVICE), torch.randn(4, 3, device=DEVICE)
    pickled = pickle.dumps(model)
    assert b"torchbp.ops" not in pickled
    fresh = direct(5, 7, 3) if kind == "direct" else nn.FeedbackAlignmentLinear(5, 3, device=DEVICE)
    fresh.load_state_dict(model.state_dict())
    grads = []
    for m in (model, copy.deepcopy(model), pickle.loads(pickled), fresh):
        loss_of(m, x, t).backward()
        grads.append([p.grad for p in m.parameters()])
    for others in grads[1:]:
        assert_same(others, grads[0])


def test_initialised_as_torchs_linear():
    torch.manual_seed(0)
    theirs = torch.nn.Linear(50, 20)
    for make in (
        lambda: nn.FeedbackAlignmentLinear(50, 20),
        lambda: nn.DirectFeedbackAlignmentLinear(50, 20, 10),
    ):
        torch.manual_seed(0)
        layer = make()
        assert torch.equal(layer.weight, theirs.weight)
        assert torch.equal(layer.bias, theirs.bias)
        assert layer.feedback.shape == ((20, 50) if layer.feedback.shape[0] == 20 else (10, 50))
        assert 0.9 < layer.feedback.abs().max() * 50**0.5 <= 1
        assert not layer.feedback.requires_grad


def test_compiled_in_one_graph(small):
    model, x, t = small
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss_of(compiled, x, t).backward()
    with torch.no_grad():
        assert_same([p.grad for p in model.parameters()], by_hand(model, x, t))


def test_per_sample_gradients(small):
    model, x, t = small
    parameters = {k: p.detach() for k, p in model.named_parameters()}

    def of_one(parameters, x, t):
        return ((functional_call(model, parameters, (x,)) - t) ** 2).sum() / 2

    each = vmap(grad(of_one), in_dims=(None, 0, 0))(parameters, x, t)
    with torch.no_grad():
        assert_same([g.sum(0) for g in each.values()], by_hand(model, x, t))


def test_autocast_trains(small):
    model, x, t = small
    model, x, t = model.float(), x.float(), t.float()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = loss_of(model, x, t)
    loss.backward()
    with torch.no_grad():
        wanted = by_hand(model, x, t)
    for p, b in zip(model.parameters(), wanted, strict=True):
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad, b, rtol=0.1, atol=0.03 * b.abs().max().item())


def test_threads_do_not_meet(small):
    """Two threads in forward at once: each model's error reaches its own layers."""
    model, x, t = small
    both_inside = threading.Barrier(2, timeout=60)

    class Meet(torch.nn.Module):
        def forward(self, x):
            both_inside.wait()
            return x

    grads = {}

    def train(name, scale):
        mine = copy.deepcopy(model)
        mine.module.insert(1, Meet())
        mine.module.append(Meet())
        loss_of(mine, scale * x, t).backward()
        grads[name] = [p.grad for p in mine.parameters()]

    threads = [threading.Thread(target=train, args=(s, s)) for s in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for scale, found in grads.items():
            assert_same(found, by_hand(model, scale * x, t))
    assert len(grads) == 2


def test_outside_of_its_wrapper():
    """Data may pass, and evaluation; an input that should learn is refused, also after a forward that failed."""
    layer = nn.DirectFeedbackAlignmentLinear(3, 2, 4, device=DEVICE)
    x = torch.randn(5, 3, requires_grad=True, device=DEVICE)
    assert layer(x.detach()).shape == (5, 2)
    with torch.no_grad():
        assert layer(x).shape == (5, 2)
    with pytest.raises(ValueError, match=r"expected feedback of shape \(2, 3\), got \(4, 3\)"):
        nn.DirectFeedbackAlignment(layer)(x)
    with pytest.raises(RuntimeError):
        nn.DirectFeedbackAlignment(nn.Sequential(layer, torch.nn.Linear(7, 7, device=DEVICE)))(x)
    with pytest.raises(RuntimeError, match="expected to run inside DirectFeedbackAlignment"):
        layer(x)


def test_refuses_what_has_no_one_output():
    with pytest.raises(TypeError, match="expected module to return one tensor, got tuple"):
        nn.DirectFeedbackAlignment(torch.nn.GRU(3, 3, device=DEVICE))(
            torch.randn(2, 3, device=DEVICE)
        )


def test_refuses_shapes_that_do_not_fit():
    from torchbp.functional import direct_feedback_alignment, feedback_alignment_linear

    y, h, b = (
        torch.randn(4, 3, device=DEVICE),
        torch.randn(4, 5, device=DEVICE),
        torch.randn(3, 5, device=DEVICE),
    )
    with pytest.raises(ValueError, match="as many feedback as hidden, got 1 and 2"):
        direct_feedback_alignment(y, [h], [b, b])
    with pytest.raises(ValueError, match=r"hidden of the leading dimensions of output \(4, 3\)"):
        direct_feedback_alignment(y, [h[:2]], [b])
    with pytest.raises(ValueError, match=r"weight and feedback of one shape \(O, I\), got"):
        feedback_alignment_linear(h, b, b.T)


def test_hook_and_optimizer_see_what_backpropagation_would_not_give(small):
    model, x, t = small
    backprop = torch.autograd.grad(loss_of(plain(model), x, t), [model.module[0].weight])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen = []
    model.module[0].weight.register_hook(seen.append)
    before = model.module[0].weight.detach().clone()
    loss_of(model, x, t).backward()
    optimizer.step()
    torch.testing.assert_close(before - model.module[0].weight.detach(), 0.1 * seen[0])
    assert not torch.allclose(seen[0], backprop[0])


def plain(model):
    """The same network with the derivative of its forward."""

    def forward(x):
        for layer in model.module:
            linear = isinstance(layer, torch.nn.Linear)
            x = torch.nn.functional.linear(x, layer.weight, layer.bias) if linear else layer(x)
        return x

    return forward


@pytest.mark.parametrize("rule", ["feedback", "direct"])
def test_learns_digits(rule):
    """Three layers on scikit-learn's digits, from a plain training loop; the first layers must learn too."""
    from sklearn.datasets import load_digits

    x, t = (torch.tensor(a, device=DEVICE) for a in load_digits(return_X_y=True))
    x, order = x.float() / 16, torch.randperm(len(t), generator=torch.Generator().manual_seed(0))
    train, held = order[:1400], order[1400:]
    accuracy = {}
    for frozen in (False, True):
        torch.manual_seed(0)
        if rule == "direct":
            model = direct(64, 40, 40, 10)
        else:
            fa = nn.FeedbackAlignmentLinear
            model = nn.Sequential(fa(64, 40), nn.Tanh(), fa(40, 40), nn.Tanh(), fa(40, 10)).to(
                DEVICE
            )
        live = list(model.parameters())[-2:] if frozen else model.parameters()
        optimizer = torch.optim.Adam(live, 3e-3)
        for _ in range(6):
            for batch in train.split(50):
                optimizer.zero_grad()
                nn.CrossEntropyLoss()(model(x[batch]), t[batch]).backward()
                optimizer.step()
        with torch.no_grad():
            accuracy[frozen] = (model(x[held]).argmax(1) == t[held]).float().mean().item()
    assert accuracy[False] > 0.9
    assert accuracy[False] > accuracy[True] + 0.05, "hidden layers that do not learn"
