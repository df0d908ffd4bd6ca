"""Leaks: what a call allocates is free again once its results are gone."""

import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchbp.verify._check import Check
from torchbp.verify.cases import Case
from torchbp.verify.report import Finding

NAME = "leaks"


class _Allocations(TorchDispatchMode):
    """Keeps a weak reference to the storage of every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {StorageWeakRef(t.untyped_storage()).cdata for t in _dense((args, kwargs))}
        for t in _dense(result):
            ref = StorageWeakRef(t.untyped_storage())
            if ref.cdata not in given:  # a view of what is there already is no allocation
                self.storages[ref.cdata] = ref
        return result


def _dense(structure: object) -> list[Tensor]:
    return [
        t
        for t in pytree.tree_leaves(structure)
        if type(t) in (Tensor, torch.nn.Parameter)
        and t.layout == torch.strided
        and t.device.type != "meta"
    ]


def _run(case: Case) -> Iterator[Finding]:
    _ = case.plain
    was_enabled = gc.isenabled()
    gc.disable()
    thaw = gc.get_freeze_count() == 0
    if thaw:
        gc.freeze()  # what is there already need not be looked through: 5 ms instead of 300
    try:
        kept = [_call(case)]
        if not all(r.expired() for r in kept[0]):  # what is left is a cache of one, perhaps
            kept.append(_call(case))
        cycles = [[r for r in run if not r.expired()] for run in kept]
        gc.collect()
        forever = [[r for r in run if not r.expired()] for run in cycles]
    finally:
        if thaw:
            gc.unfreeze()
        if was_enabled:
            gc.enable()
    # A cache that is filled once has been, by the calls before.
    if forever[0]:
        yield Finding(
            check=NAME,
            severity="wrong",
            message=f"each call leaves {len(forever[0])} tensors behind that nothing frees",
            got=float(len(forever[0])),
            expected=0.0,
            cause="appended to a global, the class or the module",
        )
    elif cycles[-1]:  # the first call of a process makes cycles of torch's own
        yield Finding(
            check=NAME,
            severity="note",
            message=f"each call leaves {len(cycles[-1])} tensors in a reference cycle, freed by the "
            "garbage collector only: a tensor, often the output, kept as ctx attribute",
        )


def _call(case: Case) -> list[StorageWeakRef]:
    leaves = case.fresh()
    with _Allocations() as allocations:
        outputs = case.forward(leaves)
        case.backward(outputs, leaves, case.plain.cotangents)
    return list(allocations.storages.values())


CHECK = Check(
    name=NAME,
    tests="a call leaves no tensor behind",
    run=_run,
    order=62,
    level="full",
)
