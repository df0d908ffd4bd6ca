"""Times a training step (forward, loss, backward) of whole networks: converted by ``torchbp.convert``, and as they are.

The networks are those of models.py. Method: README.md beside this file; both run in turns, in one process.
"""

import argparse
import copy
import datetime
import json
import platform
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from models import MODELS, loss
from run import DATA, clock, interleaved, processor, settle_allocator
from torch import Tensor, nn

import torchbp


def step(model: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[], None]:
    """Return one step that leaves the gradients as its last did."""

    def run() -> None:
        model.zero_grad(set_to_none=True)
        loss(model(inputs), targets).backward()

    return run


def measure(name: str, threads: int, seconds: float) -> dict[str, Any]:
    """Return one row: medians in milliseconds, and the ratio with its quartiles."""
    chosen = MODELS[name]
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    model = chosen.model()
    data = chosen.data(chosen.batch)
    converted = torchbp.convert(copy.deepcopy(model))
    ours, theirs = interleaved(
        step(converted, *data), step(model, *data), clock("cpu", threads), seconds
    )
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "model": name,
        "batch": chosen.batch,
        "threads": threads,
        "ratio": statistics.median(ours) / statistics.median(theirs),
        "ratio_q25": quartiles[0],
        "ratio_q75": quartiles[2],
        "torchbp_ms": statistics.median(ours) * 1e3,
        "torch_ms": statistics.median(theirs) * 1e3,
        "repeats": len(ours),
    }


def main() -> int:
    """Time the networks and write a row for each to the file of today; rows of networks not named stay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each row")
    args = parser.parse_args()
    unknown = sorted(set(args.models) - set(MODELS))
    if unknown:
        parser.error(f"expected models of {', '.join(MODELS)}, got {', '.join(unknown)}")
    settle_allocator()
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    path = DATA / f"steps-cpu-{date}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for name in args.models or MODELS:
        for threads in args.threads:
            row = measure(name, threads, args.seconds)
            rows = [r for r in rows if (r["model"], r["threads"]) != (name, threads)] + [row]
            print(
                f"{name:12}{threads} threads {row['torchbp_ms']:9.1f} / {row['torch_ms']:9.1f} ms",
                end="",
            )
            print(f" {row['ratio']:6.2f}")
    about = {
        "date": date,
        "device": processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    text = ",\n".join(json.dumps(r) for r in rows)
    path.write_text(f'{{"about": {json.dumps(about)},\n"rows": [\n{text}\n]}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
