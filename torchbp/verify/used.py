"""A call on leaves that were used before, with new values in the same memory, and what it leaves behind.

Two checks look at it: `memory`, at what it gives, and `leaks`, at what is not freed.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchbp.verify.cases import Case
from torchbp.verify.raised import BackwardRaised, ForwardRaised

__all__ = ["Used", "called_on", "used"]


@dataclass(frozen=True)
class Used:
    """What the call gave, and left behind.

    Attributes:
        leaves: That it was made on.
        grads: For the grad_output of the first call.
        forever: How many tensors nothing frees.
        cycles: How many were freed by the garbage collector only.
    """

    leaves: list[Tensor]
    grads: tuple[Tensor, ...]
    forever: int
    cycles: int


def used(case: Case) -> Used:
    """Return what such a call gives; the same one each time."""
    if "used" not in case.memo:
        leaves = _with_values_of(case, _leaves(case))
        for leaf in leaves:  # as in all steps but the first
            leaf.grad = torch.zeros_like(leaf)
        case.memo["used"] = called_on(case, leaves)
    return case.memo["used"]


def called_on(case: Case, leaves: list[Tensor]) -> Used:
    """Return what a call on these leaves gives and leaves behind."""
    _ = case.plain
    with _collected_by_hand():
        grads, left = _call(case, leaves)
        kept = [left]
        if not all(r.expired() for r in left):  # what is left is a cache of one, perhaps
            kept.append(_call(case, case.fresh())[1])
        cycles = [[r for r in run if not r.expired()] for run in kept]
        if any(cycles):  # through all that is there: a second in a large process
            gc.collect()
        forever = [[r for r in run if not r.expired()] for run in cycles]
    # A cache that is filled once has been, by the calls before; a process's first call makes cycles of torch's own.
    return Used(leaves, grads, len(forever[0]), len(cycles[-1]))


def _leaves(case: Case) -> list[Tensor]:
    """Return leaves, of other values if possible, that the function was called with already."""
    try:
        _ = case.nearby.plain
    except (ForwardRaised, BackwardRaised):  # beside the sample, outside of the domain
        leaves, outputs = case.graph()
        case.backward(outputs, leaves, case.plain.cotangents)
        return leaves
    return case.nearby.kept[0]


def _with_values_of(case: Case, leaves: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        for leaf, value in zip(leaves, case.leaves, strict=True):
            leaf.copy_(value)
    return leaves


@contextmanager
def _collected_by_hand() -> Iterator[None]:
    """Keep the garbage collector from running by itself."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _call(case: Case, leaves: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], list[StorageWeakRef]]:
    """Return the gradients, copied, and what was allocated for them and before, grad_output included."""
    with _Allocations() as allocations:
        outputs = case.forward(leaves)
        own = [v.clone() for v in case.plain.cotangents]  # which backward may keep, too
        grads = case.backward(outputs, leaves, own)
    return tuple(g.detach().clone() for g in grads), list(allocations.storages.values())


class _Allocations(TorchDispatchMode):
    """Keeps a weak reference to the storage of every tensor that is made."""

    only_watches = True  # torchbp runs under it as without

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
