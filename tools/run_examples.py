"""Run every example in full, two at a time, and write what came out into docs/examples.md.

``python tools/run_examples.py [NAME ...]``; without names all of them, and the table is written anew.
"""

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "examples.md"
BEGIN, END = "<!-- written by make examples -->\n", "<!-- until here -->\n"


@dataclass(frozen=True)
class Outcome:
    """How one example ended.

    Attributes:
        name: Its path below examples/, without ``.py``.
        status: Its exit status: 0 where all that it promises holds.
        seconds: Wall time.
        told: Its ``results.json``; empty where it wrote none.
        output: All that it printed.
    """

    name: str
    status: int
    seconds: float
    told: dict
    output: str


def run(name: str, logs: Path) -> Outcome:
    """Run an example on one core."""
    folder = logs / name
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--log-dir", str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    begin = time.perf_counter()
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=env,
        cwd=ROOT,
    )
    seconds = time.perf_counter() - begin
    results = folder / "results.json"
    told = json.loads(results.read_text()) if results.exists() else {}
    return Outcome(name, done.returncode, seconds, told, done.stdout)


def row(outcome: Outcome) -> str:
    """Return the example's row of the table."""
    source = (ROOT / "examples" / f"{outcome.name}.py").read_text(encoding="utf-8")
    about = (ast.get_docstring(ast.parse(source)) or "").splitlines()[0].rstrip(".")
    results = "<br>".join(f"{k}: **{v:.4g}**" for k, v in outcome.told.get("results", {}).items())
    promised = "<br>".join(
        ("✓ " if v else "✗ ") + k for k, v in outcome.told.get("promised", {}).items()
    )
    link = f"[{outcome.name}](../examples/{outcome.name}.py)"
    return f"| {link} | {about} | {results} | {promised} | {outcome.seconds:.0f} s |"


def write(outcomes: list[Outcome], logs: Path) -> None:
    """Write the table and the pictures into the page, between its marks."""
    rows = ["| Example | What | Measured | Stated and checked | Time |", "|-|-|-|-|-|"]
    rows += [row(outcome) for outcome in outcomes]
    pictures = []
    for outcome in outcomes:
        for picture in sorted((logs / outcome.name).glob("*.png")):
            kept = PAGE.parent / "pictures" / f"example-{picture.name}"
            shutil.copyfile(picture, kept)
            pictures.append(
                f"\n{outcome.name}:\n\n![{picture.stem.replace('_', ' ')}](pictures/{kept.name})"
            )
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(
        before + BEGIN + "\n".join(["", *rows, *pictures, ""]) + END + after, encoding="utf-8"
    )


def main() -> int:
    """Run, tell each as it ends, write the page; 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="run these alone, and leave the page as it is")
    parser.add_argument("--log-dir", type=Path, default=ROOT / "runs" / "examples")
    args = parser.parse_args()
    folder = ROOT / "examples"
    programs = [*folder.glob("[a-z]*.py"), *folder.glob("frameworks/*.py")]
    names = args.names or sorted(str(p.relative_to(folder).with_suffix("")) for p in programs)
    begin = time.perf_counter()
    outcomes = {}
    with ThreadPoolExecutor(max_workers=2) as pool:
        for future in as_completed([pool.submit(run, name, args.log_dir) for name in names]):
            outcome = future.result()
            outcomes[outcome.name] = outcome
            state = "done" if outcome.status == 0 else f"FAILED with status {outcome.status}"
            print(
                f"{len(outcomes):2}/{len(names)}  {outcome.name:28} {outcome.seconds:5.0f} s  {state}",
                flush=True,
            )
            if outcome.status:
                print(outcome.output)
    print(f"all in {time.perf_counter() - begin:.0f} s; tensorboard --logdir {args.log_dir}")
    if not args.names:
        write([outcomes[name] for name in names], args.log_dir)
    return int(any(outcome.status for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
