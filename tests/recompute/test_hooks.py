"""Where lean's hooks stand: among others', one inside the other, when a forward is broken off, in threads."""

import copy
import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import torchbp
import torchbp.functional as F
from tests.recompute.compared import Count, both, same, step
from torchbp.ops import _recipe
from torchbp.recompute import _lean, _scope


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 3))


def data():
    torch.manual_seed(2)
    return torch.randn(5, 6), torch.randint(3, (5,))


def top():
    """Return the innermost pack hook."""
    found = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return found and found[0]


def is_ours():
    return type(top()) is _scope.Pack


class Asks(nn.Module):
    """Notes whether lean's hooks are there as it runs; then does what it was told."""

    def __init__(self, does=lambda: None):
        super().__init__()
        self.does, self.found = does, []

    def forward(self, x):
        self.found.append(is_ours())
        self.does()
        return x


# ---------------------------------------------------------------------------------- others' hooks


def times_two():
    return saved_tensors_hooks(lambda t: t * 2 if t.is_floating_point() else t, lambda t: t)


@pytest.mark.parametrize("hooks", [times_two, save_on_cpu], ids=["times_two", "save_on_cpu"])
@pytest.mark.parametrize("budget", [None, 0.6])
def test_others_outside_come_first(hooks, budget, monkeypatch):
    converted, lean = torchbp.convert(network()), torchbp.lean(network(), budget)
    want = step(converted, *data(), F.cross_entropy, hooks)
    count = Count(monkeypatch)
    same(step(lean, *data(), F.cross_entropy, hooks), want)
    with hooks():
        others = top()
        with torchbp.lean_scope():
            assert top() is others
        assert top() is others
    assert not count.kept + count.shared


class Inside(nn.Module):
    """Hooks of its own around the middle of a network, whose ends are lean's."""

    def __init__(self, hooks):
        super().__init__()
        self.net, self.hooks = network(), hooks

    def forward(self, x):
        x = self.net[:2](x)
        with self.hooks():
            x = self.net[2:4](x)
        return F.gelu(self.net[4](x)) * x[:, :3]


@pytest.mark.parametrize("hooks", [times_two, save_on_cpu], ids=["times_two", "save_on_cpu"])
@pytest.mark.parametrize("budget", [None, 0.6])
def test_others_inside_see_what_is_theirs(hooks, budget):
    model = Inside(hooks)
    converted, lean = torchbp.convert(copy.deepcopy(model)), torchbp.lean(model, budget)
    for _ in range(2):
        for m in (converted, lean):
            m.zero_grad()
        same(step(lean, *data(), F.cross_entropy), step(converted, *data(), F.cross_entropy))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_scope_inside_a_checkpoint(reentrant):
    x = data()[0].requires_grad_()
    model = torchbp.convert(network())

    def forward(x, scope):
        with scope():
            return model(x)

    got = []
    for scope in (nullcontext, torchbp.lean_scope):
        model.zero_grad()
        checkpoint(forward, x, scope, use_reentrant=reentrant).square().sum().backward()
        got.append([p.grad for p in model.parameters()])
    same(*got)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_inert_while_traced():
    x, _ = data()
    lean = torchbp.lean(nn.Sequential(network(), asks := Asks()))
    traced: Any = torch.jit.trace(lean, x)
    assert not asks.found[0]
    torch.testing.assert_close(traced(x), lean(x))  # it runs torch's own ops
    assert asks.found[-1]


def test_inert_under_vmap():
    lean = torchbp.lean(nn.Sequential(network(), asks := Asks()))
    torch.vmap(lean)(data()[0])
    assert asks.found == [False]


def test_a_scope_in_a_compiled_function():
    w = torch.eye(6, requires_grad=True)

    def f(x):
        with torchbp.lean_scope():
            return F.linear(F.gelu(F.linear(x, w)), w)

    x, _ = data()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), f(x))


# ---------------------------------------------------------------------------------- one inside the other


def test_the_outermost_has_all(monkeypatch):
    inner = torchbp.lean(nn.Sequential(network(), Asks()))
    outer = torchbp.lean(nn.Sequential(inner, Asks()))
    with torchbp.lean_scope():
        scope = top()
        outer(data()[0])
        assert top() is scope
        with torchbp.lean_scope():
            assert top() is scope
        assert top() is scope
    assert inner[1].found == outer[1].found == [True]


def test_a_budget_is_kept_inside_a_scope_that_has_none():
    lean = torchbp.lean(nn.Sequential(network(), Asks()), budget=0.5)
    plan = _lean._hooks_of(lean).plan
    with torchbp.lean_scope():
        scope = top()
        F.cross_entropy(lean(data()[0]), data()[1]).backward()
        assert top() is scope
    assert any(choice.dropped for choice in plan.choices)
    outer = torchbp.lean(nn.Sequential(lean), budget=0.6)  # its own has all
    plan.choices = None
    outer(data()[0])
    assert plan.choices is None
    assert _lean._hooks_of(outer).plan.choices is not None


def test_whether_parameters_may_be_freed_is_the_outermost_s_to_say(single_process_group):
    found = []
    lean = torchbp.lean(nn.Sequential(network(), Asks(lambda: found.append(_recipe.sharded))), 0.5)
    lean(data()[0])
    with torchbp.lean_scope():  # what it is for may be sharded, who knows
        lean(data()[0])
        found.append(_recipe.sharded)
    assert found == [False, True, True]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_scope_is_closed_whatever_happens(error):
    def fail(depth):
        with torchbp.lean_scope():
            try:
                if depth:
                    fail(depth - 1)
                raise error("on purpose")
            finally:
                assert is_ours()

    with pytest.raises(error):
        fail(2)
    assert top() is None


# ---------------------------------------------------------------------------------- broken off


def stopped(model, error):
    """Break the forward of a lean model off, before its end."""

    def stop(*_args):
        raise error("on purpose")

    handle = model[1].register_forward_hook(stop)
    with pytest.raises(error):
        model(data()[0])
    handle.remove()


def test_an_error_in_forward_closes_it_and_measures_nothing():
    model = torchbp.lean(network(), budget=0.5)
    stopped(model, ValueError)
    assert top() is None
    assert _lean._hooks_of(model).plan.choices is None
    model(data()[0])
    before = _lean._hooks_of(model).plan.choices
    assert len(before) == 2
    stopped(model, ValueError)
    assert _lean._hooks_of(model).plan.choices is before


def test_after_ctrl_c_the_next_forward_puts_things_right():
    """torch calls no hook then."""
    converted, lean = both(nn.Sequential(network(), Asks(), nn.Identity()))
    want = step(converted, *data(), F.cross_entropy)
    stopped(lean, KeyboardInterrupt)
    assert is_ours()
    same(step(lean, *data(), F.cross_entropy), want)
    assert top() is None
    stopped(lean, KeyboardInterrupt)
    with torchbp.lean_scope():
        assert not _scope._thread.running
    assert top() is None


def test_after_ctrl_c_in_a_part_of_a_part():
    part = torchbp.lean(nn.Sequential(network(), nn.Identity()), budget=0.6)
    middle = torchbp.lean(nn.Sequential(nn.Identity(), nn.Sequential(part)))
    whole = torchbp.lean(nn.Sequential(middle, nn.Identity()))

    def stop(*_args):
        raise KeyboardInterrupt

    handle = part[1].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        whole(data()[0])
    handle.remove()
    assert len(_scope._thread.running) == 3
    whole(data()[0])
    assert top() is None
    assert not _scope._thread.running


@pytest.mark.parametrize("again", [True, False])
def test_after_ctrl_c_in_a_part_the_whole_is_closed(again):
    part = torchbp.lean(network(), budget=0.6)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.asks = part, Asks()

        def forward(self, x):
            stopped(self.part, KeyboardInterrupt)
            return self.asks(self.part(x) if again else self.part[0](x))

    whole = torchbp.lean(Whole())
    whole(data()[0]).sum().backward()
    assert whole.asks.found == [True]
    assert top() is None
    assert not _scope._thread.running


def test_a_model_that_calls_itself(monkeypatch):
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x, depth=3):
            x = F.gelu(self.linear(x))
            return self.linear(self(x, depth - 1)) if depth else x

    converted, lean = both(Recursive())
    want = step(converted, data()[0], None, lambda y, _: y.square().sum())
    count = Count(monkeypatch)
    same(step(lean, data()[0], None, lambda y, _: y.square().sum()), want)
    assert count.shared


def test_a_pre_hook_that_fails_before_ours_leaves_nothing():
    lean = torchbp.lean(network())

    def fail(*_args):
        raise ValueError("too early")

    handle = lean.register_forward_pre_hook(fail, prepend=True)
    with pytest.raises(ValueError, match="too early"):
        lean(data()[0])
    handle.remove()
    assert top() is None
    lean(data()[0]).sum().backward()


def test_a_forward_without_gradients_measures_nothing():
    lean = torchbp.lean(network(), budget=0.5)
    plan = _lean._hooks_of(lean).plan
    with torch.no_grad():
        lean(data()[0])
    assert plan.choices is None
    lean(data()[0])
    choices = plan.choices
    with torch.no_grad():
        lean(data()[0])
    assert plan.choices is choices is not None


def test_hooks_put_on_before_and_after_run_inside_and_outside():
    model, found = network(), []
    model.register_forward_pre_hook(lambda *_: found.append(is_ours()))
    model.register_forward_hook(lambda *_: found.append(is_ours()))
    torchbp.lean(model)
    model.register_forward_hook(lambda *_: found.append(is_ours()))
    model(data()[0])
    assert found == [True, True, False]


# ---------------------------------------------------------------------------------- threads


def test_a_scope_is_its_thread_s_own():
    found = []
    with torchbp.lean_scope():
        thread = threading.Thread(target=lambda: found.append(top()))
        thread.start()
        thread.join()
    assert found == [None]


def test_one_model_with_a_budget_in_two_forwards_at_once():
    """One runs as a whole while the other stands in its middle."""
    first, second = threading.Event(), threading.Event()

    def pause():
        if threading.current_thread().name == "first":
            first.set()
            assert second.wait(10)

    converted = torchbp.convert(network())
    parts = [*copy.deepcopy(converted)]
    lean = torchbp.lean(nn.Sequential(*parts[:3], Asks(pause), *parts[3:]), budget=0.4)
    want = torch.autograd.grad(converted(data()[0]).sum(), [*converted.parameters()])
    results = {}

    def run(name):
        y = lean(data()[0])
        results[name] = y, torch.autograd.grad(y.sum(), [*lean.parameters()])

    for choices in (None, 2, 2):  # measured, then let go
        plan = _lean._hooks_of(lean).plan
        assert (plan.choices and len(plan.choices)) == choices
        first.clear()
        second.clear()
        thread = threading.Thread(target=run, args=("first",), name="first")
        thread.start()
        assert first.wait(10)
        run("second")
        second.set()
        thread.join()
        for _, got in results.values():
            same(got, want)


def test_backward_in_two_threads_at_once():
    """One stands in the middle of its backward, holding what it has made, while the other begins and ends."""
    first, second = threading.Event(), threading.Event()
    results = {}

    def pause(_):
        first.set()
        assert second.wait(10)

    def run(name):
        w = torch.eye(8, requires_grad=True)
        with torchbp.lean_scope():
            y = F.gelu(F.linear(torch.ones(4, 8), w))
            z = F.linear(y, w)
            later = F.linear(y, w)
        if name == "first":
            z.register_hook(pause)
        results[name] = torch.autograd.grad((z + later.square()).sum(), w)

    thread = threading.Thread(target=run, args=("first",))
    thread.start()
    assert first.wait(10)
    run("second")
    second.set()
    thread.join()
    same(results["first"], results["second"])
