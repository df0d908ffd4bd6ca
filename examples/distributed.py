"""Many processes: the same training under DDP and FSDP2, lean and watched, equal to one process.

Alone, it starts all three (two processes each for DDP and FSDP2, one of which crashes and is restarted) and compares
them. Under torchrun it is an ordinary distributed script:

    torchrun --nproc-per-node 2 --max-restarts 1 examples/distributed.py --way fsdp

gloo on a CPU, nccl on GPUs. Each process sees its share of every batch; rank 0 writes the log. After a crash torchrun
starts the script anew: it goes on from the last checkpoint, in the same log.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from _data import digits
from _program import batches, finish, parser
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import torchbp
import torchbp.functional as F
from torchbp import nn

SAVE_EVERY = 20


def network(way: str, device: torch.device) -> nn.Module:
    """Return the network, the same in every process; lean, then wrapped."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(),
        nn.Linear(128, 128), nn.LayerNorm(128), nn.GELU(),
        nn.Linear(128, 10),
    ).to(device)  # fmt: skip
    torchbp.lean(model)
    if way == "ddp":
        return DistributedDataParallel(model)
    if way == "fsdp":
        for layer in model:
            if next(layer.parameters(), None) is not None:
                fully_shard(layer)
        fully_shard(model)
    return model


def train(args: argparse.Namespace, steps: int) -> dict[int, float]:
    """Return the loss of every step over all processes, by step; from the last checkpoint on, if there is one."""
    cuda = torch.cuda.is_available()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if cuda
        else torch.device("cpu")
    )
    if args.way != "one":
        dist.init_process_group("nccl" if cuda else "gloo")
    rank, ranks = (0, 1) if args.way == "one" else (dist.get_rank(), dist.get_world_size())
    data = digits()
    model = network(args.way, device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    folder = args.log_dir / args.way / "checkpoint"
    begin = _load(model, optimizer, folder)
    losses: dict[int, float] = {}
    torch.manual_seed(args.seed)
    with torchbp.watch(model, optimizer, log_dir=args.log_dir / args.way) as monitor:
        monitor.step = begin
        for step, rows in enumerate(batches(len(data.x), args.batch, steps)):
            if step < begin:
                continue
            if (
                step == args.crash_at
                and rank == 1
                and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
            ):
                sys.exit("crashed on purpose")
            mine = rows.chunk(ranks)[rank]
            loss = F.cross_entropy(model(data.x[mine].to(device)), data.y[mine].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            shown = loss.detach() / ranks
            if args.way != "one":
                dist.all_reduce(shown)
            losses[step] = shown.item()
            monitor.log_loss(train=shown)
            if (step + 1) % SAVE_EVERY == 0:
                _save(model, optimizer, folder, step + 1)
    if rank == 0:
        (args.log_dir / args.way / "losses.json").write_text(json.dumps(losses))
        print(
            f"{args.way}, {ranks} process{'es' * (ranks > 1)}, from step {begin}: {monitor.summary()}"
        )
    if args.way != "one":
        dist.destroy_process_group()
    return losses


def _save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, step: int) -> None:
    weights, moments = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / f"{step:06}")


def _load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """Load the newest whole checkpoint, and return its step; 0 without one."""
    whole = sorted(path.parent for path in folder.glob("*/.metadata"))
    if not whole:
        return 0
    weights, moments = get_state_dict(model, optimizer)
    checkpoint.load({"model": weights, "optimizer": moments}, checkpoint_id=whole[-1])
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return int(whole[-1].name)


def launch(args: argparse.Namespace, steps: int) -> int:
    """Run all three ways and compare their losses step by step."""
    for way in ("one", "ddp", "fsdp"):
        program = [
            __file__,
            "--way",
            way,
            "--log-dir",
            str(args.log_dir),
            "--seed",
            str(args.seed),
            "--batch",
            str(args.batch),
        ]
        program += ["--steps", str(steps)]
        if way != "one":
            start = [
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                "2",
                "--max-restarts",
                "1",
            ]
            program = [*start, *program, "--crash-at", str(steps // 2)]
        # After a restart gloo waits for ever on the store that torchrun shares (torch 2.13): each try gets its own.
        env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        done = subprocess.run(
            [sys.executable, *program],
            capture_output=True,
            text=True,
            check=False,
            env=env,
            timeout=600,
        )
        print(done.stdout, end="", flush=True)
        if done.returncode:
            sys.exit(f"{way}: {done.stderr}")
    losses = {
        way: {
            int(k): v
            for k, v in json.loads((args.log_dir / way / "losses.json").read_text()).items()
        }
        for way in ("one", "ddp", "fsdp")
    }
    apart = {
        way: max(
            abs(value - losses["one"][step]) / losses["one"][step]
            for step, value in losses[way].items()
        )
        for way in ("ddp", "fsdp")
    }
    return finish(
        args,
        {
            "last loss, one process": losses["one"][steps - 1],
            "largest relative difference, DDP": apart["ddp"],
            "largest relative difference, FSDP2": apart["fsdp"],
            "first step after the restart": float(min(losses["fsdp"])),
        },
        promised={
            "DDP and FSDP2 have the losses of one process to 1e-4": max(apart.values()) < 1e-4,
            "after the crash each went on from a checkpoint": all(
                min(losses[w]) > 0 for w in ("ddp", "fsdp")
            ),
        },
    )


def main() -> int:
    """Train under torchrun, or start it."""
    options = parser(__doc__, "distributed")
    options.add_argument(
        "--way", choices=("one", "ddp", "fsdp"), help="train in this way, instead of comparing all"
    )
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--batch", type=int, default=256, help="over all processes (%(default)s)")
    options.add_argument(
        "--crash-at", type=int, default=-1, help="rank 1 fails at this step, the first time"
    )
    args = options.parse_args()
    steps = 50 if args.small else args.steps
    if args.way is None:
        return launch(args, steps)
    train(args, steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
