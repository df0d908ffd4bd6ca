"""The governor: the periods it decides on, and that what is measured stays true when they change."""

import inspect
import itertools
import time
import types

import numpy as np
import pytest
import torch
from torch import nn

import torchbp
from torchbp.monitor import capture
from torchbp.monitor._governor import Governor, Usual, Vote
from torchbp.monitor._jump import Jump
from torchbp.tensorboard import read

ASKED = (1, 10, 50)
LONGEST = (16, 160, 800)
TINY = 1e-9  # a share that no monitor keeps to: always as seldom as can be


class Bench:
    """A governor on a clock of our own: seconds of a read step, a sampled one, a drain."""

    def __init__(self, read=0.0, sample=0.0, drain=0.0, share=0.01, step=1.0, periods=(1, 10)):
        self.costs = read, sample, drain
        self.time = step
        self.governor = Governor(share, *map(Usual, periods))
        self.step, self.spent = 0, 0.0
        self.next = 50

    def run(self, steps, *, restless=False):
        """Go on; return the periods after every drain, and the mean share meanwhile."""
        found, begin, before = [], self.step, self.spent
        read, sample, drain = self.costs
        for self.step in range(begin, begin + steps):
            every, sample_every, drain_every = self.governor.periods
            if self.step % every == 0:
                sampled = self.step % sample_every == 0
                self.spent += sample if sampled else read
                self.governor.note(sampled, sample if sampled else read, self.time)
            if self.step >= self.next:
                self.next = self.step + drain_every
                self.spent += drain
                vote = self.governor.vote(drain, restless=restless)
                self.governor.decide(self.step, vote)
                found.append((self.step, tuple(self.governor.periods)))
        self.step += 1
        return found, 2 * (self.spent - before) / (steps * self.time)


def test_what_is_cheap_is_left_alone():
    found, _ = Bench(read=1e-3, sample=5e-3, drain=0.02).run(3000)
    assert {periods for _, periods in found} == {ASKED}


@pytest.mark.parametrize(
    ("costs", "want"),
    [
        ({"sample": 0.06}, (1, 20, 50)),  # samples first
        ({"sample": 0.2}, (2, 80, 50)),  # by so much that reading may be spread too
        ({"read": 0.009, "sample": 0.009}, (4, 80, 50)),
        ({"drain": 0.1}, (1, 10, 100)),
        ({"read": 9.0, "sample": 90.0, "drain": 900.0}, LONGEST),  # bounded
    ],
)
def test_the_shortest_periods_that_keep_the_share(costs, want):
    bench = Bench(**costs)
    bench.run(1000)
    found, share = bench.run(8000)
    assert {periods for _, periods in found} == {want}
    assert share <= 0.01 or want == LONGEST


def test_the_first_steps_are_as_asked():
    found, _ = Bench(read=1.0, sample=2.0, drain=3.0).run(500)
    assert [periods for step, periods in found if step < 300] == [ASKED] * 5
    assert found[-1][1] == LONGEST


def test_none_never_stretches():
    bench = Bench(read=1.0, sample=2.0, drain=3.0, share=None)
    found, _ = bench.run(2000, restless=True)
    bench.governor.look(2000)
    assert {periods for _, periods in found} == {tuple(bench.governor.periods)} == {ASKED}


def test_what_was_asked_for_by_name_is_kept():
    costs = (1.0, 2.0, 3.0)
    for every, sample_every, want in (
        (1, Usual(10), (1, 160)),
        (Usual(1), 5, (1, 5)),
        (1, 10, (1, 10)),
    ):
        bench = Bench(*costs)
        bench.governor = Governor(0.01, every, sample_every)
        bench.run(1000)
        assert tuple(bench.governor.periods[:2]) == want
        assert bench.governor.periods.drain_every == 800


def test_sampled_steps_are_read():
    for every, sample_every in ((Usual(1), 12), (Usual(1), 20), (Usual(3), Usual(30))):
        bench = Bench(1.0, 2.0, 3.0)
        bench.governor = Governor(0.01, every, sample_every)
        bench.run(1000)
        assert bench.governor.periods.sample_every % bench.governor.periods.every == 0


def test_it_comes_back_when_the_share_falls():
    bench = Bench(read=0.009, sample=0.009, drain=0.01)
    bench.run(1000)
    assert bench.governor.periods != ASKED
    bench.costs = 1e-4, 1e-3, 1e-3
    bench.run(3000)
    assert bench.governor.periods == ASKED


def test_it_does_not_waver():
    """A cost that changes by a fifth up and down at the bound changes the periods once."""
    bench, seen = Bench(sample=0.0375), []
    for k in range(40):
        bench.costs = 0.0, 0.0375 * (1.1 if k % 2 else 0.95), 0.0
        seen += [periods for _, periods in bench.run(100)[0]]
    changes = sum(a != b for a, b in itertools.pairwise(seen))
    assert changes == 1


def test_trouble_is_looked_at_closely_for_a_while():
    bench = Bench(read=1e-2, sample=1e-2, drain=0.5)
    bench.run(1000)
    before = tuple(bench.governor.periods)
    assert bench.governor.look(bench.step)
    assert bench.governor.periods == ASKED
    bench.next = bench.step + 50
    bench.run(60)
    assert bench.governor.periods == ASKED
    bench.run(200)
    assert tuple(bench.governor.periods) == before


def test_unrest_in_the_first_steps_uses_nothing_up():
    """They are looked at closely anyhow: all 400 steps that are saved up come after them."""
    bench = Bench(read=1.0, sample=2.0, drain=3.0)
    bench.run(300, restless=True)
    found, _ = bench.run(1000, restless=True)
    assert max(step for step, periods in found if periods == ASKED) in range(600, 701)
    assert found[-1][1] == LONGEST


def test_even_lasting_unrest_costs_little():
    costs = {"read": 1e-3, "sample": 0.3, "drain": 0.02}
    calm, restless = Bench(**costs), Bench(**costs)
    (_, low), (_, high) = calm.run(40_000), restless.run(40_000, restless=True)
    asked = 2 * (costs["read"] + costs["sample"] / 10 + costs["drain"] / 50)
    assert low < high < low + asked / 16 + 0.015 * asked


def test_ranks_agree_on_the_mean_and_look_when_one_wants_to():
    for votes, want in (
        ([Vote(1, 0, 0), Vote(4, 2, 0)], (2, 40, 100)),
        ([Vote(1, 0, 0), Vote(4, 2, 1)], ASKED),
    ):
        governor = Governor(0.01, Usual(1), Usual(10))
        governor.decide(1000, Vote(*map(sum, zip(*votes, strict=True))), 2)
        assert governor.periods == want


def test_a_jump_is_far_above_what_was_usual():
    generator = np.random.default_rng(0)
    jump = Jump()
    usual = 2 * np.exp(-np.arange(3000) / 1000) + 0.05 * generator.standard_normal(3000)
    assert sum(map(jump.note, usual)) == 0
    assert not jump.note(usual[-1] + 0.1)
    assert jump.note(usual[-1] + 1)
    assert jump.note(float("nan"))
    assert not jump.note(usual[-1])


# ------------------------------------------------------------------------------- in a training loop
def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def train(steps, folder=None, *, log="after", optimizer=None, at=lambda *_: None, **options):
    model = mlp()
    g = torch.Generator().manual_seed(1)
    optimizer = optimizer(model) if optimizer else torch.optim.SGD(model.parameters(), lr=0.01)
    losses, norms = [], []
    with torchbp.watch(model, optimizer, log_dir=folder, **options) as monitor:
        for step in range(steps):
            x, y = torch.randn(16, 8, generator=g), torch.randint(0, 4, (16,), generator=g)
            loss = nn.functional.cross_entropy(model(x), y)
            losses.append(loss.item())
            if log == "before":
                monitor.log_loss(train=loss)
            optimizer.zero_grad()
            loss.backward()
            norms.append(
                [0.0 if p.grad is None else p.grad.norm().item() for p in model.parameters()]
            )
            if log == "between":
                monitor.log_loss(train=loss)
            optimizer.step()
            if log == "after":
                monitor.log_loss(train=loss)
            at(step, monitor)
    return monitor, np.array(losses), np.array(norms)


def test_the_default_shows_as_a_plain_number():
    signature = str(inspect.signature(torchbp.watch))
    assert "every: int = 1, sample_every: int = 10, share: float | None = 0.01" in signature


@pytest.mark.parametrize("log", ["before", "between", "after"])
def test_what_is_read_and_logged_carries_its_step(tmp_path, log):
    monitor, losses, norms = train(650, tmp_path, log=log, share=TINY)
    assert monitor.periods == LONGEST
    assert monitor.step == 650
    run = read(tmp_path)
    series = run.vectors["gradient_norm"]
    late = series.steps[series.steps > 400]
    assert late.tolist() == list(range(late[0], 650, 16))
    assert series.steps[:300].tolist() == list(range(300))
    np.testing.assert_allclose(series.values, norms[series.steps], rtol=1e-4)
    samples = run.vectors["error_signal"].steps
    assert samples[samples > 400].tolist() == list(range(480, 650, 160))
    logged = run.scalars["loss/train"]  # of every step, read or not
    assert logged.steps.tolist() == list(range(650))
    np.testing.assert_allclose(logged.values, losses, rtol=1e-6)


def test_the_gap_is_to_the_mean_loss_of_all_steps(tmp_path):
    def validate(step, monitor):
        if step % 20 == 19:
            monitor.log_loss(val=step)

    _, losses, _ = train(640, tmp_path, share=TINY, at=validate)
    gap = read(tmp_path).scalars["run/generalisation_gap"]
    assert gap.steps.tolist() == list(range(19, 640, 20))
    means = losses.reshape(-1, 20).mean(1)
    np.testing.assert_allclose(gap.values, (gap.steps - means) / means, rtol=1e-5)


def test_largest_and_smallest_are_of_what_was_read(tmp_path):
    _, _, norms = train(1000, tmp_path, share=TINY)
    run = read(tmp_path)
    layers = np.hypot(norms[:, ::2], norms[:, 1::2])
    steps, begin = run.vectors["gradient_norm"].steps, 0
    high, low = (run.vectors[f"layer_gradient_norm/{kind}"] for kind in ("max", "min"))
    for k, step in enumerate(high.steps):
        end = int(np.flatnonzero(steps == step)[0]) + 1
        part = layers[steps[begin:end]]
        assert len(part) == 50
        np.testing.assert_allclose(high.values[k], part.max(0), rtol=1e-4)
        np.testing.assert_allclose(low.values[k], part.min(0), rtol=1e-4)
        begin = end


def test_what_was_stretched_is_said_and_written(tmp_path):
    monitor, *_ = train(400, tmp_path, share=TINY)
    (note,) = monitor.notes
    assert "gradient norms are read every 16 steps (asked for: 1)" in note
    assert note in monitor.summary()
    texts = read(tmp_path).texts["periods"]
    assert "every 16 steps" in str(texts)
    monitor, *_ = train(400, share=None)
    assert monitor.notes == []


def test_share_none_reads_as_asked(tmp_path):
    train(400, tmp_path, share=None)
    run = read(tmp_path)
    assert run.vectors["gradient_norm"].steps.tolist() == list(range(400))
    assert run.vectors["error_signal"].steps.tolist() == [0, 1, 2, 3, 4, *range(10, 400, 10)]


def test_a_jump_of_the_loss_brings_the_asked_periods_back(tmp_path):
    def jump(step, monitor):
        if step == 450:
            assert monitor.periods == LONGEST
            monitor.log_loss(train=100.0)
            assert monitor.periods == ASKED

    train(550, tmp_path, share=TINY, at=jump)
    steps = read(tmp_path).vectors["gradient_norm"].steps
    assert set(range(452, 500)) <= set(steps.tolist())


class Late(torch.Tensor):
    """As on a GPU: its value is not asked for before a drain."""


def test_so_does_one_that_is_seen_at_a_drain():
    def jump(step, monitor):
        monitor.log_loss(train=torch.tensor(100.0 if step == 450 else 1.0).as_subclass(Late))
        if step == 452:
            assert monitor.periods == LONGEST
            assert [v.kind for v in monitor.verdicts] == ["spike"]  # drains
        if step == 470:  # one reading later
            assert monitor.periods == ASKED

    train(471, share=TINY, log=None, at=jump)


@pytest.mark.parametrize("what", ["restless", "jumped"])
def test_a_rank_that_sees_trouble_votes_for_a_look(what):
    monitor, *_ = train(20, share=TINY)
    assert monitor._vote().looks == 0
    setattr(*((monitor._judge, "restless") if what == "restless" else (monitor, "_jumped")), True)
    assert monitor._vote().looks == 1


class Cut(nn.Module):
    def forward(self, x):
        return x.relu().detach()


def test_a_trouble_that_begins_late_is_judged_by_readings_as_close_as_ever(tmp_path):
    models = []

    def optimizer(model):
        models.append(model)
        return torch.optim.SGD(model.parameters(), lr=1e-3)

    def cut(step, _):
        if step == 400:
            models[0][1] = Cut()

    monitor, *_ = train(1500, tmp_path, share=TINY, at=cut, optimizer=optimizer)
    (verdict,) = monitor.verdicts
    assert (verdict.kind, verdict.until) == ("disconnected", None)
    steps = read(tmp_path).vectors["gradient_norm"].steps
    near = np.convolve(np.diff(steps) == 1, np.ones(20), "valid") == 20
    assert (steps[:-20][near] >= 400).any()  # 20 steps in a row
    assert monitor.periods == LONGEST  # no longer than that


def test_what_may_become_a_verdict_brings_the_asked_periods_back():
    models = []

    def optimizer(model):
        models.append(model)
        return torch.optim.SGD(model.parameters(), lr=1e-3)

    def cut(step, monitor):
        if step == 470:
            models[0][1] = Cut()
        if step == 488:  # after one reading of it, sampled
            assert monitor.periods == LONGEST
            assert monitor.verdicts == []  # drains
        if step == 500:  # one reading later
            assert monitor.periods == ASKED

    train(501, share=TINY, at=cut, optimizer=optimizer)


def test_two_optimizers_are_measured_where_one_step_in_many_is(tmp_path):
    class Both:
        def __init__(self, model):
            self.parts = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model[0], model[2])]

        def __iter__(self):
            return iter(self.parts)

        def zero_grad(self):
            for part in self.parts:
                part.zero_grad()

        def step(self):
            for part in self.parts:
                part.step()

    updates, before, both = [], [], []

    def make(model):
        both.append(model)
        before.extend(p.detach().clone() for p in model.parameters())
        return Both(model)

    def measure(*_):
        now = [p.detach().clone() for p in both[0].parameters()]
        updates.append([(n - b).norm().item() for n, b in zip(now, before, strict=True)])
        before[:] = now

    monitor, *_ = train(600, tmp_path, share=TINY, optimizer=make, at=measure)
    assert monitor.step == 600
    assert monitor.periods == LONGEST
    found = read(tmp_path).vectors["update_norm"]
    assert found.steps[-2:].tolist() == [320, 480]
    np.testing.assert_allclose(found.values, np.array(updates)[found.steps], rtol=1e-3)


def test_optimizers_that_take_turns_are_both_read(tmp_path):
    model = mlp()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model[0], model[2])]
    with torchbp.watch(model, optimizers, log_dir=tmp_path, share=TINY) as monitor:
        for step in range(801):
            model.zero_grad()
            model[2 * (step % 2)](torch.randn(16, 8)).square().mean().backward()
            optimizers[step % 2].step()
    assert monitor.step == 801
    assert monitor.periods == (1, *LONGEST[1:])
    norms = read(tmp_path).vectors["gradient_norm"]
    assert norms.steps.tolist() == list(range(801))
    assert (norms.values[:, 0] > 0).tolist() == [step % 2 == 0 for step in range(801)]


@pytest.mark.parametrize("closes", [False, True])
def test_turns_of_which_every_other_is_read_are_counted(tmp_path, closes):
    """What is not read reaches other parameters; a closure's backward begins after its step has."""
    model, norms = mlp(), []
    optimizers = [torch.optim.LBFGS(m.parameters(), max_iter=1) for m in (model[0], model[2])]
    if not closes:
        optimizers = [torch.optim.SGD(m.parameters(), lr=1e-4) for m in (model[0], model[2])]
    with torchbp.watch(model, optimizers, log_dir=tmp_path, every=2) as monitor:
        for step in range(40):

            def closure(part=model[2 * (step % 2)]):
                model.zero_grad()
                loss = part(torch.ones(4, 8)).square().mean()
                loss.backward()
                norms.append([p.grad.norm().item() for p in part.parameters()])
                return loss

            if closes:
                optimizers[step % 2].step(closure)
            else:
                closure()
                optimizers[step % 2].step()
    assert monitor.step == 40
    found = read(tmp_path).vectors["gradient_norm"]
    assert found.steps.tolist() == list(range(0, 40, 2))
    np.testing.assert_allclose(found.values[:, :2], norms[::2], rtol=1e-4)


@pytest.mark.parametrize("kind", ["closure", "no optimizer", "accumulated"])
def test_steps_are_counted_and_read_right(tmp_path, kind):
    model, g = mlp(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-4, max_iter=1)
    if kind == "accumulated":
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    norms, micro = [], 3 if kind == "accumulated" else 1
    watched = None if kind == "no optimizer" else optimizer
    with torchbp.watch(model, watched, log_dir=tmp_path, share=TINY) as monitor:
        for _ in range(560):
            optimizer.zero_grad()
            xs = [torch.randn(16, 8, generator=g) for _ in range(micro)]

            def closure(xs=xs):
                model.zero_grad()
                for x in xs:
                    loss = model(x).square().mean()
                    loss.backward()
                norms.append([p.grad.norm().item() for p in model.parameters()])
                return loss

            if kind == "closure":
                optimizer.step(closure)
            elif kind == "accumulated":
                closure()
                optimizer.step()
            else:
                closure()
            monitor.log("mine", 1.0)
    assert monitor.step == 560
    series = read(tmp_path).vectors["gradient_norm"]
    assert set(np.diff(series.steps[series.steps > 360])) == {16}
    np.testing.assert_allclose(series.values, np.array(norms)[series.steps], rtol=1e-4)
    assert read(tmp_path).scalars["mine"].steps.tolist() == list(range(560))


def test_the_time_of_a_step_is_that_of_one(tmp_path, monkeypatch):
    now = [0.0]

    def perf_counter():  # what is measured takes some time
        now[0] += 1e-6
        return now[0]

    clock = types.SimpleNamespace(perf_counter=perf_counter, time=time.time)
    monkeypatch.setattr(capture, "time", clock)

    def tick(step, _):
        now[0] = step + 1.0

    monitor, *_ = train(490, tmp_path, share=TINY, at=tick)
    assert monitor.periods == LONGEST
    times = read(tmp_path).scalars["run/step_time"]
    assert times.steps[-2:].tolist() == [320, 480]
    np.testing.assert_allclose(times.values[1:], 1000, rtol=1e-2)


def test_a_share_of_nothing_is_refused():
    with pytest.raises(ValueError, match="share > 0 or None, got 0"):
        torchbp.watch(mlp(), share=0)
