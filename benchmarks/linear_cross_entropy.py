"""Times linear + cross entropy and measures its peak: torch unfused, torch chunked, torchbp, the three products alone.

Forward and backward on float32, and bfloat16 on a GPU. Times: one thread, the time of the process, medians of runs in
turns. The peak, in a process for each way, is what resident memory rose to beyond the inputs (Linux: VmHWM, reset by
/proc/self/clear_refs). With ``--device cuda`` times are on the wall, and the peak is the CUDA allocator's.
``python benchmarks/linear_cross_entropy.py`` writes benchmarks/data/linear-cross-entropy-<device>-<date>.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from run import DATA, DTYPES, about, clock

import torchbp.functional as bp

Shape = tuple[int, int, int]  # N, D, C
SHAPES: dict[str, list[tuple[Shape, str]]] = {
    "cpu": [((1024, 1024, 32000), "float32"), ((4096, 256, 8000), "float32")],
    # The last: a batch of Llama 3.
    "cuda": [
        ((1024, 1024, 32000), "float32"),
        ((4096, 1024, 32000), "bfloat16"),
        ((8192, 4096, 128256), "bfloat16"),
    ],
}


def products(x: Tensor, weight: Tensor, target: Tensor) -> None:
    """Run the three matrix products that no implementation can do without, 512 rows at a time, in reused memory."""
    del target
    x, weight = x.detach(), weight.detach()
    grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
    buffer = x.new_empty(512, len(weight))
    for some, grad in zip(x.split(512), grad_x.split(512), strict=True):
        z = torch.mm(some, weight.T, out=buffer[: len(some)])
        torch.mm(z, weight, out=grad)
        grad_weight.addmm_(z.T, some)


def unfused(x: Tensor, weight: Tensor, target: Tensor) -> None:
    F.cross_entropy(F.linear(x, weight), target).backward()


def chunked(x: Tensor, weight: Tensor, target: Tensor) -> None:
    options = torch.nn.LinearCrossEntropyOptions(chunking_method="aspect_ratio")
    F.linear_cross_entropy(x, weight, target, options=options).backward()


def torchbp(x: Tensor, weight: Tensor, target: Tensor) -> None:
    bp.linear_cross_entropy(x, weight, target).backward()


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {
    f.__name__: f for f in (products, unfused, chunked, torchbp)
}
if not hasattr(torch.nn, "LinearCrossEntropyOptions"):  # before torch 2.13
    del WAYS["chunked"]


def status(field: str) -> int:
    """Return a field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise LookupError(field)


def example(shape: Shape, dtype: str = "float32", device: str = "cpu") -> tuple[Tensor, ...]:
    """Return hidden states, the weight and targets."""
    torch.manual_seed(0)
    positions, features, classes = shape
    with torch.device(device):
        x = torch.randn(positions, features)
        weight = torch.randn(classes, features) / features**0.5
        target = torch.randint(classes, (positions,))
    return *(t.to(DTYPES[dtype]).requires_grad_() for t in (x, weight)), target


def peak_on_gpu(way: str, shape: Shape, dtype: str) -> int:
    """Return the peak of one step in bytes, by the CUDA allocator, gradients included."""
    x, weight, target = example(shape, dtype, "cuda")
    WAYS[way](x, weight, target)
    x.grad = weight.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    WAYS[way](x, weight, target)
    return torch.cuda.max_memory_allocated() - before


def peak(way: str, shape: Shape) -> int:
    """Return the peak of one step in bytes; in this process."""
    x, weight, target = example(shape)
    warm = torch.randn(64, shape[1], requires_grad=True)  # threads and code, not memory
    WAYS[way](warm, weight[:256].detach().requires_grad_(), target[:64] % 256)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    WAYS[way](x, weight, target)
    return status("VmHWM") - before


def times(shape: Shape, dtype: str, device: str, repeats: int) -> dict[str, list[float]]:
    """Return seconds of each run of each way, in turns; the first, which warms up, left out."""
    x, weight, target = example(shape, dtype, device)
    now = clock(device, 1)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for k in range(repeats + 1):
        for way in list(WAYS)[:: 1 if k % 2 else -1]:
            x.grad = weight.grad = None
            start = now()
            WAYS[way](x, weight, target)
            took = now() - start
            if k:
                found[way].append(took)
    return found


def measure(shape: Shape, dtype: str, device: str, repeats: int) -> list[dict[str, Any]]:
    """Return one row a way."""
    rows = []
    for way, seconds in times(shape, dtype, device, repeats).items():
        if device == "cuda":
            most = peak_on_gpu(way, shape, dtype)
        else:
            command = [sys.executable, __file__, "--peak", way, "--shape", *map(str, shape)]
            most = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        row = {"way": way, "shape": list(shape), "dtype": dtype}
        row |= {"seconds": round(statistics.median(seconds), 5)}
        row |= {"seconds_min": round(min(seconds), 5), "repeats": repeats}
        rows.append(row | {"peak_mib": round(most / 2**20, 1)})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text, with the shares that count."""
    lines = []
    for shape, dtype in dict.fromkeys((tuple(r["shape"]), r["dtype"]) for r in rows):
        of = {r["way"]: r for r in rows if (tuple(r["shape"]), r["dtype"]) == (shape, dtype)}
        lines.append("N{} D{} C{} {}".format(*shape, dtype))
        for way, r in of.items():
            time_share = r["seconds"] / of["products"]["seconds"]
            peak_share = r["peak_mib"] / of["unfused"]["peak_mib"]
            lines.append(
                f"  {way:9} {r['seconds']:7.4f} s, {time_share:4.2f} of the products;"
                f" peak {r['peak_mib']:6.1f} MiB, {peak_share:4.2f} of unfused"
            )
    return "\n".join(lines)


def main() -> int:
    """Run the benchmark and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peak", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "D", "C"))
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="with --shape")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        print(peak(args.peak, tuple(args.shape)))
        return 0
    shapes = [(tuple(args.shape), args.dtype)] if args.shape else SHAPES[args.device]
    rows = [row for s, dtype in shapes for row in measure(s, dtype, args.device, args.repeats)]
    print(table(rows))
    if not args.no_write:
        facts = about(args.device) | {"threads": torch.get_num_threads()}
        path = DATA / f"linear-cross-entropy-{args.device}-{facts['date']}.json"
        text = ",\n".join(json.dumps(r) for r in rows)
        path.write_text(f'{{"about": {json.dumps(facts)},\n"rows": [\n{text}\n]}}\n')
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
