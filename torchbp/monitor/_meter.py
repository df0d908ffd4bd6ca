"""Measures what the quantities of parameters ask for, of all parameters at once."""

import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchbp.monitor._bundle import Bundle
from torchbp.monitor._catalogue import Catalogue
from torchbp.monitor._norms import norms
from torchbp.monitor._packing import Packing, Shelf, small
from torchbp.monitor._quantity import Quantity
from torchbp.monitor._registry import all_quantities
from torchbp.monitor._row import Pieces, Row

__all__ = ["Group", "Meter", "local"]

# Indices of parameters on one device, and what is measured of them.
Group = tuple[tuple[int, ...], Bundle]

_PLANS = 64


class Meter:
    """Puts into rows what is measured of gradients, parameters and updates.

    Args:
        catalogue: The parameters.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._measures: dict[str, dict[tuple[bool, bool], list[Quantity]]] = {
            at: {
                (sampled, rare): [
                    q for q in all_quantities().values() if q.at == at and q.is_due(sampled, rare)
                ]
                for sampled, rare in ((False, False), (True, False), (True, True))
            }
            for at in ("gradient", "stepped", "weight", "update")
        }
        self._plans: dict[tuple[str, tuple[int, ...]], _Plan] = {}
        self._last: _Plan | None = None  # that of all gradients, as they were last time
        self._members: dict[int, tuple[object, tuple[int, ...]]] = {}

    def members(self, optimizer: torch.optim.Optimizer) -> tuple[int, ...]:
        """Return the indices of the parameters of ``optimizer``."""
        lists = [group["params"] for group in optimizer.param_groups]
        key = [(id(found), len(found)) for found in lists]
        known = self._members.get(id(optimizer))
        if known is None or known[0] != key:
            ids = {id(parameter) for found in lists for parameter in found}
            chosen = tuple(i for i, p in self._catalogue.alive() if id(p) in ids)
            known = self._members[id(optimizer)] = key, chosen
        return known[1]

    def gradients(self, members: Iterable[int] | None = None) -> list[Group]:
        """Return the gradients that are there; of ``members`` only, if given."""
        plan = self._last
        if members is None and plan is not None:
            tensors = plan.gradients()
            if len(tensors) == plan.size and all(
                (p := ref()) is None or p.grad is None for ref in plan.others
            ):
                groups = plan.groups(tensors)
                if groups is not None:
                    return groups
        references = self._catalogue.parameters
        chosen = range(len(references)) if members is None else members
        found = {
            i: grad
            for i in chosen
            if (p := references[i]()) is not None and (grad := p.grad) is not None
        }
        plan, groups = self._planned("gradient", found)
        if members is None:
            self._last = plan
        return groups

    def parameters(self, members: Sequence[int], *, room: int = 1) -> list[Group]:
        """Return the parameters ``members``; with ``room`` for so many times them to be compared."""
        references = self._catalogue.parameters
        found = {i: p for i in members if (p := references[i]()) is not None}
        return self._planned("parameters", found, room)[1]

    def _planned(
        self, what: str, found: dict[int, Tensor], room: int = 1
    ) -> "tuple[_Plan | None, list[Group]]":
        if not found:
            return None, []
        key = what, tuple(found)
        plan = self._plans.get(key)
        groups = None if plan is None else plan.groups([found[i] for i in plan.order], room)
        if plan is None or groups is None:
            self.settle()
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            plan = self._plans[key] = _Plan(self._catalogue, found)
            groups = plan.groups([found[i] for i in plan.order], room)
            assert groups is not None
        return plan, groups

    def settle(self) -> None:
        """Measure what was only copied so far."""
        for plan in self._plans.values():
            if plan.shelf is not None:
                plan.shelf.empty()

    def norms(self) -> Pieces:
        """Return the norms of the gradients as they are."""
        with torch.no_grad():
            return [(indices, bundle.measured(norms)) for indices, bundle in self.gradients()]

    def measure(self, row: Row, at: str, groups: list[Group]) -> None:
        """Measure what is measured at ``at``, beside what another optimizer of the step has left."""
        for quantity in self._measures[at][row.sampled, row.rare]:
            assert quantity.measure is not None
            pieces = row.parameters.setdefault(quantity.name, [])
            for indices, bundle in groups:
                pieces.append((indices, bundle.measured(quantity.measure)))


class _Plan:
    """How tensors of some parameters are put together, found once.

    Args:
        catalogue: All parameters.
        found: By index, a tensor.

    Attributes:
        order: The indices in the order in which tensors are given.
        size: Their number.
        shelf: Where the small ones go.
        others: All other parameters.
    """

    def __init__(self, catalogue: Catalogue, found: dict[int, Tensor]) -> None:
        parts = {i: local(t) for i, t in found.items()}
        dense = [i for i in parts if found[i].layout == torch.strided]
        packed = [dense[k] for k in small([parts[i] for i in dense])]
        self.shelf: Shelf | None = None
        self._small: tuple[int, ...] = ()
        if packed:
            packing = Packing([tuple(parts[i].shape) for i in packed])
            self.shelf = Shelf(packing)
            self._small = tuple(packed[k] for k in packing.order)
        devices: dict[torch.device, list[int]] = {}
        for i, tensor in parts.items():
            # A rank's shard may be empty, a sparse gradient is as long as it is.
            if i not in self._small and (tensor.numel() or found[i].layout != torch.strided):
                devices.setdefault(tensor.device, []).append(i)
        self._rest = [tuple(indices) for indices in devices.values()]
        self.order = (*self._small, *(i for indices in self._rest for i in indices))
        self.size = len(self.order)
        self._plain = all(map(_is_plain, found.values()))
        references = catalogue.parameters
        self._references = [references[i] for i in self.order]
        self.others: list[weakref.ref[Tensor]] = [
            ref for i, ref in enumerate(references) if i not in found
        ]

    def gradients(self) -> list[Tensor]:
        """Return the gradients that are there."""
        return [
            grad
            for ref in self._references
            if (p := ref()) is not None and (grad := p.grad) is not None
        ]

    def groups(self, tensors: list[Tensor], room: int = 1) -> list[Group] | None:
        """Return ``tensors`` as bundles; None where they are not as they were when this was found."""
        if not self._plain or not all(map(_is_plain, tensors[len(self._small) :])):
            tensors = [local(t) for t in tensors]
        groups: list[Group] = []
        count = len(self._small)
        if self.shelf is not None:
            try:
                groups.append((self._small, Bundle(tensors[:count], self.shelf, room=room)))
            except RuntimeError:  # a gradient that is sparse now, or on another device
                return None
        for indices in self._rest:
            part = tensors[count : count + len(indices)]
            groups.append((indices, Bundle(part)))
            count += len(indices)
        return groups


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard, and the values of a sparse gradient."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    if tensor.layout != torch.strided:
        tensor = tensor.coalesce().values()
    return tensor.detach()


def _is_plain(tensor: Tensor) -> bool:
    return not isinstance(tensor, DTensor) and tensor.layout == torch.strided
