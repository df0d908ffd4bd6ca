"""The same numbers in every setting that real training loops have."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import torchbp
from torchbp.monitor import capture
from torchbp.tensorboard import read


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def data():
    g = torch.Generator().manual_seed(1)
    return torch.randn(16, 8, generator=g), torch.randint(0, 4, (16,), generator=g)


def loss_of(model):
    x, y = data()
    return nn.functional.cross_entropy(model(x), y)


def true_norms(model):
    """The gradient norms by plain autograd, on a copy."""
    model = copy.deepcopy(model)
    loss_of(model).backward()
    return [p.grad.norm().item() for p in model.parameters()]


def norms(folder, quantity="gradient_norm"):
    return read(folder).vectors[quantity].values


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "rate-tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), foreach=False),
}


@pytest.mark.parametrize("known", [True, False], ids=["given", "found"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(tmp_path, name, known):
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    want, updates = [], []
    with torchbp.watch(model, optimizer if known else None, log_dir=tmp_path) as monitor:
        for _ in range(4):
            want.append(true_norms(model))
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            pairs = zip(model.parameters(), before, strict=True)
            updates.append([(p.detach() - b).norm().item() for p, b in pairs])
        assert monitor.step == 4
    np.testing.assert_allclose(norms(tmp_path), want, rtol=1e-5)
    np.testing.assert_allclose(norms(tmp_path, "update_norm"), updates, rtol=1e-4)
    ratio = norms(tmp_path, "update_norm") / norms(tmp_path, "weight_norm")
    np.testing.assert_allclose(norms(tmp_path, "update_ratio"), ratio, rtol=1e-5)
    rates = norms(tmp_path, "learning_rate")
    np.testing.assert_allclose(rates, 0.1 if name == "sgd" else 0.01, rtol=1e-6)


def test_clipping_is_told_and_not_taken_for_the_gradient(tmp_path):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchbp.watch(model, optimizer, log_dir=tmp_path):
        want = true_norms(model)
        loss_of(model).backward()
        total = nn.utils.clip_grad_norm_(model.parameters(), 0.01).item()
        optimizer.step()
    np.testing.assert_allclose(norms(tmp_path), [want], rtol=1e-5)
    clip = read(tmp_path).scalars["run/clip_coefficient"].values
    np.testing.assert_allclose(clip, [0.01 / total], rtol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_is_divided_out(tmp_path, fused):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    want = []
    with torchbp.watch(model, optimizer, log_dir=tmp_path):
        for _ in range(5):
            want.append(true_norms(model))
            optimizer.zero_grad()
            scaler.scale(loss_of(model)).backward()
            if not fused:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
            scaler.step(optimizer)
            scaler.update()
    assert scaler.get_scale() > 1024
    np.testing.assert_allclose(norms(tmp_path), want, rtol=1e-5)
    signals = norms(tmp_path, "error_signal")
    assert signals[:, -1].max() < 1
    clip = read(tmp_path).scalars["run/clip_coefficient"].values
    total = np.linalg.norm(want, axis=1)
    np.testing.assert_allclose(clip, np.ones(5) if fused else 1e-2 / total, rtol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_are_no_alarm(tmp_path, fused):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**125, backoff_factor=2.0**-90)
    with torchbp.watch(model, optimizer, log_dir=tmp_path) as monitor:
        for _ in range(12):
            optimizer.zero_grad()
            scaler.scale(loss_of(model) * 1e3).backward()
            scaler.step(optimizer)
            scaler.update()
    assert monitor.verdicts == []
    assert np.isfinite(norms(tmp_path)).all()
    assert read(tmp_path).scalars["run/skipped"].values.sum() >= 1


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "order", [(0, 2), (2, 0)], ids=["the whole one first", "the lost one first"]
)
def test_one_of_two_optimizers_is_skipped(tmp_path, fused, order):
    """At step 7 the gradient of the last layer overflows: the step stays out, the next one is as any other."""
    model = mlp()[:3]
    optimizers = [torch.optim.AdamW(model[k].parameters(), fused=fused) for k in order]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torchbp.watch(model, optimizers, log_dir=tmp_path, sample_every=7) as monitor:
        for step in range(20):
            model.zero_grad()
            x, _ = data()
            last = model[2](model[1](model[0](x)).detach())
            loss = model[0](x).square().mean() + last.square().mean() * (1e38 if step == 7 else 1.0)
            scaler.scale(loss).backward()
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
    assert monitor.step == 20
    assert monitor.verdicts == []
    run = read(tmp_path)
    assert run.vectors["gradient_norm"].steps.tolist() == [*range(7), *range(8, 20)]
    assert np.isfinite(run.vectors["gradient_norm"].values).all()
    skipped = run.scalars["run/skipped"]
    assert dict(zip(skipped.steps.tolist(), skipped.values.tolist(), strict=True))[7] == 1
    assert skipped.values.sum() == 1


@pytest.mark.parametrize("lost", [1, 30], ids=["once", "for good"])
def test_a_scaler_that_skips_the_last_steps(tmp_path, lost):
    """One step is how a scale is found; where the scale falls below 1 something is wrong."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    with torchbp.watch(model, optimizer, log_dir=tmp_path) as monitor:
        for step in range(10 + lost):
            optimizer.zero_grad()
            scaler.scale(loss_of(model) * (float("inf") if step >= 10 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert [v.kind for v in monitor.verdicts] == ["nonfinite"] * (lost > 1)


def test_bfloat16_autocast(tmp_path):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchbp.watch(model, optimizer, log_dir=tmp_path):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model)
        loss.backward()
        want = [p.grad.norm().item() for p in model.parameters()]
        optimizer.step()
    np.testing.assert_allclose(norms(tmp_path), [want], rtol=1e-5)


def test_a_closure_counts_where_the_step_begins(tmp_path):
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    want = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    updates = []
    with torchbp.watch(model, optimizer, log_dir=tmp_path) as monitor:
        for _ in range(3):
            want.append(true_norms(model))
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.step(closure)
            pairs = zip(model.parameters(), before, strict=True)
            updates.append([(p - b).norm().item() for p, b in pairs])
    assert monitor.step == 3
    np.testing.assert_allclose(norms(tmp_path), want, rtol=1e-5)
    np.testing.assert_allclose(norms(tmp_path, "update_norm"), updates, rtol=1e-4)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("first", [True, False], ids=["user's hooks first", "ours first"])
def test_optimizers_inside_backward(tmp_path, first, given):
    model = mlp()
    each = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def step(parameter):
        each[parameter].step()
        each[parameter].zero_grad()

    def attach():
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)

    if first:
        attach()
    monitor = torchbp.watch(model, each.values() if given else None, log_dir=tmp_path)
    if not first:
        attach()
    want = []
    for _ in range(4):
        want.append(true_norms(model))
        loss_of(model).backward()
    monitor.close()
    np.testing.assert_allclose(norms(tmp_path), want, rtol=1e-5)


def test_an_optimizer_that_leaves_backward(tmp_path):
    """Inside of it in the first three steps, behind it from then on."""
    model, want = mlp(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(*_):
        optimizer.step()
        optimizer.zero_grad()

    last = next(iter(model.parameters()))  # whose gradient comes last
    hook = last.register_post_accumulate_grad_hook(step)
    with torchbp.watch(model, optimizer, log_dir=tmp_path) as monitor:
        for k in range(6):
            want.append(true_norms(model))
            if k == 3:
                hook.remove()
            loss_of(model).backward()
            if k >= 3:
                step()
        assert monitor.step == 6
    np.testing.assert_allclose(norms(tmp_path), want, rtol=1e-5)


def test_groups_may_be_added_on_the_way(tmp_path):
    """As layers are that begin to learn later; and of optimizers that take turns, each has its own number."""
    model = mlp()
    optimizer = torch.optim.SGD(model[2:].parameters(), lr=0.1)
    other = torch.optim.SGD([{"params": [p]} for p in model[2:].parameters()], lr=0.3)
    with torchbp.watch(model, [optimizer, other], log_dir=tmp_path):
        for k in range(6):
            if k == 2:
                optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.2})
            model.zero_grad()
            loss_of(model).backward()
            (optimizer if k < 4 else other).step()
    rates = read(tmp_path).vectors["learning_rate"]
    assert rates.names == tuple(f"group {i}" for i in range(4))
    one, two = [0.1, np.nan, np.nan, np.nan], [0.1, 0.2, np.nan, np.nan]
    np.testing.assert_allclose(rates.values[:4], [one, one, two, two], rtol=1e-6)
    assert (norms(tmp_path) > 0).all()


def test_two_optimizers_of_one_backward_make_one_step(tmp_path):
    model = mlp()
    pair = [
        torch.optim.SGD(model[0].parameters(), lr=0.1),
        torch.optim.Adam(model[2:].parameters()),
    ]
    want = []
    with torchbp.watch(model, pair, log_dir=tmp_path) as monitor:
        for _ in range(3):
            want.append(true_norms(model))
            model.zero_grad()
            loss_of(model).backward()
            for optimizer in pair:
                optimizer.step()
    assert monitor.step == 3
    np.testing.assert_allclose(norms(tmp_path), want, rtol=1e-5)
    assert (norms(tmp_path, "update_norm") > 0).all()


def test_plain_updates_without_any_optimizer(tmp_path):
    model = mlp()
    want = []
    with torchbp.watch(model, log_dir=tmp_path):
        for _step in range(4):
            want.append(true_norms(model))
            model.zero_grad()
            for _ in range(2):  # accumulated
                (loss_of(model) / 2).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(parameter.grad, alpha=0.1)
    np.testing.assert_allclose(norms(tmp_path), want, rtol=1e-5)


class Spectral(nn.Module):
    """Multiplies frequencies, as Fourier neural operators do."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width, 5, dtype=torch.complex64) / width)

    def forward(self, x):
        frequencies = torch.einsum("nif,iof->nof", torch.fft.rfft(x), self.weight)
        return torch.fft.irfft(frequencies, x.shape[-1])


@pytest.mark.parametrize("width", [4, 64], ids=["small", "large"])  # packed, and by themselves
def test_complex_parameters(tmp_path, width):
    torch.manual_seed(0)
    model = nn.Sequential(Spectral(width), nn.GELU(), Spectral(width), nn.Conv1d(width, 1, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    norms_of = lambda tensors: [t.cdouble().norm().item() for t in tensors]  # noqa: E731
    want, weights, updates = [], [], []
    with torchbp.watch(model, optimizer, log_dir=tmp_path) as monitor:
        for _ in range(4):
            optimizer.zero_grad()
            (model(torch.randn(8, width, 8)) - 1).square().mean().backward()
            before = [p.detach().clone() for p in model.parameters()]
            want.append(norms_of(p.grad for p in model.parameters()))
            optimizer.step()
            weights.append(norms_of(before))
            updates.append(norms_of(p - b for p, b in zip(model.parameters(), before, strict=True)))
    assert monitor.verdicts == []
    np.testing.assert_allclose(norms(tmp_path), want, rtol=1e-5)
    np.testing.assert_allclose(norms(tmp_path, "weight_norm"), weights, rtol=1e-5)
    np.testing.assert_allclose(norms(tmp_path, "update_norm"), updates, rtol=1e-4)
    assert (norms(tmp_path, "error_signal") > 0).all()
    assert (norms(tmp_path, "gradient_zeros") <= 0.2).all()  # of the real frequencies' other parts


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.layers, self.reentrant = mlp(), reentrant

    def forward(self, x):
        x = x.requires_grad_()
        x = checkpoint(self.layers[:2], x, use_reentrant=self.reentrant)
        return self.layers[4](checkpoint(self.layers[2:4], x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_once(tmp_path, reentrant):
    runs = []
    for name, model in (("plain", mlp()), ("checkpointed", Checkpointed(reentrant))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torchbp.watch(model, optimizer, log_dir=tmp_path / name) as monitor:
            for _ in range(3):
                optimizer.zero_grad()
                loss_of(model).backward()
                optimizer.step()
        assert monitor.step == 3
        run = read(tmp_path / name)
        assert run.scalars["run/backwards"].values.tolist() == [1, 1, 1]
        runs.append(run.vectors)
    for quantity in ("gradient_norm", "error_signal", "activation_rms", "saturated_share"):
        plain, checkpointed = (run[quantity].values for run in runs)
        np.testing.assert_allclose(checkpointed, plain, rtol=1e-4, err_msg=quantity)


def test_sparse_frozen_shared_and_unused_parameters(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(20, 8, sparse=True)
            self.frozen = nn.Linear(8, 8).requires_grad_(False)
            self.head = nn.Linear(8, 20, bias=False)
            self.twin = nn.Linear(8, 20, bias=False)
            self.twin.weight = self.head.weight
            self.unused = nn.Linear(8, 8)

        def forward(self, x):
            h = self.frozen(self.table(x))
            return self.head(h) + self.twin(h.tanh())

    model = Odd()
    x = torch.tensor([1, 1, 2, 5])
    with torchbp.watch(model, log_dir=tmp_path) as monitor:
        model(x).square().mean().backward()
    series = read(tmp_path).vectors["gradient_norm"]
    got = dict(zip(series.names, series.values[0], strict=True))
    assert set(got) == {"table.weight", "head.weight", "unused.weight", "unused.bias"}
    np.testing.assert_allclose(got["table.weight"], model.table.weight.grad.to_dense().norm())
    np.testing.assert_allclose(got["head.weight"], model.head.weight.grad.norm(), rtol=1e-6)
    assert got["unused.weight"] == 0
    assert [v.kind for v in monitor.verdicts] in ([], ["disconnected"])


def test_a_forward_without_grad_between_steps_changes_nothing(tmp_path):
    runs = []
    for name in ("plain", "evaluated"):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torchbp.watch(model, optimizer, log_dir=tmp_path / name):
            for _ in range(3):
                if name == "evaluated":
                    with torch.no_grad():
                        loss_of(model)
                optimizer.zero_grad()
                loss_of(model).backward()
                optimizer.step()
        runs.append(read(tmp_path / name).vectors)
    for quantity in ("error_signal", "activation_mean", "gradient_norm"):
        np.testing.assert_array_equal(*(run[quantity].values for run in runs))


def test_a_layer_may_be_frozen_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(capture, "_RELEARN", 8)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchbp.watch(model, optimizer, log_dir=tmp_path):
        for step in range(20):
            if step == 10:
                model[0].requires_grad_(False)
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    assert (norms(tmp_path) > 0).sum(1).tolist() == [6] * 10 + [4] * 10


class Frozen(nn.Module):
    """Layers that can be cut off, each by itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.cut = None

    def forward(self, x):
        for k, layer in enumerate(self.layers):
            x = layer(x).tanh()
            x = x.detach() if k == self.cut else x
        return x


@pytest.mark.parametrize("to_none", [True, False], ids=["None", "zeros"])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("cut", [False, True], ids=["frozen", "cut off"])
def test_what_is_frozen_on_the_way_is_not_disconnected(cut, every, to_none):
    """Layer by layer from step 12 on, and back; a layer that is cut off all the same is."""
    model = Frozen()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with torchbp.watch(model, optimizer, every=every, sample_every=30) as monitor:
        for step in range(80 * every):
            phase = min(step // 12, 3) if step < 50 * every else 1
            for k in range(4):
                model.layers[k].requires_grad_(k >= phase)
            if cut and step >= 50 * every:
                model.cut = 1
            optimizer.zero_grad(set_to_none=to_none)
            loss_of(model).backward()
            optimizer.step()
    found = [(v.kind, v.layer) for v in monitor.verdicts]
    assert found == ([("disconnected", "layers.1")] if cut else [])
    assert "not seen" not in str(monitor)


def test_what_was_frozen_at_first_is_said_to_be_unseen(tmp_path):
    model = Frozen()
    model.layers[:2].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for start in (0, 5):
        with torchbp.watch(model, optimizer, log_dir=tmp_path) as monitor:
            monitor.step = start
            for _ in range(5):
                optimizer.zero_grad()
                loss_of(model).backward()
                optimizer.step()
            assert "not seen" not in str(monitor)
            model.layers[1].requires_grad_(True)
            assert ("not seen: layers.1, frozen when" in str(monitor)) == (start == 0)
    assert read(tmp_path).scalars["run/global_gradient_norm_log10"].steps.tolist() == list(
        range(10)
    )


@pytest.mark.parametrize("when", ["before", "after"])
def test_compiled_models_break_no_graph(tmp_path, when):
    model = mlp()
    frames = []

    def backend(graph, _):
        frames.append(graph)
        return graph.forward

    torch._dynamo.reset()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x, y = data()
    if when == "after":
        compiled(x)
    want = []
    with torchbp.watch(compiled, optimizer, log_dir=tmp_path) as monitor:
        for _ in range(12):
            want.append(true_norms(model))
            optimizer.zero_grad()
            nn.functional.cross_entropy(compiled(x), y).backward()
            optimizer.step()
    assert len(frames) == (2 if when == "before" else 1)  # listening, and as it is
    series = read(tmp_path).vectors["gradient_norm"]
    np.testing.assert_allclose(series.values, want, rtol=1e-5)
    assert series.names[0] == "0.weight"
    assert str(monitor).count("not seen: the model had been compiled") == (when == "after")
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_layers_are_listened_to(tmp_path, backend):
    runs = []
    for name in ("plain", "compiled"):
        torch._dynamo.reset()
        model = mlp()
        model[0].weight.data *= 20
        model[2].bias.data[:3] = -100  # three dead units behind the ReLU
        watched = torch.compile(model, backend=backend) if name == "compiled" else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with torchbp.watch(watched, optimizer, log_dir=tmp_path / name, sample_every=1):
            for _ in range(70):
                optimizer.zero_grad()
                loss_of(watched).backward()
                optimizer.step()
        runs.append(read(tmp_path / name).vectors)
    for quantity in ("error_signal", "saturated_share", "update_norm"):
        plain, compiled = (run[quantity].values for run in runs)
        np.testing.assert_allclose(compiled, plain, rtol=1e-5, err_msg=quantity)
    np.testing.assert_array_equal(*(run["dead_share"].values[-1] for run in runs))


def test_copies_of_a_compiled_model_listen_to_nothing():
    torch._dynamo.reset()
    model = mlp()
    with torchbp.watch(torch.compile(model, backend="eager")):
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        loss_of(model).backward()
        for twin in twins:
            hooks = [h for m in twin.modules() for h in m._forward_hooks.values()]
            assert {h.__name__ for h in hooks} <= {"_nothing"}
            loss_of(twin).backward()


def test_a_run_that_is_resumed_overwrites(tmp_path):
    for start, stop in ((0, 8), (5, 9)):
        model = mlp()
        with torchbp.watch(model, log_dir=tmp_path) as monitor:
            monitor.step = start
            for _ in range(start, stop):
                model.zero_grad()
                loss_of(model).backward()
    steps = read(tmp_path).vectors["gradient_norm"].steps
    assert steps.tolist() == list(range(9))


def test_activations(tmp_path):
    model = mlp()
    model[0].weight.data *= 20
    model[2].bias.data[:3] = -100  # three dead units behind the ReLU
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torchbp.watch(model, optimizer, log_dir=tmp_path, sample_every=1):
        for _ in range(70):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    x, _ = data()
    with torch.no_grad():
        z = [model[0](x), model[2](model[1](model[0](x)))]
    run = read(tmp_path).vectors
    got = {name: run[name].values[0] for name in ("activation_mean", "activation_rms")}
    np.testing.assert_allclose(got["activation_mean"][:2], [t.mean() for t in z], rtol=1e-5)
    rms = [t.square().mean().sqrt() for t in z]
    np.testing.assert_allclose(got["activation_rms"][:2], rms, rtol=1e-5)
    saturated = (z[0].tanh().square() > 0.94).float().mean()
    np.testing.assert_allclose(run["saturated_share"].values[0], [saturated, np.nan, np.nan])
    dead = run["dead_share"]
    assert dead.steps.tolist() == [63]  # 1024 samples of 16
    np.testing.assert_allclose(dead.values[0], [np.nan, 3 / 8, np.nan])


def test_functional_activations_are_seen_too(tmp_path):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, x):
            x = torch.tanh(self.inner[0](x))
            return self.inner[4](nn.functional.relu(self.inner[2](x)))

    runs = []
    for name, model in (("modules", mlp()), ("functions", Functional())):
        with torchbp.watch(model, log_dir=tmp_path / name):
            loss_of(model).backward()
        runs.append(read(tmp_path / name).vectors["saturated_share"].values)
    np.testing.assert_array_equal(*runs)


@pytest.mark.parametrize("activation", [torch.tanh, nn.Tanh()], ids=["function", "module"])
def test_an_activation_that_two_layers_read_is_told_of_the_layer_before(tmp_path, activation):
    class Branched(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.left, self.right = (nn.Linear(8, 8) for _ in range(3))
            self.tanh = activation

        def forward(self, x):
            x = self.tanh(self.stem(x))
            return self.left(x) * self.right(x)

    model = Branched()
    with torchbp.watch(model, log_dir=tmp_path):
        loss_of(model).backward()
    (shares,) = read(tmp_path).vectors["saturated_share"].values
    assert np.isfinite(shares).tolist() == [True, False, False]


def test_a_backward_through_other_parameters_is_found_too(tmp_path):
    torch.manual_seed(0)
    both = nn.ModuleDict({name: mlp() for name in "ab"})
    pair = {name: torch.optim.SGD(both[name].parameters(), lr=0.1) for name in "ab"}
    want = []
    with torchbp.watch(both, pair.values(), log_dir=tmp_path):
        for step in range(24):
            name = "ab"[step % 2]
            both.zero_grad()
            loss_of(both[name]).backward()
            want.append(
                [0.0 if p.grad is None else p.grad.norm().item() for p in both.parameters()]
            )
            pair[name].step()
    np.testing.assert_allclose(norms(tmp_path), want, rtol=1e-5)


def test_few_parameters_carry_a_hook_once_it_is_known_what_is_reached():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchbp.watch(model, optimizer):
        counts = []
        for _ in range(12):
            counts.append(sum(len(p._post_accumulate_grad_hooks or {}) for p in model.parameters()))
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    assert counts == [6] * 5 + [1] * 7


def test_a_backward_that_no_witness_sees_is_left_out_and_seen_from_then_on(tmp_path):
    both = nn.ModuleDict({name: mlp() for name in "ab"})
    pair = {name: torch.optim.SGD(both[name].parameters(), lr=0.1) for name in "ab"}
    want = []
    with torchbp.watch(both, pair.values(), log_dir=tmp_path) as monitor:
        for step in range(20):
            name = "a" if step < 10 else "b"
            both.zero_grad()
            loss_of(both[name]).backward()
            want.append(
                [0.0 if p.grad is None else p.grad.norm().item() for p in both.parameters()]
            )
            nn.utils.clip_grad_norm_(both.parameters(), 1e-3)
            pair[name].step()
        assert monitor.step == 20
    series = read(tmp_path).vectors["gradient_norm"]
    assert series.steps.tolist() == [*range(10), *range(11, 20)]
    np.testing.assert_allclose(series.values, want[:10] + want[11:], rtol=1e-5)


@pytest.mark.parametrize("micro", [1, 3])
def test_a_step_that_runs_the_last_backward_itself(tmp_path, micro):
    """As Lightning does: accumulation before the step, the last backward and clipping inside."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    want, coefficients = [], []

    def closure():
        (loss_of(model) / micro).backward()
        total = nn.utils.clip_grad_norm_(model.parameters(), 0.01).item()
        coefficients.append(0.01 / total)

    with torchbp.watch(model, optimizer, log_dir=tmp_path):
        for _ in range(4):
            want.append(true_norms(model))
            optimizer.zero_grad()
            for _ in range(micro - 1):
                (loss_of(model) / micro).backward()
            optimizer.step(closure)
    np.testing.assert_allclose(norms(tmp_path), want, rtol=1e-5)
    run = read(tmp_path).scalars
    np.testing.assert_allclose(run["run/clip_coefficient"].values, coefficients, rtol=1e-4)
    assert run["run/backwards"].values.tolist() == [micro] * 4


def test_large_outputs_are_measured_on_part_of_the_batch(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 300), nn.ReLU(), nn.Linear(300, 4))
    x = torch.randn(1000, 8)
    outputs = []
    with torchbp.watch(model, log_dir=tmp_path):
        z = model[0](x)
        z.retain_grad()
        outputs.append(z)
        model[2](model[1](z)).square().mean().backward()
    got = read(tmp_path).vectors
    part = outputs[0].grad[::5]  # 300 000 elements: every fifth sample
    want = part.double().square().mean().sqrt().item() * 1000
    np.testing.assert_allclose(got["error_signal"].values[0, 0], want, rtol=1e-5)
    rms = outputs[0][::5].square().mean().sqrt().item()
    np.testing.assert_allclose(got["activation_rms"].values[0, 0], rms, rtol=1e-5)


def test_the_noise_scale_of_a_known_truth(tmp_path):
    """A linear loss g·w with g ~ N(m, I): S = dimensions, |G|² = |m|²."""
    torch.manual_seed(0)
    model = nn.Linear(100, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    mean = torch.full((100,), 0.2)
    with torchbp.watch(model, optimizer, log_dir=tmp_path):
        for _ in range(200):
            optimizer.zero_grad()
            for _micro in range(4):
                (model(mean + torch.randn(8, 100)).mean() / 4).backward()
            optimizer.step()
    value, low, high = read(tmp_path).vectors["noise_scale"].values[-1]
    assert low < 100 / 4.0 < high
    assert high - low < 0.5 * value


class Recurrent(nn.Module):
    """Takes (steps, batch) or (batch, steps) tokens; asks a layer in between for the other order."""

    def __init__(self, inner, *, turns=False):
        super().__init__()
        self.tokens, self.inner, self.head = nn.Embedding(9, 8), inner, nn.Linear(8, 1)
        self.turns = turns

    def forward(self, x):
        h = self.tokens(x)
        h = h.transpose(0, 1) if self.turns else h
        attends = isinstance(self.inner, nn.MultiheadAttention)
        h, _ = self.inner(h, h, h) if attends else self.inner(h)
        return self.head(h).mean()


@pytest.mark.parametrize(
    ("inner", "turns", "shape"),
    [
        (lambda: nn.GRU(8, 8), False, (7, 3)),
        (lambda: nn.GRU(8, 8, batch_first=True), False, (3, 7)),
        (lambda: nn.GRU(8, 8), True, (3, 7)),
        (lambda: nn.GRU(8, 8, batch_first=True), True, (7, 3)),
        (lambda: nn.MultiheadAttention(8, 2), False, (7, 3)),
        (lambda: nn.MultiheadAttention(8, 2, batch_first=True), False, (3, 7)),
    ],
)
def test_the_batch_is_found_where_the_sequence_comes_first(tmp_path, inner, turns, shape):
    torch.manual_seed(0)
    model = Recurrent(inner(), turns=turns)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    signals = []

    def keep(grad):
        signals.append(grad.square().mean().sqrt().item() * 3)

    with torchbp.watch(model, optimizer, log_dir=tmp_path):
        for _ in range(3):
            optimizer.zero_grad()
            hook = model.head.register_forward_hook(lambda *a: a[2].register_hook(keep) and None)
            model(torch.randint(0, 9, shape)).backward()
            hook.remove()
            optimizer.step()
    run = read(tmp_path)
    assert set(run.scalars["run/batch"].values) == {3}
    series = run.vectors["error_signal"]
    got = series.values[:, series.names.index("head")]
    np.testing.assert_allclose(got, signals, rtol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_the_batch_of_a_compiled_model_is_right_or_absent(tmp_path, first):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=first)
    model = torch.compile(nn.Sequential(nn.Linear(8, 8), encoder), backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchbp.watch(model, optimizer, log_dir=tmp_path):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(3, 5, 8)).square().mean().backward()
            optimizer.step()
    scalars = read(tmp_path).scalars
    assert ("run/batch" in scalars) == first
    if first:
        assert set(scalars["run/batch"].values) == {3}
