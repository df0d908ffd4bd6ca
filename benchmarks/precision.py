"""Measures how far every op's gradient is from the true one, beside torch's, in units in the last place (ulps).

Method: README.md beside this file. Writes benchmarks/data/precision-cpu-<date>.json and prints the table; docs/ops.md
takes its columns of errors from the newest of these files. With the library of compiled formulas open it is
precision-kernels-cpu-<date>.json.
"""

import argparse
import itertools
import json
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))

from run import DATA, about, stored_rows

from torchbp.ops._op import Op, all_ops
from torchbp.ops._precision import EACH, measure
from torchbp.ops.kernels import at_hand

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def row(op: Op, dtype: str, values: int, each: int) -> dict[str, Any]:
    """Return one row: means and 99.9th percentiles in ulps, and the number of values they were taken of."""
    ours, theirs = measure(op, DTYPES[dtype], values, each=each)
    found: dict[str, Any] = {"op": op.name, "dtype": dtype, "values": ours.values}
    for name, errors in (("torchbp", ours), ("torch", theirs)):
        found[f"{name}_mean"] = None if errors is None else round(errors.mean, 4)
        found[f"{name}_tail"] = None if errors is None else round(errors.tail, 4)
        found[f"{name}_broken"] = None if errors is None else errors.broken
    return found


def misses(r: dict[str, Any]) -> list[str]:
    """Return what of the goal a row does not reach; two per cent are the noise of a percentile."""
    if r["torch_mean"] is None:
        return []
    found = []
    if r["torchbp_mean"] > 1.05 * r["torch_mean"] + 0.001:
        found.append("mean")
    if r["torchbp_tail"] > 1.02 * max(r["torch_tail"], 1):
        found.append("tail")
    if r["torchbp_broken"] > r["torch_broken"]:
        found.append("broken")
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text, one an op and dtype, and how many reach the goal."""
    head = ("op", "dtype", "values", "mean", "torch's", "99.9 %", "torch's", "misses")
    lines = ["{:34}{:9}{:>9}{:>11}{:>11}{:>11}{:>11}  {}".format(*head)]
    for r in rows:
        numbers = [r[k] for k in ("torchbp_mean", "torch_mean", "torchbp_tail", "torch_tail")]
        cells = "".join(f"{'–' if n is None else f'{n:.4g}':>11}" for n in numbers)
        lines.append(f"{r['op']:34}{r['dtype']:9}{r['values']:9}{cells}  {', '.join(misses(r))}")
    held = [r for r in rows if r["torch_mean"] is not None]
    reached = sum(not misses(r) for r in held)
    lines.append(f"{reached} of {len(held)} rows with something to compare reach the goal")
    return "\n".join(lines)


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help="these only")
    parser.add_argument("--values", type=int, default=1_300_000, metavar="N", help="%(default)s")
    parser.add_argument(
        "--each", type=int, default=EACH, metavar="N", help="elements of a sample (%(default)s)"
    )
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument(
        "--resume", action="store_true", help="leave out what today's file has; it is then added to"
    )
    parser.add_argument(
        "--at-most", type=float, default=math.inf, metavar="SECONDS", help="then --resume goes on"
    )
    args = parser.parse_args()
    unknown = sorted(set(args.ops) - set(all_ops()))
    if unknown:
        parser.error(f"expected names of ops, got {', '.join(unknown)}; `torchbp ops` lists them")
    warnings.simplefilter("ignore")  # torch's own, of its losses' shapes
    facts = about()
    path = DATA / f"precision{'-kernels' * at_hand()}-cpu-{facts['date']}.json"
    rows = stored_rows(path) if args.resume else []
    known = {(r["op"], r["dtype"]) for r in rows}
    start = time.monotonic()
    for name, dtype in itertools.product(args.ops or all_ops(), args.dtypes):
        if (name, dtype) in known:
            continue
        if time.monotonic() - start > args.at_most:
            print("\r\033[Krows are left: go on with --resume", file=sys.stderr)
            break
        try:
            rows.append(row(all_ops()[name], dtype, args.values, args.each))
        except LookupError as reason:
            print(f"\r{reason}\033[K", file=sys.stderr)
        print(f"\r{name} {dtype}\033[K", end="", file=sys.stderr)
    print("\r\033[K", end="", file=sys.stderr)
    print(table(rows))
    if args.no_write:
        return 0
    DATA.mkdir(exist_ok=True)
    text = ",\n".join(json.dumps(r) for r in rows)
    path.write_text(f'{{"about": {json.dumps(facts)},\n"rows": [\n{text}\n]}}\n')
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
