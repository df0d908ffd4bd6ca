"""What lean does to a model, what it leaves alone, and what it leaves behind: nothing."""

import copy
import gc
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import torchbp
import torchbp.functional as F
from tests.recompute.compared import Count, both, same, step
from torchbp.ops import _recipe
from torchbp.recompute import _graph
from torchbp.recompute._kept import Kept, Made, Recipe, Share


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8), nn.Dropout(0.2)),
        *(nn.SiLU(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 3)),
    )


def alive():
    return [o for o in gc.get_objects() if type(o) in (Kept, Made, Recipe, Share)]


def test_nothing_is_left_after_1000_steps():
    model = torchbp.lean(network())
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x, y = torch.randn(4, 6), torch.randint(3, (4,))
    gc.collect()
    gc.disable()
    try:
        counts = []
        for i in range(1000):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            if i % 250 == 0:
                counts.append(len(alive()))
        assert counts == [0, 0, 0, 0]  # though the loss, and so the graph, is still there
    finally:
        gc.enable()


def test_nothing_is_left_of_a_forward_without_backward():
    model = torchbp.lean(network())
    gc.collect()
    gc.disable()
    try:
        y = model(torch.randn(4, 6))
        assert alive()
        del y
        assert not alive()
    finally:
        gc.enable()


def test_what_is_made_for_one_is_let_go_at_the_end_of_a_retaining_backward():
    w = torch.randn(8, 8, requires_grad=True)
    with torchbp.lean_scope():
        y = F.gelu(F.linear(torch.randn(4, 8), w))
        z = F.linear(y, w).sum() + F.linear(y, w.t()).sum()
    z.backward(retain_graph=True)
    assert all(m.made is None for m in alive() if type(m) is Made)


def test_shared_by_several_it_is_made_once(monkeypatch):
    calls = []
    w = torch.randn(8, 8, requires_grad=True)
    with torchbp.lean_scope():
        y = F.gelu(F.linear(torch.randn(4, 8), w))
        z = sum(F.linear(y, w).sum() for _ in range(3))
    (recipe,) = [r for r in alive() if type(r) is Recipe]
    call = recipe.call
    recipe.call = lambda *args: calls.append(1) or call(*args)
    z.backward(retain_graph=True)
    z.backward()
    assert len(calls) == 2


def test_let_go_as_soon_as_the_last_who_shares_it_is_done():
    w = torch.randn(8, 8, requires_grad=True)
    found = []
    with torchbp.lean_scope():
        h = F.linear(torch.randn(4, 8), w)
        y = F.gelu(h)
        z = F.linear(y, w).sum() + F.linear(y, w.t()).sum()
    y.register_hook(lambda _: found.append([m for m in alive() if type(m) is Made]))
    del h, y
    z.backward()
    assert found == [[]]  # both products are done, GELU is not


def test_an_exception_in_forward_closes_it():
    class Fails(nn.Module):
        def forward(self, x):
            raise ValueError("on purpose")

    model = torchbp.lean(nn.Sequential(nn.Linear(3, 3), Fails()))
    with pytest.raises(ValueError, match="on purpose"):
        model(torch.randn(2, 3))
    # conftest looks whether hooks are left


def test_copies_and_pickles_are_lean_too(monkeypatch):
    model = torchbp.lean(network()).eval()
    x = torch.randn(4, 6)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        count = Count(monkeypatch)
        twin(x).sum().backward()
        assert count.shared
        assert list(twin.state_dict()) == list(network().state_dict())
        assert repr(twin) == repr(network())


def test_twice_is_once_and_revert_undoes_it(monkeypatch):
    model = network()
    assert torchbp.lean(torchbp.lean(model)) is model
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == (1, 1)
    assert torchbp.revert(model) is model
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert not model._forward_hooks_always_called
    assert type(model[0]) is nn.Linear
    count = Count(monkeypatch)
    model(torch.randn(4, 6)).sum().backward()
    assert not count.kept


def test_a_lean_part_of_a_lean_model_is_fine():
    model = network()
    want = step(torchbp.convert(copy.deepcopy(model)), *data(), F.cross_entropy)
    torchbp.lean(model[3])
    got = step(torchbp.lean(nn.Sequential(model)), *data(), F.cross_entropy)
    same(got, want)


def data():
    torch.manual_seed(2)
    return torch.randn(5, 6), torch.randint(3, (5,))


def test_in_two_threads():
    plain = nn.Sequential(*(m for m in network() if not isinstance(m, nn.Dropout)))
    converted, lean = both(plain)
    x = torch.linspace(0, 1, 30).reshape(5, 6)
    results = {}

    def run(name, model):
        for _ in range(30):
            model.zero_grad()
            model(x).square().mean().backward()
        results[name] = [p.grad for p in model.parameters()]

    models = {"one": lean, "other": copy.deepcopy(lean)}
    threads = [threading.Thread(target=run, args=item) for item in models.items()]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    run("want", converted)
    same(results["one"], results["want"])
    same(results["other"], results["want"])


def test_forward_and_backward_in_two_threads():
    converted, lean = both(network().eval())
    x = torch.randn(5, 6)
    losses = [m(x).square().mean() for m in (converted, lean)]
    thread = threading.Thread(target=lambda: [value.backward() for value in losses])
    thread.start()
    thread.join()
    same([p.grad for p in lean.parameters()], [p.grad for p in converted.parameters()])


def test_warns_where_no_recipe_was_used():
    w = torch.randn(4, 4, requires_grad=True)
    with (
        pytest.warns(UserWarning, match=r"got none in 2 tensors; convert the model first"),
        torchbp.lean_scope(),
    ):
        torch.mm(torch.randn(4, 4, requires_grad=True), w)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torchbp.lean_scope():
            pass
        with torch.no_grad(), torchbp.lean_scope():
            torch.mm(w, w)


def test_says_where_everything_is_small(monkeypatch):
    monkeypatch.undo()
    model = torchbp.convert(network())
    with (
        pytest.warns(UserWarning, match=r"expected outputs of 16 KiB or more .* got none in \d+"),
        torchbp.lean_scope(),
    ):
        model(torch.randn(4, 6))
    with pytest.warns(UserWarning, match="convert the model first"), torchbp.lean_scope():
        torch.exp(torch.exp(torch.randn(64, 64, requires_grad=True)))


def test_refuses_what_is_no_module():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got function"):
        torchbp.lean(network)


def test_small_tensors_are_left_alone(monkeypatch):
    monkeypatch.undo()
    assert _graph.small > 1024
    count = Count(monkeypatch)
    torchbp.lean(network())(torch.randn(4, 6)).sum().backward()
    assert count.kept
    assert not count.shared


class Tagged(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore:lean_scope", "ignore:The PyTorch API of nested")
def test_pack_takes_whatever_autograd_saves():
    w = torch.randn(4, 4, requires_grad=True)
    with torchbp.lean_scope():
        sparse = torch.eye(4).to_sparse().requires_grad_()
        torch.sparse.mm(sparse, w).sum().backward()
        tagged = torch.randn(4, 4).as_subclass(Tagged).requires_grad_()
        (tagged * w).sin().sum().backward()
        F.linear(F.gelu(F.linear(torch.randn(0, 4), w)), w).sum().backward()
        z = torch.randn(4, 4, dtype=torch.complex64, requires_grad=True)
        y = F.tanh(F.sigmoid(z).conj())
        (y.conj() * y.imag).abs().sum().backward()
        nested = torch.nested.nested_tensor(
            [torch.randn(2, 4), torch.randn(3, 4)], requires_grad=True
        )
        torch.nn.functional.gelu(nested).to_padded_tensor(0.0).sum().backward()
        F.gelu(w.expand(3, 4, 4)).sin().sum().backward()


def test_fake_tensors_leave_nothing_behind(monkeypatch):
    monkeypatch.setattr(_recipe, "_EMPTY", {})
    with FakeTensorMode():
        torchbp.lean(network().eval())(torch.randn(4, 6)).sum().backward()
    assert not _recipe._EMPTY
    torchbp.lean(network())(torch.randn(4, 6)).sum().backward()
    assert {type(empty) for empty in _recipe._EMPTY.values()} == {torch.Tensor}


def test_complex_views_are_right(monkeypatch):
    z = torch.randn(6, 4, dtype=torch.complex64, requires_grad=True)

    def f():
        y = F.sigmoid(z)
        return torch.autograd.grad((y.conj() * (y.imag * y.conj().imag * y.real)).abs().sum(), z)

    want = f()
    count = Count(monkeypatch)
    with torchbp.lean_scope():
        got = f()
    same(got, want)
    assert count.shared


def test_memory_format_is_as_it_was():
    conv = nn.Conv2d(3, 4, 3, padding=1).to(memory_format=torch.channels_last)
    model = nn.Sequential(
        conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.GELU(), nn.Conv2d(2, 2, 1)
    )
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    converted, lean = both(model)
    criterion = lambda out, _: out.square().mean()  # noqa: E731
    same(step(lean, x, None, criterion), step(converted, x, None, criterion))


def test_a_change_of_memory_format_is_made_again():
    torch.manual_seed(0)
    one, two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
    with torchbp.lean_scope():
        y = F.gelu(one(torch.randn(2, 3, 8, 8)))
        moved = y.to(memory_format=torch.channels_last)
        z = two(moved)
    saved = z.grad_fn._raw_saved_input.data
    assert type(saved) is Share
    assert saved.open().stride() == moved.stride() != y.stride()
    assert torch.equal(saved.open(), moved)


def test_inert_where_hooks_are_forbidden():
    model = torchbp.lean(network())
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        model(torch.randn(4, 6)).sum().backward()
    assert model[0].weight.grad is not None
