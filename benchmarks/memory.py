"""What training keeps and takes: torch, its checkpoints and its compiler, against torchbp, lean, and lean with budgets.

Method: README.md beside this file. Each model runs in one process, one thread, all ways in turns. Writes
benchmarks/data/memory-<device>-<date>.json and draws docs/pictures/lean.svg from the CPU's. On a GPU bytes are those of
CUDA's allocator, and times are on the wall.
"""

import argparse
import copy
import ctypes
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

sys.path.insert(0, str(Path(__file__).parent))
from memory_picture import draw
from memory_ways import COMPILED, WAYS, WORDS_WAYS
from models import MODELS, WORDS, Configuration, LanguageModel, loss
from run import DATA, about, clock, settle_allocator

from torchbp.recompute._live import Live

ALL = {**MODELS, "GPT, 32000 words": WORDS}
LARGEST = ("torch", "torch checkpoint", "lean", "lean 0.3")


def ways_of(config: Configuration) -> dict[str, Any]:
    """Return the ways that a configuration is measured in."""
    return WORDS_WAYS if config is WORDS else WAYS


class Step:
    """Forward, loss and backward of one model made one way, always on the same data; ``half``: under autocast."""

    def __init__(
        self, name: str, way: str, batch: int, device: str = "cpu", *, half: bool = False
    ) -> None:
        torch.manual_seed(0)
        config = ALL[name]
        self.device, self.half = device, half
        self.model = ways_of(config)[way](config.model().to(device))
        self.x, self.y = (t.to(device) for t in config.data(batch))

    def forward(self) -> Tensor:
        """Return the loss; dropout draws alike each time."""
        torch.manual_seed(1)
        with torch.autocast(self.device, torch.bfloat16, self.half):
            if isinstance(self.model, LanguageModel):
                return self.model(self.x, self.y)
            return loss(self.model(self.x), self.y)

    def __call__(self) -> None:
        self.model.zero_grad(set_to_none=False)
        self.forward().backward()

    def bytes(self) -> tuple[int, int]:
        """Return what is alive between forward and backward, and at most in the whole step."""
        if self.device == "cuda":
            return self.allocated()
        apart = [*self.model.parameters(), *self.model.buffers(), self.x, self.y]
        apart += [p.grad for p in self.model.parameters() if p.grad is not None]
        gc.collect()
        with Live(lambda: "", apart) as live:
            value = self.forward()
            kept = live.now
            value.backward()
        return kept, live.peak

    def allocated(self) -> tuple[int, int]:
        """The same as CUDA's allocator counts it, workspaces of kernels included."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        value = self.forward()
        kept = torch.cuda.memory_allocated() - before
        value.backward()
        return kept, torch.cuda.max_memory_allocated() - before

    def saved(self) -> int:
        """Return what saved-tensor hooks see, by storages: for compiled code, into which ``bytes`` can't see."""
        apart = {t.data_ptr() for t in (*self.model.parameters(), self.x, self.y)}
        kept: dict[int, Tensor] = {}

        def pack(t: Tensor) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t.detach()
            return t.detach()

        hidden: Any = torch.compiler.disable(pack)
        with saved_tensors_hooks(hidden, lambda t: t):
            self.forward()
        return sum(t.untyped_storage().nbytes() for k, t in kept.items() if k not in apart)

    def gradients(self) -> list[Tensor]:
        """Return what one step gives, from the same buffers each time."""
        self()
        return [p.grad.clone() for p in self.model.parameters() if p.grad is not None]


def measure(
    name: str, ways: list[str], batch: int, device: str, seconds: float, *, half: bool
) -> list[dict[str, Any]]:
    """Return one row a way."""
    steps = {way: Step(name, way, batch, device, half=half) for way in ways}
    now = clock(device, 1)
    for step in steps.values():  # budgets are measured in the first
        step()
        step()
    buffers = copy.deepcopy(dict(steps["torch"].model.named_buffers()))
    for step in steps.values():
        for key, buffer in step.model.named_buffers():
            buffer.copy_(buffers[key])
    unseen = COMPILED if device == "cpu" else None
    sizes = {w: (s.saved(), 0) if w == unseen else s.bytes() for w, s in steps.items()}
    times: dict[str, list[float]] = {way: [] for way in steps}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times["torch"]) < 3:
        for way, step in steps.items():
            before = now()
            step()
            times[way].append(now() - before)
    rows = []
    for way, step in steps.items():
        kept, peak = sizes[way]
        ratios = sorted(a / b for a, b in zip(times[way], times["torch"], strict=True))
        row = {
            "model": name,
            "way": way,
            "batch": batch,
            "kept_bytes": kept,
            "kept": kept / sizes["torch"][0],
            "milliseconds": statistics.median(times[way]) * 1e3,
            "time": statistics.median(ratios),
            "time_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
            "repeats": len(ratios),
            **({"autocast": "bfloat16"} if half else {}),
        }
        if peak:
            row |= {"peak_bytes": peak, "peak": peak / sizes["torch"][1]}
        if way.startswith("lean"):
            row["bits_equal"] = same_bits(name, way, batch, step)
        rows.append(row)
    return rows


def same_bits(name: str, way: str, batch: int, step: Step) -> bool:
    """Return whether the gradients of a lean step are those of the converted model, which is not lean."""
    _, *criterion = way.split(", ")
    other = Step(name, ", ".join(["torchbp", *criterion]), batch, step.device, half=step.half)
    for mine, its in zip(step.model.buffers(), other.model.buffers(), strict=True):
        its.copy_(mine)
    torch.use_deterministic_algorithms(step.device == "cuda")  # or attention's backward is not
    try:
        pairs = zip(step.gradients(), other.gradients(), strict=True)
    except RuntimeError:  # an op of torch's has no such form
        torch.use_deterministic_algorithms(True, warn_only=True)
        pairs = zip(step.gradients(), other.gradients(), strict=True)
    torch.use_deterministic_algorithms(False)
    return all(torch.equal(a, b) for a, b in pairs)


# ---------------------------------------------------------------------------------- in a process of its own


def resident(name: str, way: str, batch: int, mapped: bool) -> int:
    """Return by how many bytes a step raises what is resident at most, in a process of its own."""
    return int(_child(mapped, "resident", name, way, batch))


def largest_batch(name: str, way: str, limit: int, mapped: bool) -> int:
    """Return the largest batch with which steps run in ``limit`` bytes of address space above the bare model's."""

    def fits(batch: int) -> bool:
        return _child(mapped, "fits", name, way, batch, limit) == "True"

    low, high = 0, 16
    while fits(high):
        low, high = high, high * 2
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _child(mapped: bool, *args: object) -> str:
    command = [sys.executable, "-W", "ignore", __file__, "--child", *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    if mapped:
        env["MALLOC_MMAP_THRESHOLD_"] = str(256 << 10)
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return run.stdout.strip() or "False"


def _in_child(what: str, name: str, way: str, batch: str, limit: str = "0") -> object:
    settle_allocator()
    step = Step(name, way, int(batch) if way == COMPILED else 1)
    step()  # what is made once: threads, kernels, the budget's measurement
    step()
    step.x, step.y = ALL[name].data(int(batch))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free by now is no one's
    if what == "resident":
        before = _resident()
        Path("/proc/self/clear_refs").write_text("5")  # forgets the most so far
        step()
        return _resident("VmHWM") - before
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(limit), used + int(limit)))
    try:
        step()
        step()
    except RuntimeError:  # can't allocate memory
        return False
    return True


def _resident(field: str = "VmRSS") -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


# ---------------------------------------------------------------------------------- what is shown


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text."""
    lines = [f"{'':50}{'kept':>8}{'peak':>8}{'time':>8}   of torch's"]
    for r in rows:
        cells = "".join(f"{r[k]:8.2f}" if k in r else " " * 8 for k in ("kept", "peak", "time"))
        equal = r.get("bits_equal")
        note = "" if equal is None else "   bits equal" if equal else "   BITS DIFFER"
        half = ", bfloat16" if r.get("autocast") else ""
        lines.append(f"{r['model'] + half:18}{r['way']:32}{cells}{note}")
    return "\n".join(lines)


def stored(device: str = "cpu") -> dict[str, dict[str, Any]]:
    """Return the rows of the newest file, by what they are of."""
    files = sorted(DATA.glob(f"memory-{device}-*.json"))
    rows = json.loads(files[-1].read_text())["rows"] if files else []
    return {key(r): r for r in rows}


def key(row: dict[str, Any]) -> str:
    """Return what a row is of: a model made one way, or its largest batch."""
    mapped = ", mapped" if row.get("mapped") else ""
    half = ", bfloat16" if row.get("autocast") else ""
    return f"{row['model']}, {row['way']}, {row.get('limit_mib', 'a step')}{mapped}{half}"


def store(fresh: list[dict[str, Any]], device: str) -> None:
    """Put rows into the file of today: bytes and times of a step stand in one row."""
    rows = stored(device)
    for row in fresh:
        rows[key(row)] = rows.get(key(row), {}) | row
    facts = about(device)
    text = ",\n".join(json.dumps(r) for r in rows.values())
    path = DATA / f"memory-{device}-{facts['date']}.json"
    path.write_text(f'{{"about": {json.dumps(facts)},\n"rows": [\n{text}\n]}}\n')
    print(f"wrote {path}")


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(ALL)}")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each model")
    parser.add_argument("--resident", action="store_true", help="peak resident memory instead")
    parser.add_argument("--largest", type=int, metavar="MIB", help="largest batch in so much")
    parser.add_argument(
        "--mapped",
        action="store_true",
        help="with either: the C library gives what is freed back to the system, from 256 KiB on",
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--ways", nargs="+", help="these and torch only")
    parser.add_argument("--times", type=float, default=0.5, help="of the model's batch")
    parser.add_argument("--autocast", action="store_true", help="to bfloat16")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # or its products refuse to be the same twice
    if args.child:
        print(_in_child(*args.child))
        return 0
    settle_allocator()
    for name in args.models or ALL:
        batch = int(ALL[name].batch * args.times)  # all ways stand in memory at once
        ways = [w for w in ways_of(ALL[name]) if not args.ways or w in {"torch", *args.ways}]
        same: dict[str, Any] = {"model": name, "batch": batch}
        mapped = {"mapped": True} if args.mapped else {}
        if args.largest:
            limit = {"model": name, "limit_mib": args.largest, **mapped}
            fresh = [
                {
                    **limit,
                    "way": w,
                    "largest_batch": largest_batch(name, w, args.largest << 20, args.mapped),
                }
                for w in LARGEST
            ]
            print("\n".join(map(str, fresh)), flush=True)
        elif args.resident:
            fresh = [
                {
                    **same,
                    **mapped,
                    "way": w,
                    "resident_bytes": resident(name, w, batch, args.mapped),
                }
                for w in ways
            ]
            for row in fresh:
                row["resident"] = row["resident_bytes"] / fresh[0]["resident_bytes"]
                print(f"{name:18}{row['way']:32}{row['resident']:8.2f}", flush=True)
        else:
            options = batch, args.device, args.seconds
            fresh = measure(name, ways, *options, half=args.autocast)
            print(table(fresh), flush=True)
        store(fresh, args.device)
        if args.device == "cpu":
            draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
