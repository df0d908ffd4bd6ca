"""The monitor on a GPU says what it says on the CPU, and waits for nothing. Run by ``--device cuda``."""

import copy
import gc
import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import torchbp
from tests.device import DEVICE
from tests.trained import Cells, step
from torchbp.tensorboard import read

_SPEC = importlib.util.spec_from_file_location("torchbp_zoo", Path(__file__).with_name("zoo.py"))
zoo = sys.modules["torchbp_zoo"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(zoo)

F = nn.functional


def alarms(monitor):
    return {v.kind: v for v in monitor.verdicts if v.severity != "info"}


@pytest.mark.parametrize("name", zoo.SICK)
def test_the_sick_are_diagnosed(name):
    run = zoo.SICK[name]
    _, monitor = zoo.train(run, device=DEVICE)
    kinds = set(alarms(monitor))
    assert run.kind in kinds
    assert kinds <= {run.kind, *run.also}


@pytest.mark.parametrize("name", zoo.HEALTHY)
def test_no_alarm_on_the_healthy(name):
    _, monitor = zoo.train(zoo.HEALTHY[name], device=DEVICE)
    assert alarms(monitor) == {}


@pytest.mark.parametrize("name", ["sigmoid-12", "dead-all", "detached", "always-clipped", "rnn-40"])
def test_the_same_layer_and_step_as_on_the_cpu(name):
    run = zoo.SICK[name]

    def told(device):
        verdict = alarms(zoo.train(run, device=device)[1])[run.kind]
        return verdict.kind, verdict.layer, verdict.severity, verdict.step

    assert told(DEVICE) == told("cpu")


# ------------------------------------------------------------------------------------- models
class Twice(nn.Module):
    """Layers that run twice, one of them in another order: what is heard of them is picked apart."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(torch.relu(self.a(torch.tanh(self.b(torch.relu(self.a(x)))))))


def mlp(act=nn.ReLU):
    hidden = [part for _ in range(3) for part in (nn.Linear(16, 16), act())]
    return nn.Sequential(*hidden, nn.Linear(16, 4))


def convolutional():
    parts = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3)]
    return nn.Sequential(*parts, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def large():
    """With layers of which a part of the batch is measured at once."""
    return nn.Sequential(nn.Linear(16, 4096), nn.ReLU(), nn.Linear(4096, 4))


def transformer():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(96, 4))


def recurrent():
    return zoo.Recurrent(nn.LSTM, 8, 16, 4)


KINDS = {
    "mlp": (mlp, (16,)),
    "tanh": (lambda: mlp(nn.Tanh), (16,)),
    "twice": (Twice, (16,)),
    "large": (large, (16,)),
    "convolutional": (convolutional, (3, 8, 8)),
    "transformer": (transformer, (6, 16)),
    "lstm": (recurrent, (6, 8)),
    "cells": (lambda: Cells(8, 16, 4), (6, 8)),
}


def made(name, size=64):
    torch.manual_seed(0)
    make, shape = KINDS[name]
    model = make().to(DEVICE)
    x = torch.randn(size, *shape).to(DEVICE)
    return model, x, torch.randint(4, (size,)).to(DEVICE)


class NoWaiting:
    """Inside, whatever would have to wait for the GPU raises."""

    def __enter__(self):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_):
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_would_be_noticed():
    x = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="synchroniz"), NoWaiting():
        x.sum().item()


@pytest.mark.parametrize("name", KINDS)
def test_no_step_waits_for_the_gpu(name, tmp_path):
    """Sampled steps, rare ones and drains included."""
    model, x, y = made(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    with torchbp.watch(
        model, optimizer, log_dir=tmp_path, share=None, every=1, sample_every=3
    ) as monitor:
        for _ in range(3):
            monitor.log_loss(train=step(model, optimizer, x, y))
        with NoWaiting():
            for _ in range(150):
                monitor.log_loss(train=step(model, optimizer, x, y))
    run = read(tmp_path)
    assert len(run.vectors["gradient_norm"].steps) == 153
    assert np.isfinite(run.vectors["gradient_norm"].values).all()
    assert not np.isinf(run.vectors["error_signal"].values).any()  # NaN where no module ran
    assert alarms(monitor) == {}


def test_no_step_of_a_fused_scaled_one_waits(tmp_path):
    model, x, y = made("mlp")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler(DEVICE, growth_interval=10)

    def scaled():
        with torch.autocast(DEVICE, torch.float16):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    with torchbp.watch(model, optimizer, log_dir=tmp_path, share=None, every=1) as monitor:
        scaled()
        with NoWaiting():
            for _ in range(60):
                scaled()
    norms = read(tmp_path).vectors["gradient_norm"].values
    assert np.isfinite(norms).all()
    assert norms.max() < 100  # not times the scale
    assert alarms(monitor) == {}


@pytest.mark.parametrize("fused", [False, True])
def test_a_scale_that_is_too_large_is_found_and_no_alarm(tmp_path, fused):
    model, x, y = made("mlp")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**40, backoff_factor=2.0**-8)
    with torchbp.watch(model, optimizer, log_dir=tmp_path) as monitor:
        for _ in range(12):
            with torch.autocast(DEVICE, torch.float16):
                loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    run = read(tmp_path)
    assert monitor.verdicts == []
    assert run.scalars["run/skipped"].values.sum() >= 1
    assert np.isfinite(run.vectors["gradient_norm"].values).all()


# ------------------------------------------------------------------------------- what is read
@pytest.mark.parametrize("stream", [False, True], ids=["default stream", "side stream"])
def test_what_is_read_is_what_was_there(tmp_path, stream):
    """The host runs far ahead of a GPU that is kept busy; the monitor is closed from another stream."""
    model, x, y = made("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    want, losses = [], []
    monitor = torchbp.watch(model, optimizer, log_dir=tmp_path, share=None, every=1)
    with torch.cuda.stream(side) if stream else nullcontext():
        for _ in range(120):
            torch.cuda._sleep(2_000_000)  # about a millisecond
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            want.append(torch.stack([p.grad.norm() for p in model.parameters()]))
            optimizer.step()
            losses.append(loss.detach().clone())
            monitor.log_loss(train=loss)
            for p in model.parameters():
                p.grad.fill_(1e9)  # nothing may look at it later
    monitor.close()
    torch.cuda.synchronize()
    run = read(tmp_path)
    got = run.vectors["gradient_norm"]
    assert got.steps.tolist() == list(range(120))
    np.testing.assert_allclose(got.values, torch.stack(want).cpu().numpy(), rtol=1e-5)
    got = run.scalars["loss/train"].values
    np.testing.assert_allclose(got, torch.stack(losses).cpu().numpy(), rtol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_the_same_numbers_as_on_the_cpu(name, tmp_path):
    model, x, y = made(name)
    model.eval()  # or dropout draws other numbers

    def one(device):
        other = copy.deepcopy(model).to(device)
        for module in other.modules():
            if isinstance(module, nn.RNNBase):
                module.train()  # cuDNN has no backward otherwise
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
        with torchbp.watch(other, optimizer, log_dir=tmp_path / device):
            step(other, optimizer, x.to(device), y.to(device))
        return read(tmp_path / device)

    got, want = one(DEVICE), one("cpu")
    assert got.vectors.keys() == want.vectors.keys()
    for key, series in want.vectors.items():
        # What cancels to 0 on one is 1e-10 on the other; and the second output of a cell in one kernel gets only what
        # comes back from later steps.
        if key == "gradient_zeros" or (key == "through_time" and name == "cells"):
            continue
        scale = np.nanmax(np.abs(series.values), initial=0.0)
        np.testing.assert_allclose(
            got.vectors[key].values, series.values, rtol=2e-2, atol=2e-3 * scale, err_msg=key
        )


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=False),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=1e-3, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True),
    "adam capturable": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-3), capturable=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_of_every_optimizer(name, tmp_path):
    model, x, y = made("mlp")
    optimizer = OPTIMIZERS[name](model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    want = []
    with torchbp.watch(model, optimizer, log_dir=tmp_path) as monitor:
        for _ in range(4):
            before = [p.detach().clone() for p in model.parameters()]
            if name == "lbfgs":
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
            pairs = zip(model.parameters(), before, strict=True)
            want.append([(p - b).norm().item() for p, b in pairs])
    np.testing.assert_allclose(read(tmp_path).vectors["update_norm"].values, want, rtol=1e-4)
    assert alarms(monitor) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(dtype, tmp_path):
    model, x, y = made("mlp")
    model, x = model.to(dtype), x.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchbp.watch(model, optimizer, log_dir=tmp_path):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        want = [p.grad.float().norm().item() for p in model.parameters()]
        optimizer.step()
    np.testing.assert_allclose(read(tmp_path).vectors["gradient_norm"].values, [want], rtol=1e-3)


def test_a_model_on_two_devices(tmp_path):
    torch.manual_seed(0)
    first, second = mlp(), nn.Linear(4, 4).to(DEVICE)
    both = nn.ModuleList([first, second])
    optimizer = torch.optim.SGD(both.parameters(), lr=0.1)
    with torchbp.watch(both, optimizer, log_dir=tmp_path) as monitor:
        for _ in range(12):
            loss = second(first(torch.randn(32, 16)).to(DEVICE)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            want = [p.grad.norm().item() for p in both.parameters()]
            optimizer.step()
            monitor.log_loss(train=loss)
    np.testing.assert_allclose(read(tmp_path).vectors["gradient_norm"].values[-1], want, rtol=1e-5)
    assert alarms(monitor) == {}


def test_where_the_default_device_is_the_gpu(tmp_path):
    with torch.device(DEVICE):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torchbp.watch(model, optimizer, log_dir=tmp_path) as monitor:
            for _ in range(30):
                monitor.log_loss(
                    train=step(model, optimizer, torch.randn(8, 16), torch.randint(4, (8,)))
                )
    assert len(read(tmp_path).vectors["gradient_norm"].steps) == 30


def test_memory_is_given_back(tmp_path):
    model, x, y = made("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer, x, y)

    def used():
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    before = used()
    with torchbp.watch(model, optimizer, log_dir=tmp_path, share=None, every=1) as monitor:
        for _ in range(60):
            monitor.log_loss(train=step(model, optimizer, x, y))
        model(x)  # what no backward follows
    assert used() <= before
    assert monitor.step == 60


# -------------------------------------------------------------------------- graphs, compilers
def warmed_up(model, optimizer, x, y):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(model, optimizer, x, y)
    torch.cuda.current_stream().wait_stream(stream)


def test_a_step_that_a_graph_captures_is_refused():
    """Its replays call no hook: a monitor would say that nothing is wrong of steps it never saw."""
    model, x, y = made("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchbp.watch(model, optimizer):
        warmed_up(model, optimizer, x, y)
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match="CUDA graph captures"), torch.cuda.graph(graph):
            step(model, optimizer, x, y)
    torch.cuda.synchronize()
    step(model, optimizer, x, y)


def test_layers_that_a_graph_captured(tmp_path):
    model, x, y = made("mlp")
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = torch.optim.SGD(plain.parameters(), lr=0.1)
    want = []
    with torchbp.watch(model, optimizer, log_dir=tmp_path) as monitor:
        graphed = torch.cuda.make_graphed_callables(model, (x,))
        for _ in range(30):
            monitor.log_loss(train=step(graphed, optimizer, x, y))
            step(plain, other, x, y)
            want.append([p.grad.norm().item() for p in plain.parameters()])
    got = read(tmp_path).vectors["gradient_norm"]
    assert got.steps.tolist() == list(range(30))
    np.testing.assert_allclose(got.values, want, rtol=1e-3, atol=1e-6)
    assert alarms(monitor) == {}
    assert "a CUDA graph has captured them" in monitor.summary()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode, tmp_path):
    model, x, y = made("mlp")
    plain = copy.deepcopy(model)

    def one(model, name, sample_every=10):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torchbp.watch(model, optimizer, log_dir=tmp_path / name) as monitor:
            for _ in range(20):
                monitor.log_loss(train=step(model, optimizer, x, y))
        assert alarms(monitor) == {}
        return read(tmp_path / name)

    got, want = one(torch.compile(model, mode=mode), "compiled"), one(plain, "plain")
    for key in ("gradient_norm", "error_signal", "update_norm"):
        assert got.vectors[key].steps.tolist() == want.vectors[key].steps.tolist()
        np.testing.assert_allclose(
            got.vectors[key].values, want.vectors[key].values, rtol=1e-2, atol=1e-6, err_msg=key
        )


def test_a_range_test_leaves_no_trace():
    model, x, y = made("mlp")
    before = copy.deepcopy(model.state_dict())
    state = torch.cuda.get_rng_state()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = torchbp.lr_range_test(model, optimizer, [(x.cpu(), y.cpu())], F.cross_entropy, steps=30)
    assert np.isfinite(found.lowest)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
