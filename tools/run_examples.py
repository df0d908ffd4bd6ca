"""Run every example in full, two at a time, and write what came out into docs/examples.md.

``python tools/run_examples.py [NAME ...]``; of those not named the page keeps what their last run here gave.
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
from dataclasses import asdict, dataclass
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
    """

    name: str
    status: int
    seconds: float

    def told(self, logs: Path) -> dict:
        """Return what it measured and stated; empty where it did not come so far."""
        results = logs / self.name / "results.json"
        return json.loads(results.read_text()) if results.exists() else {}


def run(name: str, logs: Path) -> Outcome:
    """Run an example on one core; its output and outcome are kept beside its logs."""
    folder = logs / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--log-dir", str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    begin = time.perf_counter()
    with (folder / "output.txt").open("w") as output:
        status = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, check=False, env=env, cwd=ROOT
        ).returncode
    outcome = Outcome(name, status, time.perf_counter() - begin)
    (folder / "outcome.json").write_text(json.dumps(asdict(outcome)))
    return outcome


def row(outcome: Outcome, logs: Path) -> str:
    """Return the example's row of the table."""
    source = (ROOT / "examples" / f"{outcome.name}.py").read_text(encoding="utf-8")
    about = (ast.get_docstring(ast.parse(source)) or "").splitlines()[0].rstrip(".")
    told = outcome.told(logs)
    results = "<br>".join(f"{k}: **{v:.4g}**" for k, v in told.get("results", {}).items())
    promised = "<br>".join(("✓ " if v else "✗ ") + k for k, v in told.get("promised", {}).items())
    link = f"[{outcome.name}](../examples/{outcome.name}.py)"
    return f"| {link} | {about} | {results} | {promised} | {outcome.seconds:.0f} s |"


def write(outcomes: list[Outcome], logs: Path) -> None:
    """Write the table and the pictures into the page, between its marks."""
    rows = ["| Example | What | Measured | Stated and checked | Time |", "|-|-|-|-|-|"]
    rows += [row(outcome, logs) for outcome in outcomes]
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
    parser.add_argument("names", nargs="*", help="run these alone")
    parser.add_argument("--log-dir", type=Path, default=ROOT / "runs" / "examples")
    args = parser.parse_args()
    folder = ROOT / "examples"
    programs = [*folder.glob("[a-z]*.py"), *folder.glob("frameworks/*.py")]
    every = sorted(str(p.relative_to(folder).with_suffix("")) for p in programs)
    names = args.names or every
    begin = time.perf_counter()
    failed = 0
    with ThreadPoolExecutor(max_workers=2) as pool:
        futures = [pool.submit(run, name, args.log_dir) for name in names]
        for number, future in enumerate(as_completed(futures), 1):
            outcome = future.result()
            failed += outcome.status != 0
            state = "done" if outcome.status == 0 else f"FAILED with status {outcome.status}"
            print(
                f"{number:2}/{len(names)}  {outcome.name:28} {outcome.seconds:5.0f} s  {state}",
                flush=True,
            )
            if outcome.status:
                print((args.log_dir / outcome.name / "output.txt").read_text())
    print(f"all in {time.perf_counter() - begin:.0f} s; tensorboard --logdir {args.log_dir}")
    kept = [args.log_dir / name / "outcome.json" for name in every]
    if all(path.exists() for path in kept):
        write([Outcome(**json.loads(path.read_text())) for path in kept], args.log_dir)
    else:
        print(f"{PAGE.relative_to(ROOT)} stays as it is: some examples have not been run here")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
