"""Two gloo processes against one: the same numbers, one collective a drain."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from torchbp.monitor._harvest import Sums, reduced
from torchbp.monitor._row import Row
from torchbp.tensorboard import read

PROGRAM = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed as dist, torch.nn.functional as F
from torch import nn
import torchbp

kind, folder, fails = sys.argv[1], sys.argv[2], sys.argv[3] == "fails"
torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 31), nn.Tanh(), nn.Linear(31, 5)
)
world = int(os.environ.get("WORLD_SIZE", 1))
rank = int(os.environ.get("RANK", 0))
reductions = []
if world > 1:
    dist.init_process_group("gloo")
if kind == "ddp":
    model = nn.parallel.DistributedDataParallel(model)
elif kind.startswith("fsdp"):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if kind == "fsdp-mixed" else None
    extra = {"mp_policy": policy} if policy else {}
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **extra)
    fully_shard(model, **extra)
if world > 1:
    true = dist.all_reduce
    def counted(*args, **kwargs):
        reductions.append(1)
        return true(*args, **kwargs)
    dist.all_reduce = torch.distributed.all_reduce = counted
g = torch.Generator().manual_seed(1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
size = 32 // world
mine = slice(size * rank, size * rank + size)
try:
    with torchbp.watch(model, optimizer, log_dir=folder) as monitor:
        for step in range(60):
            x, y = torch.randn(32, 20, generator=g), torch.randint(0, 5, (32,), generator=g)
            if fails and step == 55 and rank == 1:
                raise RuntimeError("on purpose")
            if fails and step == 55:
                break
            optimizer.zero_grad()
            F.cross_entropy(model(x[mine]).float(), y[mine]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        if fails:
            raise RuntimeError("the others have failed")
except RuntimeError:
    assert fails
print(json.dumps([rank, len(reductions), [v.kind for v in monitor.verdicts]]), flush=True)
if world > 1:
    dist.barrier() if not fails else None
    os._exit(0)  # while the interpreter is torn down, gloo's threads may abort it (pytorch#179291)
"""


NOISE = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed as dist
from torch import nn
import torchbp

micro, folder, rank = int(sys.argv[1]), sys.argv[2], int(os.environ["RANK"])
dist.init_process_group("gloo")
model = nn.Sequential(nn.Linear(60, 1, bias=False))
model = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
g = torch.Generator().manual_seed(rank)
with torchbp.watch(model, optimizer, log_dir=folder, sample_every=1) as monitor:
    for _ in range(150):
        optimizer.zero_grad()
        for last in [False] * (micro - 1) + [True]:
            model.require_backward_grad_sync = last
            (model(0.2 + torch.randn(8, 60, generator=g)).mean() / micro).backward()
        optimizer.step()
print(json.dumps([rank, 0, [v.kind for v in monitor.verdicts]]), flush=True)
dist.barrier()
os._exit(0)  # while the interpreter is torn down, gloo's threads may abort it (pytorch#179291)
"""


GOVERNED = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed as dist
from torch import nn
import torchbp
from torchbp.monitor import _governor, _monitor

folder, rank = sys.argv[2], int(os.environ["RANK"])
_governor._FIRST, _governor.DRAIN_EVERY, _monitor.DRAIN_EVERY = 50, 10, 10
dist.init_process_group("gloo")
model = nn.parallel.DistributedDataParallel(nn.Linear(6, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
seen = []
with torchbp.watch(model, optimizer, log_dir=folder, share=1e-9) as monitor:
    for step in range(300):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 6)).square().mean()
        loss.backward()
        optimizer.step()
        if rank == 0:
            monitor.log_loss(train=loss)
        if rank == 1 and step == 70:
            monitor.log_loss(train=float("nan"))
        seen.append(monitor.periods)
print(json.dumps([rank, 0, seen]))
dist.barrier()
os._exit(0)  # while the interpreter is torn down, gloo's threads may abort it (pytorch#179291)
"""


def launch(tmp_path, kind, ranks, fails="fine", program=PROGRAM):
    script = tmp_path / "train.py"
    script.write_text(program)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    folder = tmp_path / f"{kind}-{ranks}"
    processes = []
    for rank in range(ranks):
        extra = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = os.environ | {k: str(v) for k, v in extra.items()} | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(script), kind, str(folder), fails]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    said = []
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        said.append(json.loads(out.splitlines()[-1]))
    return read(folder), said


@pytest.fixture(scope="module")
def want(tmp_path_factory):
    run, _ = launch(tmp_path_factory.mktemp("plain"), "plain", 1)
    return run


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_equal_one(tmp_path, want, kind):
    got, said = launch(tmp_path, kind, 2)
    quantities = ("gradient_norm", "stepped_gradient_norm", "weight_norm", "update_norm")
    for quantity in (*quantities, "error_signal", "activation_rms"):
        a, b = want.vectors[quantity], got.vectors[quantity]
        assert a.names == b.names
        assert a.steps.tolist() == b.steps.tolist()
        np.testing.assert_allclose(b.values, a.values, rtol=1e-5, err_msg=quantity)
    files = list((tmp_path / f"{kind}-2").iterdir())
    assert len(files) == 1  # rank 0 alone writes
    for _, reductions, verdicts in said:
        assert reductions == 2  # after 50 steps, and at the end
        assert verdicts == []


@pytest.mark.slow
def test_mixed_precision_shards(tmp_path, want):
    got, _ = launch(tmp_path, "fsdp-mixed", 2)
    a, b = (run.vectors["gradient_norm"].values[0] for run in (want, got))
    np.testing.assert_allclose(b, a, rtol=0.05)


def test_a_rank_that_fails_leaves_no_rank_waiting(tmp_path):
    got, said = launch(tmp_path, "ddp", 2, "fails")
    assert got.vectors["gradient_norm"].steps.tolist() == list(range(55))
    assert [reductions for _, reductions, _ in said] == [1, 1]


@pytest.mark.parametrize("micro", [1, 3])
def test_the_noise_scale_from_what_ranks_have_alone(tmp_path, micro):
    """A linear loss g·w with g ~ N(m, I): S = dimensions, |G|² = |m|²."""
    got, _ = launch(tmp_path, str(micro), 2, program=NOISE)
    value, low, high = got.vectors["noise_scale"].values[-1]
    assert low < 60 / (60 * 0.2**2) < high
    assert high - low < 0.8 * value
    assert got.scalars["run/ranks"].values[-1] == 2


@pytest.mark.parametrize("other", [7, 8])
def test_a_row_that_ranks_do_not_agree_on_is_dropped(monkeypatch, other):
    """Two ranks of which the other one's row may be of another step: sums would be of two steps."""

    def all_reduce(tensor):
        theirs = tensor.clone()
        theirs[0, :2] = torch.tensor([other, other**2])
        tensor += theirs

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    sums = Sums([Row(7)], [0], {"gradient_norm": np.array([[4.0, 9.0]])})
    votes = reduced([sums], np.array([True, True]), 1, torch.device("cpu"), (1.0, 2.0, 0.0))
    assert votes.tolist() == [2.0, 4.0, 0.0]
    if other == 7:
        assert sums.parameters["gradient_norm"].tolist() == [[8.0, 18.0]]
    else:
        assert sums.parameters == {}


def test_ranks_change_their_periods_together(tmp_path):
    """Rank 0 alone logs every step, rank 1 alone sees a loss jump: after the next drain both look closely."""
    got, said = launch(tmp_path, "ddp", 2, program=GOVERNED)
    (_, _, seen), (_, _, others) = said
    assert seen == others
    asked, longest = [1, 10, 10], [16, 160, 160]
    assert seen[:49] == [asked] * 49
    assert seen[70:190] == [longest] * 120
    assert asked in seen[190:]
    steps = got.vectors["gradient_norm"].steps.tolist()
    assert steps[:50] == list(range(50))
    assert [s for s in steps if 80 < s < 190] == list(range(96, 190, 16))
    assert got.scalars["loss/train"].steps.tolist() == list(range(300))
