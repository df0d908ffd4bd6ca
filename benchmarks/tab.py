"""What it takes to look at a large run: 2000 layers, 10,000 steps, all quantities, in the Grad flow tab.

    .venv/bin/python benchmarks/tab.py [--layers 2000] [--steps 10000]

Needs Chromium and Linux. The tab's page is opened by itself, as TensorBoard does it in a frame. Measured are the
seconds from asking for it until it says that all is drawn, and of that time the processor's seconds of
TensorBoard (server and data server) and of the browser, which other programs on the machine disturb less; and
by how much TensorBoard has grown by then. The first time the files are indexed; they are in the page
cache, as they are while a run is written.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from run import processor  # noqa: E402

from tests.tensorboard.page import Tab, chromium, tensorboard  # noqa: E402
from torchbp.monitor._registry import all_quantities  # noqa: E402
from torchbp.tensorboard import EventWriter, Layout  # noqa: E402

_EVERY_STEP = {"gradient_norm"}
_REPEATS = 4


def write(folder: Path, layers: int, steps: int) -> int:
    """Write a run with every quantity the monitor has; return its bytes."""
    rng = np.random.default_rng(0)
    names = tuple(
        f"blocks.{i // 4}.{('attn.qkv', 'attn.out', 'mlp.up', 'mlp.down')[i % 4]}"
        for i in range(layers)
    )
    entries = {
        "layer": names,
        "parameter": tuple(f"{name}.{kind}" for name in names for kind in ("weight", "bias")),
        "group": ("group 0",),
        "estimate": ("value", "low", "high"),
    }
    vectors, scalars = [], []
    for q in all_quantities().values():
        if q.axis == "run":
            scalars.append(f"run/{q.name}")
            continue
        kinds = ("Linear",) * layers if q.axis == "layer" else ()
        vectors.append(Layout(q.name, q.axis, entries[q.axis], kinds, q.unit, q.title, q.logarithm))
    with EventWriter(folder) as writer:
        for step in range(steps):
            sampled = step % 10 == 0 or step < 5
            for layout in vectors:
                if sampled or layout.quantity in _EVERY_STEP:
                    depth = np.linspace(-12, 0, len(layout.names))
                    values = 10 ** (depth + rng.standard_normal(len(layout.names), np.float32))
                    writer.vector(layout, step, values if layout.logarithm else values % 1)
            for tag in scalars if sampled else ():
                writer.scalar(tag, step, rng.random())
            writer.scalar("loss/train", step, 2 / (1 + step / 1000) + rng.random() / 10)
        writer.record("verdicts", steps, [])
    return writer.path.stat().st_size


def usage(name: bytes) -> tuple[float, float]:
    """Return resident bytes and processor seconds of the processes called so that this one has started."""
    tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    parents, found = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            command = (entry / "cmdline").read_bytes().split(b"\0")[:3]
        except OSError:  # it has ended
            continue
        parents[int(entry.name)] = int(fields[1])
        if any(name in word for word in command):
            seconds = (int(fields[11]) + int(fields[12])) / tick
            found[int(entry.name)] = int(fields[21]) * page, seconds
    held = spent = 0.0
    for pid, (resident, seconds) in found.items():
        above = pid
        while above in parents and above != os.getpid():
            above = parents[above]
        if above == os.getpid():
            held, spent = held + resident, spent + seconds
    return held, spent


def measure(logdir: Path) -> dict[str, float]:
    """Open the tab in a fresh TensorBoard, several times in the same one."""
    times = []
    with tensorboard(logdir) as address, chromium() as browser:
        browser.new_page().goto("about:blank")
        time.sleep(5)  # TensorBoard's own loading
        held, _ = usage(b"tensorboard")
        for _ in range(_REPEATS):
            page = browser.new_page(viewport={"width": 1440, "height": 1200})
            tab = Tab(page, address)
            begin = time.perf_counter(), usage(b"tensorboard")[1], usage(b"chrom")[1]
            page.goto(f"{address}data/plugin_entry.html?name=torchbp")
            tab.frame = page.main_frame
            tab.ready()
            end = time.perf_counter(), usage(b"tensorboard")[1], usage(b"chrom")[1]
            times.append([round(b - a, 2) for a, b in zip(begin, end, strict=True)])
            page.close()
        grown = usage(b"tensorboard")[0] - held
    names = ("open_s", "server_cpu_s", "browser_cpu_s")
    later = [statistics.median(column) for column in zip(*times[1:], strict=True)]
    return {
        **{f"first_{name}": value for name, value in zip(names, times[0], strict=True)},
        **{f"later_{name}": value for name, value in zip(names, later, strict=True)},
        "server_before_mb": round(held / 1e6, 1),
        "server_growth_mb": round(grown / 1e6, 1),
    }


def report(run_dir: Path, out: Path) -> dict[str, float]:
    """Write a report of a run."""
    begin = time.perf_counter()
    command = [Path(sys.executable).with_name("torchbp"), "report", run_dir, "-o", out]
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
    return {"report_s": round(time.perf_counter() - begin, 3), "report_bytes": out.stat().st_size}


def main() -> None:
    """Measure, print, and write a row a size."""
    parser = argparse.ArgumentParser(description="What it takes to look at a large run.")
    parser.add_argument("--layers", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "data")
    args = parser.parse_args()
    rows = []
    for layers, steps in ((100, 1000), (args.layers, args.steps)):
        with tempfile.TemporaryDirectory() as folder:
            size = write(Path(folder) / "runs" / "large", layers, steps)
            row = {"layers": layers, "steps": steps, "file_mb": round(size / 1e6, 1)}
            row["load_average"] = round(os.getloadavg()[0], 1)
            row |= measure(Path(folder) / "runs")
            row |= report(Path(folder) / "runs" / "large", Path(folder) / "report.html")
        print(json.dumps(row))
        rows.append(row)
    date = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    about = {
        "date": date,
        "device": processor(),
        "cores": os.cpu_count(),
        "tensorboard": version("tensorboard"),
        "python": platform.python_version(),
    }
    lines = ",\n".join(json.dumps(row) for row in rows)
    path = args.out / f"tab-cpu-{date}.json"
    path.write_text(f'{{"about": {json.dumps(about)},\n"rows": [\n{lines}\n]}}\n')
    print(path)


if __name__ == "__main__":
    main()
