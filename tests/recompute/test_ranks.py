"""Two processes: DDP, and FSDP2 with shards layer by layer, whose parameters are freed between forward and backward."""

import os
import socket
import subprocess
import sys

import pytest

PROGRAM = """
import copy, os, sys
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
import torchbp
from torchbp.ops import _recipe
from torchbp.recompute import _graph, _scope
from torchbp.recompute._kept import Share
from benchmarks.models import MODELS, loss

torch.set_num_threads(1)
kind = sys.argv[1]
rank, world = int(os.environ["RANK"]), 2
dist.init_process_group("gloo", rank=rank, world_size=world)
_graph.small = 0
_recipe._COPIED_SHARE = 1 if kind == "fsdp-layers" else 1 / 64
shares = 0

def counted(t, forward=None):
    global shares
    item = _graph.kept_or_share(t, forward)
    shares += type(item) is Share
    return item

_scope.kept_or_share = counted
torch.manual_seed(0)
plain = MODELS["GPT"].small()
x, y = MODELS["GPT"].small_data(4)

def trained(model):
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind == "fsdp-blocks":
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    else:  # every layer by itself: a norm's weight is not there when the Linear behind it asks for its input
        for module in list(model.modules()):
            if module is not model and next(module.parameters(recurse=False), None) is not None:
                fully_shard(module)
        fully_shard(model)
    if kind != "ddp":
        try:
            torchbp.lean(model)
        except RuntimeError as error:
            assert "shard" in str(error)
        else:
            raise AssertionError("a sharded model was not refused")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        torch.manual_seed(10 * step + rank)
        optimizer.zero_grad()
        loss(model(x[rank::world]), y[rank::world]).backward()
        optimizer.step()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]

want = trained(torchbp.convert(copy.deepcopy(plain)))
assert not shares
got = trained(torchbp.lean(copy.deepcopy(plain), budget=0.4))
assert shares, "no recipe was used"
assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), "not the same bits"
print("the same bits", shares, flush=True)
dist.barrier()
os._exit(0)  # while the interpreter is torn down, gloo's threads may abort it (pytorch#179291)
"""


@pytest.mark.parametrize(
    "kind", ["ddp", pytest.param("fsdp-blocks", marks=pytest.mark.slow), "fsdp-layers"]
)
def test_the_same_bits(tmp_path, kind):
    script = tmp_path / "train.py"
    script.write_text(PROGRAM)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(2):
        extra = {"RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2}
        extra |= {"OMP_NUM_THREADS": 1, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        env = os.environ | {k: str(v) for k, v in extra.items()}
        command = [sys.executable, str(script), kind]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    for process in processes:
        out, _ = process.communicate(timeout=180)
        assert process.returncode == 0
        assert "the same bits" in out
