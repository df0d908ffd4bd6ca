"""torchbp.lr_range_test: the suggestion is one that trains, and nothing of the test is left behind."""

import time

import numpy as np
import pytest
import torch
from torch import nn

import torchbp
from torchbp.tensorboard import read


@pytest.fixture
def training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 1))
    head = list(model[3].parameters())
    optimizer = torch.optim.Adam(
        [
            {"params": [*model[0].parameters(), *model[1].parameters()]},
            {"params": head, "lr": 0.02},
        ],
        lr=0.01,
    )
    x = torch.randn(96, 4)
    batches = list(zip(x.split(16), x.sum(1, keepdim=True).split(16), strict=True))
    return model, optimizer, batches


def snapshot(model, optimizer):
    states = [(k, v.clone()) for k, v in model.state_dict().items()]
    moments = [
        {k: v.clone() for k, v in optimizer.state[p].items()}
        for p in model.parameters()
        if p in optimizer.state
    ]
    rates = [group["lr"] for group in optimizer.param_groups]
    return states, moments, rates, [m.training for m in model.modules()], torch.get_rng_state()


def assert_same(before, after):
    for (name, a), (_, b) in zip(before[0], after[0], strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(before[1], after[1], strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert before[2:4] == after[2:4]
    assert torch.equal(before[4], after[4])


@pytest.mark.parametrize("warm", [False, True], ids=["new optimizer", "after a step"])
def test_leaves_no_trace(training, warm):
    model, optimizer, batches = training
    model.eval()
    model[1].train()
    if warm:
        model(batches[0][0]).sum().backward()
        optimizer.step()
    gradients = [p.grad for p in model.parameters()]
    before = snapshot(model, optimizer)
    torchbp.lr_range_test(model, optimizer, batches, nn.functional.mse_loss, steps=20)
    assert_same(before, snapshot(model, optimizer))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


def test_leaves_no_trace_of_a_failure(training):
    model, optimizer, batches = training
    before = snapshot(model, optimizer)
    calls = []

    def fails(y, target):
        calls.append(1)
        if len(calls) == 5:
            raise KeyError
        return nn.functional.mse_loss(y, target)

    with pytest.raises(KeyError):
        torchbp.lr_range_test(model, optimizer, batches, fails)
    assert_same(before, snapshot(model, optimizer))


def quadratic(curvature):
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    batches = [(torch.ones(1, 1), torch.zeros(1, 1))]
    return model, batches, lambda y, _: curvature * y.square().mean() / 2


@pytest.mark.parametrize("curvature", [0.1, 1.0, 100.0])
def test_suggests_a_rate_that_converges(curvature):
    # Gradient descent on c·w²/2 shrinks w by 1 − rate·c a step: it converges for rate < 2/c.
    model, batches, loss = quadratic(curvature)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    test = torchbp.lr_range_test(model, optimizer, batches, loss, start=1e-6, end=1e3)
    assert 1e-3 / curvature < test.suggestion < 2 / curvature
    assert test.suggestion < test.lowest


def test_ends_where_it_diverges():
    model, batches, loss = quadratic(1.0)
    test = torchbp.lr_range_test(
        model, torch.optim.SGD(model.parameters(), 1.0), batches, loss, start=1e-3, end=1e9
    )
    assert len(test.rates) < 60
    assert np.isfinite(test.losses).all()


def test_rates_grow_geometrically_and_groups_keep_their_ratio(training):
    model, optimizer, batches = training
    seen = []
    step = optimizer.step
    optimizer.step = lambda: (seen.append([g["lr"] for g in optimizer.param_groups]), step())
    test = torchbp.lr_range_test(
        model, optimizer, batches, nn.functional.mse_loss, start=1e-4, end=1e-2, steps=11
    )
    first, second = np.array(seen).T
    np.testing.assert_allclose(first, np.geomspace(1e-4, 1e-2, 11))
    np.testing.assert_allclose(second, 2 * first)
    np.testing.assert_allclose(test.rates, first)


def test_suggests_nothing_where_the_loss_never_falls():
    model, batches, _ = quadratic(1.0)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    test = torchbp.lr_range_test(model, optimizer, batches, lambda y, _: 0 * y.sum() + 1, steps=20)
    assert test.suggestion is None
    assert "never falls" in str(test)


def test_batches_that_scatter_are_no_fall():
    """Of labels drawn by lot hardly ever a rate is suggested; of those that can be learnt none of the first."""
    found = {"lot": [], "learnt": []}
    for seed in range(8):
        torch.manual_seed(seed)
        x = torch.randn(1024, 8)
        for name, y in (("lot", torch.randint(2, (1024,))), ("learnt", (x[:, 0] > 0).long())):
            model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
            batches = list(zip(x.split(8), y.split(8), strict=True))
            optimizer = torch.optim.Adam(model.parameters())
            test = torchbp.lr_range_test(model, optimizer, batches, nn.functional.cross_entropy)
            found[name].append(test.suggestion)
    assert sum(rate is not None for rate in found["lot"]) <= 1
    assert min(found["learnt"]) > 1e-3


def test_says_where_the_last_rate_is_the_best():
    model, batches, loss = quadratic(1.0)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    test = torchbp.lr_range_test(model, optimizer, batches, loss, end=0.1)
    assert test.lowest == test.rates[-1]
    assert str(test).endswith("the last: where it diverges lies beyond")
    assert "and diverges" in str(torchbp.lr_range_test(model, optimizer, batches, loss))


def test_is_shown_in_tensorboard(training, tmp_path):
    pytest.importorskip("matplotlib")
    model, optimizer, batches = training
    test = torchbp.lr_range_test(
        model, optimizer, batches, nn.functional.mse_loss, steps=60, log_dir=tmp_path
    )
    run = read(tmp_path)
    np.testing.assert_allclose(run.scalars["lr_range_test/loss"].values, test.losses, rtol=1e-6)
    np.testing.assert_allclose(
        10 ** run.scalars["lr_range_test/log10_rate"].values, test.rates, rtol=1e-5
    )
    assert f"{test.suggestion:.1e}" in str(test)
    axes = test.plot()
    assert axes.get_xscale() == "log"


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"start": 0.0}, ValueError, "start > 0, got 0.0"),
        ({"start": 1.0, "end": 0.5}, ValueError, "end > start = 1.0, got 0.5"),
        ({"steps": 3}, ValueError, "steps >= 10, got 3"),
        ({"loader": []}, ValueError, "an empty one"),
        ({"loader": [torch.ones(2, 4)]}, TypeError, "pairs, got Tensor"),
        ({"loss": lambda y, t: y.sum() * torch.nan}, ValueError, "finite loss, got nan"),
    ],
    ids=["start", "end", "steps", "empty", "no pairs", "nan"],
)
def test_refuses(training, wrong, error, says):
    model, optimizer, batches = training
    arguments = {"loader": batches, "loss": nn.functional.mse_loss} | wrong
    with pytest.raises(error, match=says):
        torchbp.lr_range_test(model, optimizer, **arguments)


def run(tmp_path, between, *, optimizer=True, compiled=False):
    """Train eight steps with a pause in the middle of an accumulation; return what was told, and the file."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 1))
    free = nn.Linear(1, 1)  # no optimizer has it
    model.append(free)
    if compiled:
        model.compile(backend="eager")
    known = torch.optim.Adam(model[:4].parameters(), lr=0.01)
    x = torch.randn(64, 4)
    batches = list(zip(x.split(8), x.sum(1, keepdim=True).split(8), strict=True))
    monitor = torchbp.watch(
        model, known if optimizer else None, log_dir=tmp_path, share=None, sample_every=1
    )
    for i in range(12):
        if i == 6:
            between(model, known, batches, monitor)
        for j, (x, y) in enumerate(batches[:2]):
            if (i, j) == (3, 1):
                between(model, known, batches, monitor)
            loss = nn.functional.mse_loss(model(x), y) / 2
            loss.backward()
        known.step()
        monitor.log_loss(train=loss)
        known.zero_grad(set_to_none=False)
    monitor.close()
    told = read(tmp_path)
    vectors = {k: (v.steps, v.values) for k, v in told.vectors.items()}
    scalars = {
        k: (v.steps, v.values)
        for k, v in told.scalars.items()
        if "time" not in k and "share" not in k
    }
    return monitor, vectors | scalars


def tried(model, optimizer, batches, monitor):
    def loss(y, target):
        monitor.log("seen", 1.0)
        return nn.functional.mse_loss(y, target)

    torchbp.lr_range_test(model, optimizer, batches, loss, steps=20)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own
@pytest.mark.parametrize(
    "given", [{}, {"optimizer": False}, {"compiled": True}], ids=["given", "found", "compiled"]
)
def test_is_no_part_of_a_watched_run(tmp_path, given):
    """What the monitor counts, logs and finds is to the last bit what it is without the test."""
    other, want = run(tmp_path / "without", lambda *_: None, **given)
    monitor, got = run(tmp_path / "with", tried, **given)
    assert monitor.step == other.step == 12
    assert monitor.summary() == other.summary()
    assert got.keys() == want.keys()
    for name, (steps, values) in want.items():
        np.testing.assert_array_equal(got[name][0], steps, err_msg=name)
        np.testing.assert_array_equal(got[name][1], values, err_msg=name)


def test_takes_no_time_of_a_watched_run(tmp_path):
    def wait(*args):
        with args[-1].paused(), args[-1].paused():
            time.sleep(0.5)

    run(tmp_path, wait)
    steps = read(tmp_path).scalars["run/step_time"]
    assert max(steps.values) < 400  # ms


def test_a_monitor_of_another_model_goes_on(training):
    model, optimizer, batches = training
    with torchbp.watch(model, optimizer) as monitor:
        others = nn.Linear(4, 1)
        paused = []
        monitor._capture._set_away = paused.append
        sgd = torch.optim.SGD(others.parameters(), lr=0.1)
        torchbp.lr_range_test(others, sgd, batches, nn.functional.mse_loss, steps=10)
        assert not paused


def test_a_monitor_that_is_closed_in_a_pause_leaves_no_hook(training):
    model, optimizer, _ = training
    monitor = torchbp.watch(model, optimizer)
    with monitor.paused():
        monitor.close()
    assert not torch.nn.modules.module._global_forward_hooks
    assert not model[0].weight._post_accumulate_grad_hooks


def test_a_layer_that_no_optimizer_has_is_found_beside_tests(training):
    """By the version of its weight, which nobody has written to."""
    model, _, batches = training
    optimizer = torch.optim.SGD(model[:3].parameters(), lr=0.01)
    with torchbp.watch(model, optimizer) as monitor:
        for x, y in batches * 8:
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            model.zero_grad()
            torchbp.lr_range_test(model, optimizer, batches, nn.functional.mse_loss, steps=10)
    assert "no optimizer" in monitor.summary()
