"""`make mutation`: how many wrong functions gradcheck catches, and on how many right ones it gives a false alarm.

Five parts, each with its sums: the wrong functions with right twins that the tests hold, those that were written
before any check saw them, every op of torchbp, functions of torch, and the catalogue of torch's own test suite. What
alarms on a right function must stand in `alarms.KNOWN`, which holds a reproduction of each in plain torch, or in
`catalogue.DEFECTS`. Each function is examined on one thread of one of several processes; how far it is, is told every
half minute.

    make mutation ARGS="--parts twins unseen --verbose"
"""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from multiprocessing import get_context

import torch

import torchbp
from tests.verify import catalogue as torchs
from tests.verify import known
from tests.verify.alarms import KNOWN
from tests.verify.functions import FUNCTIONS
from tests.verify.unseen import SETS, every
from torchbp.ops._op import all_ops
from torchbp.ops._samples import Make
from torchbp.verify._check import NothingChecked


@dataclass(frozen=True)
class Task:
    """One name to examine, in a group that is summed up by itself."""

    part: str
    group: str
    name: str


@dataclass(frozen=True)
class Outcome:
    """What became of one name.

    Attributes:
        told: A line for every report: its name, the check that found something, the time it took.
        caught: Whether the wrong function was found, None where there is none.
        by_torch: Whether torch.autograd.gradcheck found it too.
        missed: Why it is known to be missed.
        alarm: The report that found something on a right function.
    """

    told: list[str]
    caught: bool | None = None
    by_torch: bool = False
    missed: str = ""
    alarm: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--verbose", action="store_true", help="a line for every report")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (all cores)")
    args = parser.parse_args()
    _start()
    tasks = [Task(part, *named) for part in args.parts for named in PARTS[part].names()]
    found = []
    spawn = get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=spawn, initializer=_start) as pool:
        for task, outcome in _told(zip(tasks, pool.map(examine, tasks), strict=True), len(tasks)):
            found.append((task, outcome))
            for line in (*(outcome.told if args.verbose else ()), *_unexpected(task, outcome)):
                print(line, flush=True)
    for (part, group), members in groupby(found, key=lambda f: (f[0].part, f[0].group)):
        print(PARTS[part].sum(group, list(members)))
    alarms = [task for task, outcome in found if outcome.alarm]
    for name in sorted({known for task in alarms if (known := _known(task))}):
        print(f"alarm in the list: {name}: {KNOWN[name].why}")
    lost = torchs.DEFECTS.keys() - {task.name.split()[0] for task in alarms}
    lost = sorted(lost) if "catalogue" in args.parts else []
    for name in lost:
        print(f"NOT FOUND any more: {name}: {torchs.DEFECTS[name]}")
    return int(bool(lost) or any(_unexpected(task, outcome) for task, outcome in found))


def examine(task: Task) -> Outcome:
    return PARTS[task.part].examine(task.name)


def _start() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    every()


def _told(outcomes: Iterable, count: int, *, seconds: float = 30) -> Iterator:
    """Pass the outcomes on, and say now and then how many there are."""
    begun = last = time.monotonic()
    for done, outcome in enumerate(outcomes, 1):
        yield outcome
        now = time.monotonic()
        if now - last > seconds:
            last, left = now, (now - begun) / done * (count - done)
            print(
                f"{done} of {count}, {now - begun:.0f} s, some {left:.0f} s left", file=sys.stderr
            )


def _unexpected(task: Task, outcome: Outcome) -> list[str]:
    """Return what is to be said of an outcome that is neither right nor known."""
    lines = []
    if outcome.caught is False and not outcome.missed:
        lines.append(f"MISSED {task.name}")
    if outcome.alarm and not _known(task) and not _defect(task):
        lines.append(f"ALARM on {task.name}\n{outcome.alarm}\n")
    return lines


def _known(task: Task) -> str | None:
    names = (k for k in KNOWN if task.name == k or task.name.startswith(f"{k} "))
    return next(names, None)


def _defect(task: Task) -> str | None:
    return torchs.DEFECTS.get(task.name.split()[0]) if task.part == "catalogue" else None


class Report:
    """gradcheck's report of one function, and what is told of it."""

    def __init__(self, name, function, inputs, **options):
        begun = time.perf_counter()
        self.report = torchbp.gradcheck(function, inputs, raise_exception=False, **options)
        check = self.report.wrong[0].check if self.report.wrong else "-"
        self.line = f"{name:44} {check:22} {time.perf_counter() - begun:.2f} s"

    @property
    def alarm(self):
        return "" if self.report else str(self.report)


def right(name, function, inputs, **options) -> Outcome:
    """Examine a right function."""
    report = Report(name, function, inputs, **options)
    return Outcome([report.line], alarm=report.alarm)


def pair(name, p, *, missed="", **options) -> Outcome:
    """Examine a wrong function and its right twin."""
    wrong = Report(name, p.wrong, p.make(), **options)
    twin = Report(f"{name} (twin)", p.right, p.make(), **options)
    lines = [wrong.line, twin.line]
    return Outcome(lines, not wrong.report, _by_torch(p, options), missed, twin.alarm)


def _by_torch(p, options) -> bool:
    """Whether torch's own set of checks finds something, or cannot go on: an input that was written over."""
    named = {"kwargs": options["kwargs"]} if "kwargs" in options else {}
    try:
        return not torchbp.gradcheck(
            p.wrong, p.make(), checks="torch", raise_exception=False, **named
        )
    except NothingChecked:
        return True


class Twins:
    """The wrong functions of the tests."""

    @staticmethod
    def names():
        return [("wrong functions of the tests", name) for name in known.every()]

    @staticmethod
    def examine(name):
        p = known.every()[name]
        return pair(name, p, **({"reference": p.reference} if p.needs_reference else {}))

    @staticmethod
    def sum(group, found):
        outcomes = [outcome for _, outcome in found]
        n, caught = len(outcomes), sum(o.caught for o in outcomes)
        return (
            f"{group}: caught {caught} of {n} ({caught / n:.1%}), "
            f"torch.autograd.gradcheck {sum(o.by_torch for o in outcomes)}; "
            f"alarms on {sum(bool(o.alarm) for o in outcomes)} of {n} right twins"
        )


class Unseen:
    """The wrong functions that were written before any check saw them, set by set."""

    @staticmethod
    def names():
        return [(title, name) for title, pairs in SETS.items() for name in pairs]

    @staticmethod
    def examine(name):
        p = every()[name]
        return pair(name, p, kwargs=p.kwargs(), missed=p.missed)

    sum = Twins.sum


class Ops:
    """Every op of torchbp, with its first and its last sample."""

    @staticmethod
    def names():
        return [("ops of torchbp", name) for name in Ops.samples()]

    @staticmethod
    @cache
    def samples():
        found = {}
        for op in all_ops().values():
            samples = list(op.samples(Make()))
            for index in sorted({0, len(samples) - 1}):
                if any(t.requires_grad for t in samples[index].tensors()):
                    found[f"torchbp {op.name} {samples[index].name or index}"] = op, samples[index]
        return found

    @staticmethod
    def examine(name):
        op, sample = Ops.samples()[name]
        skip = ["differences"] if op.estimator else []
        return right(name, op.function, sample.args, kwargs=sample.kwargs, skip=skip)

    @staticmethod
    def sum(group, found):
        alarms = sum(bool(outcome.alarm) for _, outcome in found)
        return f"{group}: alarms on {alarms} of {len(found)} samples of {len(all_ops())} ops"


class Functions:
    """Functions of torch and torch.nn.functional."""

    @staticmethod
    def names():
        return [("functions of torch, without compile", name) for name in FUNCTIONS]

    @staticmethod
    def examine(name):
        function, make = FUNCTIONS[name]
        return right(name, function, make(), skip=["compile"])

    @staticmethod
    def sum(group, found):
        return f"{group}: alarms on {sum(bool(o.alarm) for _, o in found)} of {len(found)}"


class Catalogue:
    """Functions of torch's own test suite; what is found on them is in a list of its own, by name."""

    @staticmethod
    def names():
        return [("functions of torch's test suite", name) for name in Catalogue.functions()]

    @staticmethod
    @cache
    def functions():
        return {name: (function, inputs) for name, function, inputs in torchs.functions()}

    @staticmethod
    def examine(name):
        function, inputs = Catalogue.functions()[name]
        return right(name, function, inputs, skip=["compile"])

    @staticmethod
    def sum(group, found):
        names = {task.name.split()[0] for task, outcome in found if outcome.alarm}
        lines = [
            f"{name}: {torchs.DEFECTS[name]}" for name in sorted(names & torchs.DEFECTS.keys())
        ]
        return "\n  ".join([f"{group}: findings on {len(names)} of {len(found)}", *lines])


PARTS = {
    "twins": Twins,
    "unseen": Unseen,
    "ops": Ops,
    "functions": Functions,
    "catalogue": Catalogue,
}


if __name__ == "__main__":
    sys.exit(main())
