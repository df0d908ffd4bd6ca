"""The same changes to the right twins of the unseen sets: to hundreds of backward passes, of many fields."""

import ast
import importlib.util
import inspect
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.verify import unseen
from tests.verify.mutants.changes import changed, changes
from tests.verify.mutants.running import in_a_process, judged
from tests.verify.mutants.sources import File
from torchbp.ops._samples import Sample

__all__ = ["Twin", "changes_of", "outcome_of", "sampled"]

_METHODS = ("backward", "jvp", "vmap", "setup_context")


@dataclass(frozen=True)
class Twin:
    """A right twin as the sweep takes an op: its function, and its one sample in any dtype."""

    function: Any
    pair: unseen.Unseen

    def samples(self, make) -> Iterator[Sample]:
        def converted(t):
            return t.detach().to(make.dtype).requires_grad_(t.requires_grad)

        args, kwargs = self.pair.make(), self.pair.kwargs()
        sample = Sample(args if isinstance(args, tuple) else (args,), dict(kwargs))
        yield sample.over_tensors(lambda t: converted(t) if t.is_floating_point() else t)

    def benchmark(self, make, _) -> Sample:
        return next(self.samples(make))


@cache
def _files():
    """Return the source of every file of the sets, with its methods that compute gradients, by factory and class."""
    found = []
    for path in sorted(Path(unseen.__file__).parent.glob("*.py")):
        text = path.read_text()
        tops = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
        methods = {
            f"{top.name}.{c.name}.{m.name}": m
            for top in tops
            for c in ast.walk(top)
            if isinstance(c, ast.ClassDef)
            for m in c.body
            if isinstance(m, ast.FunctionDef) and m.name in _METHODS
        }
        module = f"{unseen.__name__}.{path.stem}"
        found += [File(module, path, text, methods, {}, {}, {})] if methods else []
    return found


def changes_of(module, method):
    """Return every change to a method of a file, but to what tells the twins apart."""
    file = next(f for f in _files() if f.module.endswith(f".{module}"))
    return [c for c in changes(file, method) if "wrong" not in c.old]


def sampled(seed, count):
    """Return ``count`` changes, one to a method, evenly over kinds; none to what tells the twins apart."""
    draw = random.Random(seed)
    methods = [(file.path.stem, name) for file in _files() for name in file.functions]
    draw.shuffle(methods)
    chosen, kinds = [], Counter()
    for module, method in methods:
        own = changes_of(module, method)
        draw.shuffle(own)
        if own and len(chosen) < count:
            change = min(own, key=lambda c: kinds[c.kind])
            kinds[change.kind] += 1
            chosen.append(change)
    return chosen


def outcome_of(change):
    """Return what gradcheck, and then the sweep, say of the right twin with ``change`` made."""
    unseen.every()  # here, once, not in every child
    return in_a_process(_outcome, change)


def _outcome(change, folder):
    before = {name: pair for pairs in unseen.SETS.values() for name, pair in pairs.items()}
    file = next(f for f in _files() if f.module == change.module)
    path = folder / file.path.name
    path.write_text(changed(file.text, change))
    for pairs in unseen.SETS.values():
        pairs.clear()
    spec = importlib.util.spec_from_file_location(change.module, path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    factory = change.function.partition(".")[0]
    again = (pair for pairs in unseen.SETS.values() for pair in pairs.values())
    pair = next(p for p in again if _factory(p.right) == factory)
    right, wrong = (Twin(p.right, p) for p in (before[pair.name], pair))
    return judged(right, wrong, next(wrong.samples(_Exact)))


class _Exact:
    dtype = torch.float64


def _factory(function):
    """Return the name of the function in a file that made this one."""
    function = inspect.unwrap(function)
    owner = getattr(function, "__self__", None)
    if isinstance(function, torch.nn.Module):
        owner = type(function)
    named = owner if inspect.isclass(owner) else function
    return getattr(named, "__qualname__", "").partition(".")[0]
