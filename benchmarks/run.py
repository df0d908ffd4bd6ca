"""Times every op, forward and backward, against torch's, and counts what both keep for backward.

Method: README.md beside this file. ``make bench`` writes benchmarks/data/<device>-<date>.json and prints the table.
"""

import argparse
import datetime
import itertools
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from torchbp.ops import _one_kernel
from torchbp.ops._capabilities import kept_bytes
from torchbp.ops._op import Op, all_ops
from torchbp.ops._samples import Make, Sample
from torchbp.ops.kernels import _library, at_hand

DATA = Path(__file__).parent / "data"
SIZES = (64, 4096, 65536, 1 << 20, 1 << 25)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def step(
    function: Callable[..., Tensor | tuple[Tensor, ...]], sample: Sample
) -> Callable[[], None]:
    """Return one forward and backward, leaving nothing behind."""
    leaves = [t for t in sample.tensors() if t.requires_grad]

    def forward() -> Tensor:
        y = function(*sample.args, **sample.kwargs)
        return y if isinstance(y, Tensor) else y[0]

    seed = torch.ones_like(forward()).contiguous()

    def run() -> None:
        y = forward()
        torch.autograd.grad(y, leaves, seed)

    return run


def clock(device: str, threads: int) -> Callable[[], float]:
    """Return what time is read from: of the process on one thread, else on the wall."""
    if device == "cpu":
        return time.process_time if threads == 1 else time.perf_counter

    def synchronized() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronized


def interleaved(
    ours: Callable[[], None], theirs: Callable[[], None], now: Callable[[], float], seconds: float
) -> tuple[list[float], list[float]]:
    """Time the two in turns, at least 5 times each, for about ``seconds``."""
    times: tuple[list[float], list[float]] = ([], [])
    for run in (ours, theirs):  # warm both
        run()
        run()
    start = time.perf_counter()
    run_both = 0
    inner = 1
    while run_both < 5 or (time.perf_counter() - start < seconds and run_both < 400):
        for i, run in enumerate((ours, theirs) if run_both % 2 else (theirs, ours)):
            before = now()
            for _ in range(inner):
                run()
            took = (now() - before) / inner
            times[i if run_both % 2 else 1 - i].append(took)
        if run_both == 0:  # long enough for the clock's resolution
            inner = max(1, math.ceil(2e-3 / max(times[0][0], 1e-7)))
            times[0].clear()
            times[1].clear()
        run_both += 1
    return times


def torchs(op: Op) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """Return torch's function of the name; where there is none, the composition that is the op's reference."""
    found = op.torchs or op.reference
    if found is None:
        message = f"{op.name}: expected torch's function or a reference to time against, got none"
        raise LookupError(message)
    return found


def made(op: Op, n: int, dtype: str, device: str) -> Sample:
    """Return the op's arguments. On a GPU they are drawn there: on the CPU the large ones take longer than the ops."""
    make = Make(DTYPES[dtype], device)
    if device == "cpu":
        return op.benchmark(make, n)
    make._generator = torch.Generator(device).manual_seed(0)  # noqa: SLF001
    with torch.device(device):
        return op.benchmark(make, n)


def measure(
    op: Op, n: int, dtype: str, device: str, threads: int, seconds: float
) -> dict[str, Any]:
    """Return one row: times in microseconds, the ratio with its neighbours' quartiles, and the bytes kept.

    On one thread they are medians. On all threads the shortest: whatever else runs takes a core away, for which the
    others then wait, many milliseconds at a time.
    """
    reference = torchs(op)
    sample = made(op, n, dtype, device)
    torch.set_num_threads(threads)
    ours, theirs = interleaved(
        step(op.function, sample), step(reference, sample), clock(device, threads), seconds
    )
    typical = statistics.median if threads == 1 else min
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "op": op.name,
        "n": n,
        "dtype": dtype,
        "threads": threads,
        "ratio": typical(ours) / typical(theirs),
        "ratio_q25": quartiles[0],
        "ratio_q75": quartiles[2],
        "torchbp_us": typical(ours) * 1e6,
        "torch_us": typical(theirs) * 1e6,
        "repeats": len(ours),
        "torchbp_bytes": kept_bytes(op.function, sample),
        "torch_bytes": kept_bytes(reference, sample),
        "backward": engine(op, dtype, step(op.function, sample)),
    }


def engine(op: Op, dtype: str, run: Callable[[], None]) -> str:
    """Return what computed: torch's kernel, the formula, or the formula compiled, for the CPU or for a GPU."""
    _library.remembered.clear()
    kernel = _one_kernel._kernel  # noqa: SLF001
    with patch.object(_one_kernel, "_kernel", wraps=kernel) as asked:
        run()
    if any(kernel(*call.args) for call in asked.call_args_list):
        return "formula in one kernel"
    if any(found is not None for found in _library.remembered.values()):
        return "formula, compiled"
    return op.fused if op.fused and dtype == "float32" else "formula"


def about(device: str = "cpu") -> dict[str, Any]:
    """Return what the rows of a file share: date, device, versions."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernels": _library.capability() if at_hand() else None,
    }


def processor() -> str:
    """Return the processor's name as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text: one line an op, dtype and thread count, one column a size."""
    sizes = sorted({r["n"] for r in rows})
    lines = [
        f"{'time, torchbp / torch':44}" + "".join(f"{_size(n):>8}" for n in sizes) + "   bytes kept"
    ]
    keys = list(dict.fromkeys((r["op"], r["dtype"], r["threads"]) for r in rows))
    for op, dtype, threads in keys:
        mine = {
            r["n"]: r for r in rows if (r["op"], r["dtype"], r["threads"]) == (op, dtype, threads)
        }
        cells = "".join(f"{mine[n]['ratio']:8.2f}" if n in mine else " " * 8 for n in sizes)
        last = mine[max(mine)]
        kept = f"{last['torchbp_bytes'] / max(1, last['torch_bytes']):.2f}"
        lines.append(
            f"{op[:26]:27}{dtype:9}{threads:2} thread{'s' if threads > 1 else ' '}{cells}   {kept}"
        )
    for dtype in DTYPES:
        large = [r["ratio"] for r in rows if r["n"] >= 1 << 20 and r["dtype"] == dtype]
        if large:
            mean = math.exp(statistics.fmean(map(math.log, large)))
            lines.append(
                f"{dtype}, 1M elements and more: geometric mean {mean:.2f}, worst {max(large):.2f}"
            )
    return "\n".join(lines)


def _size(n: int) -> str:
    return f"{n >> 20}M" if n >= 1 << 20 else f"{n >> 10}k" if n >= 1024 else str(n)


def settle_allocator() -> None:
    """Free a large tensor once, as any training has: from then on the C library keeps what is freed.

    Before, a tensor of some megabytes comes from the system page by page, each time, and what an op costs depends on
    which ones ran before it.
    """
    torch.empty(31 << 18).zero_()  # 31 MB: glibc keeps no more than 32 together


def stored_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows that are in the file already."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def configuration(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what tells a row from others: a file has one of each."""
    return row["op"], row["dtype"], row["threads"], row["n"]


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the old rows, those measured again in the place of what they were, and the others of the new behind."""
    return list({configuration(r): r for r in [*old, *new]}.values())


def main() -> int:
    """Run the benchmark and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help="these only")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, nargs="+", default=None, help="1 and all by default")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row")
    parser.add_argument(
        "--name", default="ops", help="of the file in benchmarks/data (%(default)s)"
    )
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument(
        "--resume", action="store_true", help="leave out what today's file of that name has"
    )
    parser.add_argument(
        "--at-most",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="stop then, between two rows; --resume goes on",
    )
    args = parser.parse_args()
    cores = torch.get_num_threads()
    threads = args.threads or (sorted({1, cores}) if args.device == "cpu" else [1])
    unknown = sorted(set(args.ops) - set(all_ops()))
    if unknown:
        parser.error(f"expected names of ops, got {', '.join(unknown)}; `torchbp ops` lists them")
    ops = [all_ops()[name] for name in args.ops or all_ops()]
    facts = about(args.device)
    path = DATA / f"{args.name}-{args.device}-{facts['date']}.json"
    stored = stored_rows(path)
    rows: list[dict[str, Any]] = []
    known = {configuration(r) for r in stored} if args.resume else set()
    rest = [
        (op, dtype, count, n)
        for op in ops
        for dtype, count, n in itertools.product(args.dtypes, threads, args.sizes)
        if (op.name, dtype, count, n) not in known
    ]
    settle_allocator()
    start = time.monotonic()
    for done, (op, dtype, count, n) in enumerate(rest):
        if time.monotonic() - start > args.at_most:
            print(f"\r\033[K{len(rest) - done} rows left: go on with --resume", file=sys.stderr)
            break
        try:
            row = measure(op, n, dtype, args.device, count, args.seconds)
        except RuntimeError as error:  # torch has no kernel for the dtype, say
            reason = str(error).splitlines()[0]
            print(f"\r{op.name} {dtype} {n}: not timed: {reason}\033[K", file=sys.stderr)
            if args.device == "cuda":  # what torch keeps for later, cuBLAS lacks now
                torch.cuda.empty_cache()
            continue
        rows.append(row)
        progress = f"\r{op.name} {dtype} {n} on {count}: {row['ratio']:.2f}\033[K"
        print(progress, end="", file=sys.stderr)
    print("\r\033[K", end="", file=sys.stderr)
    print(table(merged(stored, rows) if args.resume else rows))
    if not args.no_write:
        DATA.mkdir(exist_ok=True)
        text = ",\n".join(json.dumps(r) for r in merged(stored, rows))
        path.write_text(f'{{"about": {json.dumps(facts)},\n"rows": [\n{text}\n]}}\n')
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
