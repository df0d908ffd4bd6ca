"""`make mutation`: how many wrong functions gradcheck catches, and on how many right ones it gives a false alarm.

Five parts, each with its sum: the wrong functions with right twins that the tests hold, those that were written
before any check saw them, every op of torchbp, functions of torch, and the catalogue of torch's own test suite. What
alarms on a right function must stand in `alarms.KNOWN`, which holds a reproduction of each in plain torch, or in
`catalogue.DEFECTS`.

    make mutation ARGS="--parts twins unseen --verbose"
"""

import argparse
import sys
import time

import torch

import torchbp
from tests.verify import catalogue as torchs
from tests.verify import known
from tests.verify.alarms import KNOWN
from tests.verify.functions import FUNCTIONS
from tests.verify.unseen import SETS, every
from torchbp.ops._op import all_ops
from torchbp.ops._samples import Make


class Score:
    """Counts, and says what was unexpected."""

    def __init__(self, verbose):
        self.verbose, self.unexpected, self.known = verbose, 0, set()

    def check(self, name, function, inputs, **options):
        begun = time.perf_counter()
        report = torchbp.gradcheck(function, inputs, raise_exception=False, **options)
        if self.verbose:
            outcome = report.wrong[0].check if report.wrong else "-"
            print(f"{name:44} {outcome:22} {time.perf_counter() - begun:.2f} s", flush=True)
        return report

    def pair(self, name, wrong, right, make, *, missed="", **options):
        """Return (caught, alarm, caught by torch) for one wrong function and its right twin."""
        report = self.check(name, wrong, make(), **options)
        if report:
            self.unexpected += not missed
            print(f"MISSED {name}: {missed or 'not expected'}", flush=True)
        twin = self.right(f"{name} (twin)", right, make(), **options)
        named = {"kwargs": options["kwargs"]} if "kwargs" in options else {}
        given = torchbp.gradcheck(wrong, make(), checks="torch", raise_exception=False, **named)
        return not report, twin, not given

    def right(self, name, function, inputs, **options):
        """Return whether a right function gives an alarm."""
        report = self.check(name, function, inputs, **options)
        if report:
            return False
        named = [known for known in KNOWN if name == known or name.startswith(f"{known} ")]
        if named:
            self.known.update(named)
        else:
            self.unexpected += 1
            print(f"ALARM on {name}\n{report}\n", flush=True)
        return True


def twins(score):
    rows = []
    for name, pair in known.every().items():
        options = {"reference": pair.reference} if pair.needs_reference else {}
        rows.append(score.pair(name, pair.wrong, pair.right, pair.make, **options))
    return _sum("wrong functions of the tests", rows)


def unseen(score):
    lines = []
    for title, pairs in SETS.items():
        rows = []
        for name, p in pairs.items():
            rows.append(
                score.pair(name, p.wrong, p.right, p.make, kwargs=p.kwargs(), missed=p.missed)
            )
        lines.append(_sum(title, rows))
    return "\n".join(lines)


def _sum(title, rows):
    caught, alarms, torchs = (sum(column) for column in zip(*rows, strict=True))
    n = len(rows)
    return (
        f"{title}: caught {caught} of {n} ({caught / n:.1%}), torch.autograd.gradcheck {torchs}; "
        f"alarms on {alarms} of {n} right twins"
    )


def ops(score):
    alarms = count = 0
    for op in all_ops().values():
        samples = list(op.samples(Make()))
        for index in sorted({0, len(samples) - 1}):
            sample = samples[index]
            name = f"torchbp {op.name} {sample.name or index}"
            if not any(t.requires_grad for t in sample.tensors()):
                continue
            skip = ["differences"] if op.estimator else []
            alarms += score.right(name, op.function, sample.args, kwargs=sample.kwargs, skip=skip)
            count += 1
    return f"ops of torchbp: alarms on {alarms} of {count} samples of {len(all_ops())} ops"


def functions(score):
    alarms = 0
    for name, (function, make) in FUNCTIONS.items():
        alarms += score.right(name, function, make(), skip=["compile"])
    return f"functions of torch, without compile: alarms on {alarms} of {len(FUNCTIONS)}"


def catalogue(score):
    """Functions of torch's own test suite; what is found on them is in a list of its own, by name."""
    found, count = set(), 0
    for name, function, inputs in torchs.functions():
        count += 1
        if score.check(name, function, inputs, skip=["compile"]):
            continue
        found.add(name.split()[0])
        if name.split()[0] not in torchs.DEFECTS:
            score.unexpected += 1
            print(f"ALARM on {name}", flush=True)
    lines = [f"{name}: {torchs.DEFECTS[name]}" for name in sorted(found & torchs.DEFECTS.keys())]
    return "\n  ".join(
        [f"functions of torch's test suite: findings on {len(found)} of {count}", *lines]
    )


PARTS = {
    "twins": twins,
    "unseen": unseen,
    "ops": ops,
    "functions": functions,
    "catalogue": catalogue,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--verbose", action="store_true", help="a line for every function")
    args = parser.parse_args()
    every()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    score = Score(args.verbose)
    lines = [PARTS[part](score) for part in args.parts]
    print("\n".join(lines))
    for name in sorted(score.known):
        print(f"alarm in the list: {name}: {KNOWN[name].why}")
    return int(score.unexpected > 0)


if __name__ == "__main__":
    sys.exit(main())
