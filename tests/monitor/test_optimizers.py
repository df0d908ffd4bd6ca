"""Several optimizers, whose backwards and steps come in every order: each step is counted, each norm its own."""

import numpy as np
import pytest
import torch
from torch import nn

import torchbp
from torchbp.monitor import capture
from torchbp.tensorboard import read

# Iterations that repeat. "z" resets the gradients, "b01" runs a backward through parts 0 and 1, "s0" steps
# the optimizer of part 0, "f0" and "u0" freeze it and undo that.
SCHEDULES = {
    "together": ["z b01 s0 s1"],
    "in turns": ["z b0 s0", "z b1 s1"],
    "in turns, gradients left": ["z b0 s0 b1 s1"],
    "one part in every other": ["z b01 s1 s0", "z b0 s1 s0"],
    "in turns and together": ["z b0 s0 z b1 s1", "z b01 s0 s1", "z b01 s1 s0"],
    "one step left out": ["z b01 s0 s1", "z b01 s1", "z b01 s0"],
    "both left out": ["z b01", "z b01 s0 s1", "z b01 s1 s0"],
    "one accumulates for longer": ["b01 s0", "b01 s0 s1 z"],
    "the late one's gradients are new to the row": ["z b0 s0 s1", "z b01 s0 s1", "z b01 s0 s1"],
    "six to one": ["z b0 s0"] * 6 + ["z b1 s1"],
    "six to one, reset at the end": ["b0 s0 z"] * 6 + ["b1 s1 z"],
}


def play(folder, iterations, **options):
    """Train two parts; return the steps counted and the true number, the norms read and the true ones."""
    torch.manual_seed(0)
    parts = nn.ModuleList(nn.Linear(3, 2) for _ in range(2))
    optimizers = [torch.optim.SGD(part.parameters(), lr=1e-3) for part in parts]
    x, want, now, counted = torch.randn(4, 3), [], None, []
    with torchbp.watch(parts, optimizers, log_dir=folder, **options) as monitor:
        for event in " ".join(iterations).split():
            kind, which = event[0], [int(digit) for digit in event[1:]]
            if kind == "z":
                parts.zero_grad()
            elif kind in "fu":
                parts[which[0]].requires_grad_(kind == "u")
            elif kind == "b":
                sum(parts[i](x).square().mean() for i in which).backward()
                gradients = [p.grad for p in parts.parameters()]
                now = [0.0 if g is None else g.norm().item() for g in gradients]
            else:
                optimizers[which[0]].step()
                if now is not None:
                    want.append(now)
                now = None
            counted.append((monitor.step, len(want)))
    assert f"{len(want)} steps" in str(monitor)
    return *zip(*counted, strict=True), read(folder).vectors["gradient_norm"], np.array(want)


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_are_counted_and_norms_their_own(tmp_path, name, every):
    period = SCHEDULES[name]
    got, true, norms, want = play(tmp_path, (period * 42)[:42], every=every)
    assert got == true
    # A backward that reaches what none did before is counted, and its norms are left out.
    missed = 1 if "six" in name else 0
    assert set(range(0, len(want), every)) - set(norms.steps) <= {6, 7}
    assert len(norms.steps) >= -(-len(want) // every) - missed
    np.testing.assert_allclose(norms.values, want[norms.steps], rtol=1e-4)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_what_is_frozen_while_others_have_their_turn(tmp_path, every, monkeypatch):
    monkeypatch.setattr(capture, "_RELEARN", 8)
    critic = (["u0 z b0 s0"] * 5 + ["f0 z b1 s1"]) * 20
    got, true, norms, want = play(tmp_path, critic, every=every)
    assert got == true
    missed = {5} if every == 1 else set()
    assert set(norms.steps.tolist()) == set(range(0, 120, every)) - missed
    np.testing.assert_allclose(norms.values, want[norms.steps], rtol=1e-4)


def test_what_was_missed_is_looked_for_until_it_comes_again(tmp_path):
    iterations = ["z b0 s0"] * 12 + (["z b1 s1"] + ["z b0 s0"] * 6) * 4
    got, true, norms, want = play(tmp_path, iterations)
    assert got == true
    assert sorted(set(range(len(want))) - set(norms.steps)) == [12]
    np.testing.assert_allclose(norms.values, want[norms.steps], rtol=1e-4)
