"""Runs gradcheck on an op with one change in it, in a process of its own: the installed op is never touched."""

import importlib
import importlib.util
import inspect
import multiprocessing
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

import torchbp
from tests.verify.mutants import sweep
from tests.verify.mutants.changes import changed
from tests.verify.mutants.sources import file_of, importers
from torchbp.ops._op import all_ops
from torchbp.ops._samples import Make

__all__ = ["Outcome", "home", "in_a_process", "judged", "outcome_of", "warm"]

SECONDS = 150  # a report takes 0.3 to 0.5 s, the sweep up to 20


@dataclass(frozen=True)
class Outcome:
    """What became of a change.

    Attributes:
        kind: "caught"; "loud", an ordinary first call or backward raises; "missed"; "refuses",
            it differs by exceptions only; "equal", for all that the sweep sees; "late", "ended the process".
        detail: The check that caught it, or where it differs from the right op.
        notes: What gradcheck noted, of a change that it did not catch.
    """

    kind: str
    detail: str = ""
    notes: tuple[str, ...] = ()


def home(op):
    """Return the module and the name that an op's function has there."""
    function = inspect.unwrap(op.function)
    return function.__globals__["__name__"], function.__name__


def warm():
    """Run gradcheck once, so that no child has to import what it imports."""
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    torchbp.gradcheck(torch.exp, (x,), skip=("compile",))


def outcome_of(name, change, *, seconds=SECONDS):
    """Return what gradcheck, and then the sweep, say of op ``name`` with ``change`` made."""
    return in_a_process(_outcome, name, change, seconds=seconds)


def in_a_process(outcome, *args, seconds=SECONDS):
    """Return what ``outcome`` does, called with ``args`` and a folder to write in."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=_run, args=(theirs, outcome, args), daemon=True
    )
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            return Outcome("late")
        return ours.recv()
    except EOFError:
        return Outcome("ended the process")
    finally:
        process.kill()
        process.join()


def _run(pipe, outcome, args):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = outcome(*args, Path(folder))
        except Exception as error:
            found = Outcome("failed", f"{type(error).__name__}: {error}")
        pipe.send(found)
        pipe.close()


def _outcome(name, change, folder):
    right = all_ops()[name]
    try:
        wrong = _with(right, change, folder)
    except Exception as error:
        return Outcome("loud", f"{type(error).__name__}: {error}"[:120])
    samples = right.samples(Make())
    return judged(
        right, wrong, next(s for s in samples if any(t.requires_grad for t in s.tensors()))
    )


def judged(right, wrong, sample):
    """Return what gradcheck says of ``wrong`` on a sample; of what it passes, where it differs from ``right``."""
    try:
        _ordinary(wrong.function, sample)
    except Exception as error:
        return Outcome("loud", f"{type(error).__name__}: {error}"[:120])
    torch.manual_seed(0)
    begun = time.perf_counter()
    report = torchbp.gradcheck(
        wrong.function, sample.args, kwargs=sample.kwargs, skip=("compile",), raise_exception=False
    )
    seconds = time.perf_counter() - begun
    if not report:
        return Outcome(
            "caught", f"{report.wrong[0].check}, {report.forwards} calls, {seconds:.2f} s"
        )
    notes = tuple(f"{f.check}: {f.message}"[:140] for f in report.findings)
    difference, raises = sweep.difference(right, wrong)
    kind = "missed" if difference else "refuses" if raises else "equal"
    return Outcome(kind, difference or raises, notes)


def _ordinary(function, sample):
    """Call it and go backward once, as anybody would."""
    torch.manual_seed(0)
    outputs = function(*sample.args, **sample.kwargs)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    sum(y.real.sum() for y in outputs if y.requires_grad).backward()
    for t in sample.tensors():
        t.grad = None


def _with(op, change, folder):
    """Return the record of ``op``, its modules loaded again with the change made."""
    file = file_of(change.module)
    path = folder / file.path.name
    path.write_text(changed(file.text, change))
    for module in importers(change.module):
        sys.modules.pop(module, None)
    sys.meta_path.insert(0, _Finder(change.module, path))
    module = importlib.import_module(home(op)[0])
    found = getattr(module, "OPS", None) or (module.OP,)
    return next(o for o in found if o.name == op.name)


@dataclass
class _Finder:
    module: str
    path: Path

    def find_spec(self, name, path=None, target=None):
        if name == self.module:
            return importlib.util.spec_from_file_location(name, self.path)
        return None
