"""The monitor in an ordinary training loop."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

import torchbp
from torchbp.monitor import Monitor
from torchbp.monitor import _desk as desk
from torchbp.tensorboard import read


def mlp(depth=3, width=8, activation=nn.ReLU):
    torch.manual_seed(0)
    hidden = [part for _ in range(depth) for part in (nn.Linear(width, width), activation())]
    return nn.Sequential(*hidden, nn.Linear(width, 4))


def data(size=16, width=8):
    g = torch.Generator().manual_seed(1)
    return torch.randn(size, width, generator=g), torch.randint(0, 4, (size,), generator=g)


def train(model, monitor=None, steps=20, optimizer=None, clip=None, lr=0.1):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr)
    x, y = data()
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if monitor:
            monitor.log_loss(train=loss)
    return loss


def watched(tmp_path, model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchbp.watch(model, optimizer, log_dir=tmp_path, **options) as monitor:
        train(model, monitor, optimizer=optimizer)
    return read(tmp_path), monitor


def count_hooks(model, *optimizers):
    hooks = len(torch_module._global_forward_hooks) + len(torch_module._global_forward_pre_hooks)
    hooks += sum(len(o._optimizer_step_pre_hooks) for o in optimizers)
    hooks += sum(len(p._post_accumulate_grad_hooks or {}) for p in model.parameters())
    return hooks + sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_gradient_norms_are_the_final_ones_before_clipping(tmp_path, clip):
    model, reference = mlp(), mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchbp.watch(model, optimizer, log_dir=tmp_path):
        train(model, optimizer=optimizer, clip=clip, steps=1)
    x, y = data()
    nn.functional.cross_entropy(reference(x), y).backward()
    want = {name: p.grad.norm().item() for name, p in reference.named_parameters()}
    run = read(tmp_path)
    got = run.vectors["gradient_norm"]
    assert got.names == tuple(want)
    np.testing.assert_allclose(got.values[0], list(want.values()), rtol=1e-5)
    layers = run.vectors["layer_gradient_norm"]
    assert layers.names == ("0", "2", "4", "6")
    pairs = np.reshape(list(want.values()), (-1, 2))
    np.testing.assert_allclose(layers.values[0], np.hypot(*pairs.T), rtol=1e-5)
    total = np.log10(np.linalg.norm(list(want.values())))
    got = run.scalars["run/global_gradient_norm_log10"].values[0]
    np.testing.assert_allclose(got, total, rtol=1e-5)


def test_error_signals_are_the_outputs_gradients_times_the_batch(tmp_path):
    model = mlp()
    x, y = data()
    outputs = []
    for layer in model:
        x = layer(x)
        x.retain_grad()
        outputs.append(x)
    nn.functional.cross_entropy(x, y).backward()
    want = [outputs[i].grad.square().mean().sqrt().item() * 16 for i in (0, 2, 4, 6)]
    run, _ = watched(tmp_path, mlp())
    series = run.vectors["error_signal"]
    assert series.steps.tolist() == [0, 1, 2, 3, 4, 10]
    np.testing.assert_allclose(series.values[0], want, rtol=1e-5)


def test_layers_stand_in_the_order_in_which_they_run(tmp_path):
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.idle, self.first = (nn.Linear(8, n) for n in (4, 3, 8))

        def forward(self, x):
            return self.last(self.first(x))

    run, _ = watched(tmp_path, Backwards())
    names = run.vectors["layer_gradient_norm"].names
    assert names.index("first") < names.index("last")
    assert set(names) == {"first", "last", "idle"}
    norms = dict(zip(names, run.vectors["layer_gradient_norm"].values[0], strict=True))
    assert norms["idle"] == 0
    assert norms["first"] > 0


def test_accumulated_gradients_count_once_a_step(tmp_path):
    model, reference = mlp(), mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = data()
    with torchbp.watch(model, optimizer, log_dir=tmp_path) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            for part in (slice(0, 8), slice(8, 16)):
                (nn.functional.cross_entropy(model(x[part]), y[part]) / 2).backward()
            optimizer.step()
    assert monitor.step == 3
    series = read(tmp_path).vectors["gradient_norm"]
    assert series.steps.tolist() == [0, 1, 2]
    nn.functional.cross_entropy(reference(x), y).backward()
    want = [p.grad.norm().item() for p in reference.parameters()]
    np.testing.assert_allclose(series.values[0], want, rtol=1e-5)


def test_without_an_optimizer_a_step_is_a_backward():
    model = mlp()
    monitor = torchbp.watch(model)
    train(model, steps=7)
    assert monitor.step == 7
    monitor.close()


def test_periods(tmp_path):
    run, _ = watched(tmp_path, mlp(), every=2, sample_every=4)
    assert run.vectors["gradient_norm"].steps.tolist() == list(range(0, 20, 2))
    assert run.vectors["error_signal"].steps.tolist() == [0, 2, 4, 8, 12, 16]


def test_layers_can_be_chosen(tmp_path):
    run, _ = watched(tmp_path, mlp(), layers=["[24]"])
    assert run.vectors["layer_gradient_norm"].names == ("2", "4")


def test_numbers_of_the_loop(tmp_path):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchbp.watch(model, optimizer, log_dir=tmp_path) as monitor:
        loss = train(model, monitor, optimizer=optimizer, steps=3)
        monitor.log_loss(val=0.25)
        monitor.log("accuracy", torch.tensor(0.5))
        with pytest.raises(ValueError, match="expected one number"):
            monitor.log("x", torch.zeros(2))
    run = read(tmp_path)
    assert run.scalars["loss/train"].steps.tolist() == [0, 1, 2]
    assert run.scalars["loss/train"].values[-1] == np.float32(loss.item())
    assert run.scalars["loss/val"].steps.tolist() == [2]
    assert run.scalars["accuracy"].values.tolist() == [0.5]
    np.testing.assert_allclose(run.vectors["learning_rate"].values, 0.1)


def test_close_takes_every_hook_away():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = count_hooks(model, optimizer)
    monitor = torchbp.watch(model, optimizer)
    train(model, steps=1, optimizer=optimizer)
    assert count_hooks(model, optimizer) > before
    monitor.close()
    monitor.close()
    assert count_hooks(model, optimizer) == before == 0


def test_training_is_unchanged(tmp_path):
    plain, seen = mlp(), mlp()
    train(plain)
    with torchbp.watch(seen, log_dir=tmp_path):
        train(seen)
    for a, b in zip(plain.parameters(), seen.parameters(), strict=True):
        assert torch.equal(a, b)


def test_copies_carry_no_hooks():
    model = mlp()
    with torchbp.watch(model):
        train(model, steps=1)
        stored = io.BytesIO()
        torch.save(model, stored)
        stored.seek(0)
        third = torch.load(stored, weights_only=False)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), third):
            assert not any(p._post_accumulate_grad_hooks for p in twin.parameters())
            assert not any(m._forward_hooks for m in twin.modules())


def test_a_dropped_model_is_freed():
    model = mlp()
    monitor = torchbp.watch(model)
    train(model, steps=2)
    gone = weakref.ref(model), weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert monitor.verdicts == []


def test_an_unkept_monitor_goes_on(tmp_path):
    model = mlp()
    torchbp.watch(model, log_dir=tmp_path)
    gc.collect()
    train(model, steps=13)
    del model
    gc.collect()
    assert read(tmp_path).vectors["gradient_norm"].steps.tolist() == list(range(13))
    assert not torch_module._global_forward_hooks


def test_a_script_that_just_ends_loses_nothing(tmp_path):
    code = f"""
import torch, torchbp
model = torch.nn.Linear(3, 1)
monitor = torchbp.watch(model, log_dir={str(tmp_path)!r})
for _ in range(7):
    model.zero_grad()
    model(torch.ones(2, 3)).sum().backward()
raise SystemExit(3)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 3
    assert read(tmp_path).vectors["gradient_norm"].steps.tolist() == list(range(7))


def test_a_terminated_script_loses_nothing(tmp_path):
    code = f"""
import os, signal, torch, torchbp
model = torch.nn.Linear(3, 1)
monitor = torchbp.watch(model, log_dir={str(tmp_path)!r})
for _ in range(7):
    model.zero_grad()
    model(torch.ones(2, 3)).sum().backward()
os.kill(os.getpid(), signal.SIGTERM)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -15
    assert read(tmp_path).vectors["gradient_norm"].steps.tolist() == list(range(7))


def test_the_signal_handler_is_put_back(tmp_path):
    code = f"""
import signal, torch, torchbp
model = torch.nn.Linear(3, 1)
with torchbp.watch(model, log_dir={str(tmp_path)!r}):
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with torchbp.watch(model, log_dir={str(tmp_path)!r}):
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_full_disk_ends_the_files_and_not_the_training(tmp_path):
    model = mlp()
    monitor = torchbp.watch(model, log_dir=tmp_path)
    monitor._journal._writer._file.close()

    def go_on():
        train(model, monitor, steps=30)
        monitor.close()

    with pytest.warns(RuntimeWarning, match="lost some of its readings"):
        go_on()
    assert monitor.verdicts == []
    assert count_hooks(model) == 0


def test_a_writer_that_is_stuck_holds_up_training_for_so_long_only(monkeypatch):
    monkeypatch.setattr(desk, "_PATIENCE", 0.01)
    stuck, done, busy = threading.Event(), [], desk.Desk()
    busy.put(stuck.wait)

    def go_on():
        for job in range(desk._LENGTH + 3):
            busy.put(lambda job=job: done.append(job))

    with pytest.warns(RuntimeWarning, match="can't be written fast enough"):
        go_on()
    stuck.set()
    busy.close()
    assert desk._LENGTH - 1 <= len(done) <= desk._LENGTH + 1  # the rest is lost, and said to be


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent, self.head = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.recurrent(x[:, None].expand(-1, 6, -1))[0][:, -1])


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("model", [mlp, lambda: mlp(activation=nn.Tanh), Sequence])
def test_no_value_is_waited_for_outside_a_drain(monkeypatch, model, micro):
    """Tensors on "meta" have none: whoever asks for one gets an error, as a GPU would make him wait."""
    drain = Monitor._drain
    monkeypatch.setattr(Monitor, "_drain", lambda *_, **__: None)
    model = model().to("meta")
    optimizer = torch.optim.AdamW(model.parameters())
    x, y = (t.to("meta") for t in data())
    with torchbp.watch(model, optimizer, sample_every=2) as monitor:
        for _ in range(12):
            optimizer.zero_grad()
            for _micro in range(micro):
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            monitor.log_loss(train=loss)
        with pytest.raises(NotImplementedError, match="meta"):
            drain(monitor)
    assert monitor.step == 12


def test_an_exception_in_backward_and_a_retry(tmp_path):
    class Fails(torch.autograd.Function):
        armed = True

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            if Fails.armed:
                raise RuntimeError("on purpose")
            return grad

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, _ = data()
    with torchbp.watch(model, optimizer, log_dir=tmp_path):
        for Fails.armed in (True, False):
            optimizer.zero_grad()
            loss = model[2:](Fails.apply(model[:2](x))).square().mean()
            if Fails.armed:
                with pytest.raises(RuntimeError, match="on purpose"):
                    loss.backward()
            else:
                loss.backward()
                want = [p.grad.norm().item() for p in model.parameters()]
                optimizer.step()
    series = read(tmp_path).vectors["gradient_norm"]
    np.testing.assert_allclose(series.values, [want], rtol=1e-5)


def test_an_interrupted_loop_keeps_what_was_logged(tmp_path):
    model = mlp()

    def interrupted():
        with torchbp.watch(model, log_dir=tmp_path):
            train(model, steps=13)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert read(tmp_path).vectors["gradient_norm"].steps.tolist() == list(range(13))
    assert count_hooks(model) == 0


def test_a_users_summary_writer(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    model = mlp()
    with SummaryWriter(str(tmp_path)) as writer:
        with torchbp.watch(model, writer=writer):
            train(model, steps=3)
        writer.add_scalar("mine", 1.0, 0)
    run = read(tmp_path)
    assert run.vectors["gradient_norm"].steps.tolist() == [0, 1, 2]
    assert run.scalars["mine"].values.tolist() == [1.0]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"every": 0}, ValueError, "every >= 1"),
        ({"layers": ["nothing"]}, ValueError, "trainable layers"),
        ({"log_dir": "/proc/nowhere"}, OSError, "log_dir that can be written"),
        ({"log_dir": __file__}, OSError, "log_dir that can be written"),
        ({"log_dir": ".", "writer": 1}, ValueError, "got both"),
    ],
)
def test_bad_input_is_refused_before_any_hook(options, error, said):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match=said):
        torchbp.watch(model, optimizer, **options)
    assert count_hooks(model, optimizer) == 0


def test_stock_tabs_get_few_tags(tmp_path):
    run, _ = watched(tmp_path, mlp())
    assert len(run.scalars) <= 20
    assert all("/" in tag for tag in run.scalars)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"watch: expected a torch\.nn\.Module, got type; "):
        torchbp.watch(nn.Linear)


@pytest.mark.parametrize("given", ["adam", 3, "parameters", "scheduler"])
def test_what_is_no_optimizer_is_refused(given, tmp_path):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if given == "parameters":
        given = model.parameters()
    if given == "scheduler":
        given = [torch.optim.lr_scheduler.StepLR(optimizer, 3), given]
    with pytest.raises(TypeError, match=r"watch: expected a torch\.optim\.Optimizer, or several"):
        torchbp.watch(model, given, log_dir=tmp_path / "run")
    assert count_hooks(model, optimizer) == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("rank", "writes"), [("auto", False), (0, False), (1, True)])
def test_one_rank_writes(tmp_path, monkeypatch, rank, writes):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    model = mlp()
    with torchbp.watch(model, log_dir=tmp_path / "run", rank=rank):
        train(model, steps=3)
    assert (tmp_path / "run").exists() == writes


@pytest.mark.parametrize("begin", [0, 7])
def test_steps_that_are_not_read_are_counted_once(tmp_path, begin):
    model = mlp()
    halves = list(model[:4].parameters()), list(model[4:].parameters())
    optimizers = [torch.optim.SGD(half, lr=0.1) for half in halves]
    x, y = data()
    with torchbp.watch(model, optimizers, log_dir=tmp_path, every=3) as monitor:
        monitor.step = begin
        for step in range(begin, begin + 9):
            assert monitor.step == step
            model.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()
    read_at = [step for step in range(begin, begin + 9) if step % 3 == 0]
    assert read(tmp_path).vectors["gradient_norm"].steps.tolist() == read_at


def test_whatever_the_default_device_is(tmp_path):
    model, (x, y) = mlp(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.device("meta"), torchbp.watch(model, optimizer, log_dir=tmp_path) as monitor:
        for _ in range(12):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert monitor.verdicts == []
    assert len(read(tmp_path).vectors["gradient_norm"].steps) == 12


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_whatever_the_default_dtype_is(tmp_path, default):
    norms = []
    for dtype in (torch.float32, default):
        torch.manual_seed(0)
        model, (x, y) = mlp(), data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.set_default_dtype(dtype)
        try:
            with torchbp.watch(model, optimizer, log_dir=tmp_path / str(dtype)):
                for _ in range(12):
                    nn.functional.cross_entropy(model(x), y).backward()
                    optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        norms.append(read(tmp_path / str(dtype)).vectors["update_norm"].values)
    np.testing.assert_array_equal(*norms)


def test_says_where_no_layer_is_heard():
    model, (x, _) = mlp(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    whole = model.forward
    with torchbp.watch(model, optimizer) as monitor:
        model.forward = lambda t: t @ model[0].weight.T  # as a CUDA graph does
        for _ in range(3):
            model(x).square().mean().backward()
            optimizer.step()
        assert "runs without its layers" in monitor.summary()
        model.forward = whole
        model(x).square().mean().backward()
        assert "not seen" not in monitor.summary()
