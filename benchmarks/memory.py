"""What training keeps and takes: torch, its checkpoints and its compiler, against torchbp, lean, and lean with budgets.

Method: README.md beside this file. Each model runs in one process, one thread, all ways in turns. Writes
benchmarks/data/memory-<device>-<date>.json; ``--picture`` draws docs/pictures/lean.svg from it.
"""

import argparse
import copy
import datetime
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

sys.path.insert(0, str(Path(__file__).parent))
from models import MODELS, LlamaBlock, ResidualBlock, TransformerBlock, UNet, loss
from run import processor

import torchbp
from torchbp.recompute._live import Live

DATA = Path(__file__).parent / "data"
PICTURE = Path(__file__).parent.parent / "docs" / "pictures" / "lean.svg"
BUDGETS = (0.5, 0.4, 0.3, 0.2, 0.1)
aten = torch.ops.aten

# What a selective checkpoint keeps: the outputs that are dear to make again.
_KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,  # noqa: SLF001
}


def _policy(_context: object, op: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(model: nn.Module, selective: bool) -> nn.Module:
    """Put a checkpoint around each block of ``model``."""
    more: dict[str, Any] = {}
    if selective:
        more["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    blocks = [
        m for m in model.modules() if isinstance(m, (TransformerBlock, LlamaBlock, ResidualBlock))
    ]
    if isinstance(model, UNet):
        blocks += [*model.down, *model.merge]
    for block in blocks:
        run: Any = partial(checkpoint, block.forward, use_reentrant=False, **more)
        block.forward = run
    return model


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch": lambda m: m,
    "torch checkpoint": partial(checkpointed, selective=False),
    "torch selective checkpoint": partial(checkpointed, selective=True),
    "torchbp": torchbp.convert,
    "lean": torchbp.lean,
    **{f"lean {b}": partial(torchbp.lean, budget=b) for b in BUDGETS},
}


class Step:
    """Forward, loss and backward of one model made one way, always on the same data."""

    def __init__(self, name: str, way: str, batch: int) -> None:
        torch.manual_seed(0)
        config = MODELS[name]
        self.model = WAYS[way](config.model())
        self.x, self.y = config.data(batch)

    def forward(self) -> Tensor:
        """Return the loss; dropout draws alike each time."""
        torch.manual_seed(1)
        return loss(self.model(self.x), self.y)

    def __call__(self) -> None:
        self.model.zero_grad(set_to_none=False)
        self.forward().backward()

    def bytes(self) -> tuple[int, int]:
        """Return what is alive between forward and backward, and at most in the whole step."""
        apart = [*self.model.parameters(), *self.model.buffers(), self.x, self.y]
        apart += [p.grad for p in self.model.parameters() if p.grad is not None]
        gc.collect()
        with Live(lambda: "", apart) as live:
            value = self.forward()
            kept = live.now
            value.backward()
        return kept, live.peak

    def gradients(self) -> list[Tensor]:
        """Return what one step gives, from the same buffers each time."""
        self()
        return [p.grad.clone() for p in self.model.parameters() if p.grad is not None]


def compiled_bytes(name: str, batch: int) -> int:
    """Return what torch.compile's partitioner keeps; the time of its default backend is not what is asked here."""
    step = Step(name, "torch", batch)
    step.model.compile(backend="aot_eager_decomp_partition")
    parameters = {p.data_ptr() for p in step.model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.detach()
        return t.detach()

    step()
    with saved_tensors_hooks(pack, lambda t: t):
        step.forward()
    return sum(t.untyped_storage().nbytes() for k, t in kept.items() if k not in parameters)


def measure(name: str, batch: int, seconds: float) -> list[dict[str, Any]]:
    """Return one row a way."""
    steps = {way: Step(name, way, batch) for way in WAYS}
    for step in steps.values():  # budgets are measured in the first
        step()
        step()
    buffers = copy.deepcopy(dict(steps["torch"].model.named_buffers()))
    for step in steps.values():
        for key, buffer in step.model.named_buffers():
            buffer.copy_(buffers[key])
    want = steps["torchbp"].gradients()
    sizes = {way: step.bytes() for way, step in steps.items()}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times["torch"]) < 3:
        for way, step in steps.items():
            before = time.process_time()
            step()
            times[way].append(time.process_time() - before)
    rows = []
    for way, step in steps.items():
        equal = None
        if way.startswith("lean"):
            equal = all(torch.equal(a, b) for a, b in zip(step.gradients(), want, strict=True))
        kept, peak = sizes[way]
        ratios = [a / b for a, b in zip(times[way], times["torch"], strict=True)]
        rows.append(
            {
                "model": name,
                "way": way,
                "batch": batch,
                "kept_bytes": kept,
                "peak_bytes": peak,
                "kept": kept / sizes["torch"][0],
                "peak": peak / sizes["torch"][1],
                "milliseconds": statistics.median(times[way]) * 1e3,
                "time": statistics.median(ratios),
                "repeats": len(ratios),
                "bits_equal": equal,
            }
        )
    del steps
    kept = compiled_bytes(name, batch)
    rows.append(
        {
            "model": name,
            "way": "torch.compile (partitioner)",
            "batch": batch,
            "kept_bytes": kept,
            "kept": kept / rows[0]["kept_bytes"],
        }
    )
    return rows


# ---------------------------------------------------------------------------------- in a process of its own


def resident(name: str, way: str, batch: int) -> int:
    """Return by how many bytes a step raises what is resident at most, in a process of its own."""
    return int(_child("resident", name, way, batch))


def largest_batch(name: str, way: str, limit: int) -> int:
    """Return the largest batch with which steps run in ``limit`` bytes of address space above the bare model's."""

    def fits(batch: int) -> bool:
        return _child("fits", name, way, batch, limit) == "True"

    low, high = 0, 1
    while fits(high):
        low, high = high, high * 2
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _child(*args: object) -> str:
    command = [sys.executable, "-W", "ignore", __file__, "--child", *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return run.stdout.strip() or "False"


def _in_child(what: str, name: str, way: str, batch: str, limit: str = "0") -> object:
    step = Step(name, way, 1)
    step()  # what is made once: threads, kernels, the budget's measurement
    step()
    step.x, step.y = MODELS[name].data(int(batch))
    if what == "resident":
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(limit), used + int(limit)))
    try:
        step()
        step()
    except RuntimeError:  # can't allocate memory
        return False
    return True


# ---------------------------------------------------------------------------------- what is shown


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text."""
    lines = [f"{'':40}{'kept':>8}{'peak':>8}{'time':>8}   of torch's"]
    for r in rows:
        cells = "".join(f"{r[k]:8.2f}" if k in r else " " * 8 for k in ("kept", "peak", "time"))
        equal = r.get("bits_equal")
        note = "" if equal is None else "   bits equal" if equal else "   BITS DIFFER"
        lines.append(f"{r['model']:12}{r['way']:28}{cells}{note}")
    return "\n".join(lines)


def picture(rows: list[dict[str, Any]]) -> str:
    """Return an SVG: for two models, kept bytes against time, each way a point, lean's budgets a curve."""
    width, height, left, top, plot_w, plot_h = 860, 400, 60, 46, 330, 280
    fonts = 'font-family="system-ui, sans-serif" font-size="12" fill="#333"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {fonts}>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    most = max(r["time"] for r in rows if "time" in r and r["model"] in ("GPT", "ResNet-20"))
    high = max(1.4, -(-most // 0.1) * 0.1)
    for i, name in enumerate(("GPT", "ResNet-20")):
        x0 = left + i * (plot_w + 80)

        def px(kept: float, x0: int = x0) -> float:
            return x0 + kept * plot_w / 1.05

        def py(t: float) -> float:
            return top + plot_h - (t - 0.8) / (high - 0.8) * plot_h

        out.append(f'<text x="{x0}" y="{top - 18}" font-size="15" font-weight="600">{name}</text>')
        out.extend(
            f'<line x1="{px(k):.1f}" y1="{top}" x2="{px(k):.1f}" y2="{top + plot_h}" stroke="#eee"/>'
            f'<text x="{px(k):.1f}" y="{top + plot_h + 16}" text-anchor="middle">{k:.1f}</text>'
            for k in (0, 0.2, 0.4, 0.6, 0.8, 1.0)
        )
        t = 0.8
        while t <= high + 1e-9:
            out.append(
                f'<line x1="{x0}" y1="{py(t):.1f}" x2="{x0 + plot_w}" y2="{py(t):.1f}" stroke="#eee"/>'
                f'<text x="{x0 - 6}" y="{py(t) + 4:.1f}" text-anchor="end">{t:.1f}</text>'
            )
            t += 0.1
        mine = [r for r in rows if r["model"] == name and "time" in r]
        curve = [r for r in mine if r["way"].startswith("lean")]
        points = " ".join(f"{px(r['kept']):.1f},{py(r['time']):.1f}" for r in curve)
        out.append(f'<polyline points="{points}" fill="none" stroke="#0b7a75" stroke-width="2.5"/>')
        for r in mine:
            ours = r["way"].startswith("lean")
            color = "#0b7a75" if ours else "#b3541e"
            out.append(
                f'<circle cx="{px(r["kept"]):.1f}" cy="{py(r["time"]):.1f}" r="4.5" fill="{color}"/>'
            )
            label = r["way"].removeprefix("lean ").removeprefix("torch ")
            anchor = "end" if r["kept"] > 0.85 else "start"
            dx = {"torch checkpoint": 14}.get(r["way"], -8 if anchor == "end" else 8)
            dy = {"torch": 34, "torch selective checkpoint": 18}.get(r["way"], -7)
            out.append(
                f'<text x="{px(r["kept"]) + dx:.1f}" y="{py(r["time"]) + dy:.1f}" fill="{color}" '
                f'text-anchor="{anchor}">{label}</text>'
            )
        out.append(
            f'<text x="{x0 + plot_w / 2}" y="{top + plot_h + 38}" text-anchor="middle">'
            "bytes kept for backward, share of torch's</text>"
        )
    out.append(
        f'<text transform="translate(18 {top + plot_h / 2}) rotate(-90)" text-anchor="middle">'
        "step time, share of torch's</text>"
    )
    out.append(
        f'<text x="{left}" y="{height - 10}" fill="#666">Gradients of every lean point equal '
        "the converted model's to the last bit. One CPU thread, float32. Lower left is better.</text>"
    )
    return "\n".join([*out, "</svg>"]) + "\n"


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each model")
    parser.add_argument("--resident", action="store_true", help="peak resident memory as well")
    parser.add_argument("--largest", type=int, metavar="MIB", help="largest batch in so much")
    parser.add_argument("--picture", action="store_true", help="draw it from the committed rows")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.child:
        print(_in_child(*args.child))
        return 0
    files = sorted(DATA.glob("memory-cpu-*.json"))
    rows = json.loads(files[-1].read_text())["rows"] if files else []
    if not args.picture:
        for name in args.models or MODELS:
            batch = max(1, MODELS[name].batch // 2)
            if args.largest:
                fresh = [
                    {
                        "model": name,
                        "way": w,
                        "limit_mib": args.largest,
                        "largest_batch": largest_batch(name, w, args.largest << 20),
                    }
                    for w in ("torch", "lean", "lean 0.1")
                ]
                print(json.dumps(fresh, indent=1))
            elif args.resident:
                fresh = [
                    {"model": name, "way": w, "batch": batch, "resident": resident(name, w, batch)}
                    for w in WAYS
                ]
                print(json.dumps(fresh, indent=1))
            else:
                fresh = measure(name, batch, args.seconds)
                print(table(fresh), flush=True)
            keys = [(r["model"], sorted(r)) for r in fresh]
            kinds = {(m, "kept" in k, "resident" in k) for m, k in keys}
            rows = [
                r for r in rows if (r["model"], "kept" in r, "resident" in r) not in kinds
            ] + fresh
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        about = {
            "date": date,
            "device": processor(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        text = ",\n".join(json.dumps(r) for r in rows)
        path = DATA / f"memory-cpu-{date}.json"
        path.write_text(f'{{"about": {json.dumps(about)},\n"rows": [\n{text}\n]}}\n')
        print(f"wrote {path}")
    PICTURE.write_text(picture([r for r in rows if "kept" in r]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
